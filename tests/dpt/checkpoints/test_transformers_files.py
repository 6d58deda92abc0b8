"""transformers' folders: config.json and processor obeyed or refused, shards, and equality with transformers' own models."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from small import TRANSFORMERS_FIELDS, config, randomise, small, upstream

import dpt
from dpt.checkpoints import CheckpointError
from dpt.commands.main import main
from dpt.inference.resizing import preprocess
from dpt.zoo import stated, transformers_dpt

transformers = pytest.importorskip("transformers")
SMALL = {**TRANSFORMERS_FIELDS, "num_hidden_layers": 5, "intermediate_size": 100, "backbone_out_indices": [0, 1, 3, 4]}
CLASSES = {"depth": transformers.DPTForDepthEstimation, "segmentation": transformers.DPTForSemanticSegmentation}


def theirs(task: str, **fields):
    model = randomise(CLASSES[task](transformers.DPTConfig(**{**SMALL, **fields})), seed=3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("query.weight", "key.weight")):
                value.mul_(3)  # attention that is far from uniform, so that a wrong head shows
    return model


def close(ours: torch.Tensor, expected: torch.Tensor, relative: float = 2e-5) -> None:
    assert ours.shape == expected.shape and expected.std() > 0.01 * expected.abs().max()
    assert (ours - expected).abs().max() <= relative * expected.abs().max()


def output(model, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        result = model(x)
    return result if isinstance(result, torch.Tensor) else result.predicted_depth if "predicted_depth" in result else result.logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A depth model as save_pretrained writes it, with its processor."""
    path = tmp_path_factory.mktemp("depth")
    theirs("depth").save_pretrained(path)
    transformers.DPTImageProcessorPil(size={"height": 64, "width": 64}, ensure_multiple_of=32, keep_aspect_ratio=True).save_pretrained(path)
    return path


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copied")


def edit(folder, file: str, **fields) -> None:
    values = json.loads((folder / file).read_text()) | fields
    (folder / file).write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        ("depth", {}),
        ("depth", {"readout_type": "ignore", "backbone_out_indices": [1, 2, 3, 4]}),
        ("depth", {"readout_type": "add", "layer_norm_eps": 0.1}),
        ("depth", {"hidden_act": "relu", "use_batch_norm_in_fusion_residual": True}),
        ("depth", {"hidden_act": "gelu_new", "backbone_out_indices": [4, 0, 2, 1]}),
        ("depth", {"add_projection": True, "use_bias_in_fusion_residual": False, "fusion_hidden_size": 256}),  # its projection has 256
        ("depth", {"use_bias_in_fusion_residual": True, "use_batch_norm_in_fusion_residual": True}),
        ("depth", {"hidden_act": "silu", "image_size": 96, "intermediate_size": 37}),
        ("depth", {"hidden_act": "quick_gelu", "num_hidden_layers": 7, "num_attention_heads": 4, "layer_norm_eps": 1e-3}),
        ("segmentation", {"num_labels": 4, "use_batch_norm_in_fusion_residual": True}),
        ("segmentation", {"num_labels": 3, "use_auxiliary_head": False, "image_size": 48}),
        ("segmentation", {"id2label": {0: "sky", 1: "cat"}, "readout_type": "ignore", "use_bias_in_fusion_residual": True}),
    ],
    ids=str,
)
def test_equal_to_transformers(tmp_path, task, fields):
    """Blind spot: a field of config.json that is not obeyed: hooks, epsilon, activation, readout, sizes, labels, grid, auxiliary head."""
    model = theirs(task, **fields)
    model.save_pretrained(tmp_path)
    ours = dpt.load(tmp_path)
    for size in (64, 96):
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
        close(output(ours, x), output(model, x))
    assert ours.config.head.classes == (tuple(model.config.id2label.values()) if task == "segmentation" else ())
    assert ours.config.head.auxiliary == (task == "segmentation" and fields.get("use_auxiliary_head", True))


def test_each_way_to_name_the_files(tmp_path, folder, copied):
    """Blind spot: one of file or folder, safetensors or bin, whole or in shards."""
    expected = dpt.load(folder).state_dict()

    def same(path) -> bool:
        found = dpt.load(path)
        return found.config.encoder.hooks == (0, 1, 3, 4) and all(torch.equal(v, expected[k]) for k, v in found.state_dict().items())

    assert same(str(folder)) and same(copied / "model.safetensors")
    model = transformers.DPTForDepthEstimation.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2 and same(tmp_path / "shards")
    assert same(tmp_path / "shards" / "model.safetensors.index.json")
    (copied / "model.safetensors").unlink()
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state}, copied / "pytorch_model.bin")
    assert same(copied) and same(copied / "pytorch_model.bin")
    (copied / "pytorch_model.bin").unlink()
    halves = dict(list(state.items())[::2]), dict(list(state.items())[1::2])
    files = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
    for half, name in zip(halves, files, strict=True):
        torch.save(half, copied / name)
    index = {"metadata": {}, "weight_map": {key: name for half, name in zip(halves, files, strict=True) for key in half}}
    (copied / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert same(copied) and same(copied / "pytorch_model.bin.index.json")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda index: index.pop("weight_map"), "weight_map must be an object"),
        (lambda index: index.update(weight_map={}), "weight_map must be an object"),
        (
            lambda index: index["weight_map"].update(x="../model.safetensors"),
            r"weight_map\['x'\]='../model.safetensors': it must be the name",
        ),
        (lambda index: index["weight_map"].update(x="/etc/passwd"), r"weight_map\['x'\]='/etc/passwd'"),
        (lambda index: index["weight_map"].update(x=".."), r"weight_map\['x'\]='..'"),
        (lambda index: index["weight_map"].update(x=3), r"weight_map\['x'\]=3"),
        (lambda index: index["weight_map"].update(x="none.safetensors"), "its shard none.safetensors is not there"),
        (lambda index: index["weight_map"].update(x=min(index["weight_map"].values())), "x should be in model-00001-of-.*, and is not"),
    ],
)
def test_damaged_indices(tmp_path, folder, spoil, message):
    """Blind spot: a path out of the folder; a tensor that no shard holds."""
    transformers.DPTForDepthEstimation.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="300KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    spoil(index)
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        dpt.load(tmp_path)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="holds a list, not a JSON object"):
        dpt.load(tmp_path)


def test_a_tensor_in_two_shards(tmp_path, folder):
    """Blind spot: the value of whichever shard was read last."""
    state = dpt.checkpoints.read(folder).state
    key = "head.head.0.bias"
    tensors = {name: value.read() for name, value in state.items()}
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "a.safetensors")
    save_file({key: torch.zeros(8)}, tmp_path / "b.safetensors")
    index = {name: "a.safetensors" for name in tensors} | {key: "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError, match=f"{key} is in b.safetensors and in another shard"):
        dpt.load(tmp_path)


REFUSED = [
    ("model_type", "depth_anything", "'dpt'"),
    ("model_type", ..., "'dpt'"),
    ("architectures", ["DPTModel"], "one of DPTForDepthEstimation, DPTForSemanticSegmentation"),
    ("is_hybrid", True, "false: the encoder is a plain ViT"),
    ("backbone_config", {"model_type": "swinv2"}, "null: the encoder is a plain ViT"),
    ("backbone", "facebook/dinov2", "null: the encoder"),
    ("hidden_size", 0, "a whole number above 0"),
    ("hidden_size", 33, "a multiple of num_heads=2"),
    ("num_hidden_layers", "5", "a whole number above 0"),
    ("num_hidden_layers", 10**9, "a whole number from 1 to 1024"),
    ("num_attention_heads", None, "a whole number above 0"),
    ("intermediate_size", 1.5, "a whole number above 0"),
    ("hidden_act", "tanh", "one of gelu, gelu_python"),
    ("hidden_act", ["gelu"], "one of gelu, gelu_python"),
    ("layer_norm_eps", 0, "a number above 0"),
    ("layer_norm_eps", None, "a number above 0"),
    ("image_size", [64, 96], "the side of a square"),
    ("image_size", 8, "a whole number from 1 to"),
    ("patch_size", 14, "16: transformers' head upsamples by that"),
    ("num_channels", 4, "3"),
    ("qkv_bias", False, "true: our projections have a bias"),
    ("backbone_out_indices", [0, 1, 2], "four different blocks"),
    ("backbone_out_indices", [0, 1, 1, 2], "four different blocks"),
    ("backbone_out_indices", [0, 1, 2, -1], "four different blocks"),
    ("backbone_out_indices", [0, 1, 2, 5], "below depth=5"),
    ("readout_type", "concat", "one of project, ignore, add"),
    ("reassemble_factors", [4, 2, 1, 1], r"\[4, 2, 1, 0.5\]"),
    ("neck_hidden_sizes", [8, 12, 16], "four whole numbers"),
    ("fusion_hidden_size", 1, "a whole number above 1"),
    ("head_in_index", 0, "-1 or 3"),
    ("use_batch_norm_in_fusion_residual", "yes", "true, false or null"),
    ("use_bias_in_fusion_residual", "no", "true, false or null"),
    ("add_projection", "yes", "true, false or null"),
    ("use_auxiliary_head", 2, "true, false or null"),
    ("semantic_classifier_dropout", 2, "a number from 0 to 1"),
]
REFUSED_INPUTS = [
    ("do_resize", False, "true where nothing is padded: the network's sides"),
    ("do_resize", None, "true or false"),
    ("size", {"shortest_edge": 64}, "a height and a width"),
    ("size", {"height": 64, "width": 0}, "a height and a width"),
    ("resample", 0, r"one of 2 \(bilinear\), 3 \(bicubic\)"),
    ("keep_aspect_ratio", "yes", "true or false"),
    ("ensure_multiple_of", 0, "a whole number above 0"),
    ("ensure_multiple_of", 14, "a multiple of 16"),
    ("do_center_crop", True, "false"),
    ("do_pad", True, "false where pictures are resized"),
    ("do_pad", 1, "true, false or null"),
    ("size_divisor", 0, "a whole number above 0, or null"),
    ("do_rescale", 1, "true or false"),
    ("rescale_factor", 0, "a number above 0"),
    ("do_normalize", None, "true or false"),
    ("image_mean", [0.5], "three numbers"),
    ("image_std", [0.5, 0.5, 0], "three numbers above 0"),
]


@pytest.mark.parametrize(
    ("file", "field", "value", "rule"),
    [*(("config.json", *row) for row in REFUSED), *(("preprocessor_config.json", *row) for row in REFUSED_INPUTS)],
)
def test_what_cannot_be_obeyed_is_refused(copied, file, field, value, rule):
    """Blind spot: a field passed over, and a map that is silently another."""
    edit(copied, file, **{field: value})
    ours = {"hidden_size": "embed_dim", "num_hidden_layers": "depth", "image_size": "pos_grid", "backbone_out_indices": "hooks"}
    names = f"{field}|{ours.get(field, field)}"
    with pytest.raises(CheckpointError, match=rf"{re.escape(file)}: .*({names})=.*: (it|they) must be .*{rule}"):
        dpt.load(copied)


def test_every_field_that_is_obeyed_is_refused_when_wrong():
    """Blind spot: a row of the tables that no test breaks."""
    tables = {*transformers_dpt.DPT, *transformers_dpt.VIT}
    assert {field for field, *_ in REFUSED} == tables and {field for field, *_ in REFUSED_INPUTS} == set(stated.PROCESSOR)


def test_defaults_are_those_of_transformers():
    """Blind spot: a default that transformers has changed, or that was copied wrong."""
    model = json.loads(transformers.DPTConfig().to_json_string(use_diff=False))
    processor = json.loads(transformers.DPTImageProcessorPil().to_json_string())
    tables = {**transformers_dpt.DPT, **transformers_dpt.VIT}
    for table, defaults, left_out in ((tables, model, {"model_type", "architectures", "backbone"}), (stated.PROCESSOR, processor, set())):
        for field, (default, *_) in table.items():
            assert field in left_out or defaults.get(field) == default, field


def test_any_hidden_width_is_made_exactly():
    """Blind spot: a ratio of widths that rounds down to one channel less."""
    wrong = [(hidden, dim) for dim in range(1, 200) for hidden in range(1, 600, 7) if int(stated.ratio(hidden, dim) * dim) != hidden]
    assert wrong == []


def test_labels(tmp_path):
    """Blind spot: names in the order of a dictionary's text; labels that leave a class without a name."""
    names = [f"thing {index}" for index in range(12)]
    model = theirs("segmentation", id2label=dict(enumerate(names)))
    model.save_pretrained(tmp_path)
    loaded = dpt.load(tmp_path)
    assert loaded.config.head.classes == tuple(names) and len(loaded.config.head.palette) == 12
    for wrong in ({"0": "a", "2": "b"}, {}, ["a"], {"0": 1}):
        edit(tmp_path, "config.json", id2label=wrong)
        with pytest.raises(CheckpointError, match=r"config\.json: id2label=.*a name for each number from 0 on"):
            dpt.load(tmp_path)
    edit(tmp_path, "config.json", id2label={"0": "a", "1": "b"})
    with pytest.raises(CheckpointError, match="head.head.4.weight has shape"):
        dpt.load(tmp_path)
    edit(tmp_path, "config.json", id2label=..., num_labels=12)
    assert dpt.load(tmp_path).config.head.classes[11] == "LABEL_11"


def test_a_file_alone_is_told_by_its_shapes(tmp_path, folder):
    """Blind spot: the epsilon of MiDaS' weights from the hub, 1e-12 and not 1e-6, where no config.json says it; a name that is given."""
    torch.save(upstream(small("dpt-large-midas"), transformers_dpt.LAYOUT), tmp_path / "hub.bin")
    assert dpt.load(tmp_path / "hub.bin", config("dpt-large-midas")).config.encoder.norm_eps == 1e-12
    given = dpt.load(folder).config.with_("encoder", hooks=(1, 2, 3, 4))
    assert dpt.load(folder, given).config.encoder.hooks == (1, 2, 3, 4)


def test_a_config_of_something_else_beside_other_layouts(tmp_path):
    """Blind spot: config.json of whatever model lies in the same folder, read for a file that is not transformers'."""
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    model = small("dpt-large-midas")
    dpt.save(model, tmp_path / "ours.safetensors")
    assert dpt.load(tmp_path / "ours.safetensors").config == model.config


PROCESSORS = [
    {},
    {"size": {"height": 48, "width": 80}},
    {"size": {"height": 64, "width": 64}, "keep_aspect_ratio": True, "ensure_multiple_of": 32},
    {"resample": 2, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    {"do_normalize": False, "resample": 2},
    {"do_rescale": False, "image_mean": [100.0, 110.0, 120.0], "image_std": [50.0, 60.0, 70.0]},
    {"rescale_factor": 1 / 127.5},
]


@pytest.mark.parametrize("shape", [(50, 70), (200, 90), (130, 130)])
@pytest.mark.parametrize("fields", PROCESSORS, ids=str)
def test_pictures_are_prepared_as_the_processor_does(copied, fields, shape):
    """Blind spot: mean and scale, size, aspect, multiple, interpolation. transformers' processor on Pillow, which rounds to grey levels
    after each direction: half a level, times at most 1.25 (the sum of cubic weights' sizes), and half a level. It cuts off there too: the
    picture keeps cubic overshoots within 0..255."""
    processor = transformers.DPTImageProcessorPil(**{"size": {"height": 64, "width": 64}, **fields})
    processor.save_pretrained(copied)
    ours = dpt.load(copied).config.input
    noise = np.random.default_rng(0).integers(64, 192, (9, 9, 3), dtype=np.uint8)
    picture = np.kron(noise, np.ones((30, 30, 1), dtype=np.uint8))[: shape[0], : shape[1]]
    expected = processor(picture, return_tensors="pt").pixel_values
    x, _ = preprocess(picture, ours)
    assert x.shape == expected.shape
    level = 1 / (255 * torch.tensor(ours.std)).view(1, 3, 1, 1)
    assert ((x - expected).abs() / level).max() <= 0.5 * 1.25 + 0.5


def test_without_a_processor_its_defaults_hold(copied):
    """Blind spot: a folder that save_pretrained of a model alone wrote."""
    (copied / "preprocessor_config.json").unlink()
    found = dpt.load(copied).config.input
    assert (found.mean, found.std, found.size, found.rule, found.mode) == ((0.5,) * 3, (0.5,) * 3, (64, 64), "square", "bicubic")
    edit(copied, "config.json", image_size=[64, 64])
    (copied / "preprocessor_config.json").write_text('{"size": 96}')
    assert dpt.load(copied).config.input.size == (96, 96)


def test_predictions_are_those_of_transformers(folder):
    """Blind spot: the resize back, which no comparison of the networks sees."""
    processor = transformers.DPTImageProcessorPil.from_pretrained(folder)
    model = transformers.DPTForDepthEstimation.from_pretrained(folder)
    picture = np.kron(
        np.arange(64, dtype=np.uint8).reshape(8, 8, 1) * 4, np.ones((8, 8, 3), dtype=np.uint8)
    )  # nothing to resize on the way in
    with torch.inference_mode():
        outputs = model(**processor(picture, return_tensors="pt"))
        expected = processor.post_process_depth_estimation(outputs, target_sizes=[(64, 64)])[0]["predicted_depth"]
    close(torch.from_numpy(dpt.load(folder).predict(picture).depth), expected)


def test_info_describes_folders_and_reads_once(folder, capsys, monkeypatch):
    """Blind spot: the file parsed twice, a folder refused."""
    from dpt.checkpoints import files

    read = []
    original = files._read_one
    monkeypatch.setattr(files, "_read_one", lambda path: read.append(path) or original(path))
    assert main(["info", str(folder)]) == 0
    line = capsys.readouterr().out
    assert "transformers layout" in line and folder.name in line and "inverse depth" in line and "64x64" in line
    assert read == [folder / "model.safetensors"]


def test_predict_takes_a_folder_and_notices_its_change(copied, tmp_path, capsys):
    """Blind spot: "Is a directory"; a second run that skips what another config.json would give."""
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    arguments = ["predict", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), "--weights", str(copied)]
    assert main(arguments) == 0 and (tmp_path / "out" / "a_copied.npy").is_file()
    assert main(arguments) == 0 and "1 done before" in capsys.readouterr().out
    edit(copied, "config.json", backbone_out_indices=[1, 2, 3, 4])
    assert main(arguments) == 0 and "1 done;" in capsys.readouterr().out
