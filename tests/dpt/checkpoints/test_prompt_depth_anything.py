"""Prompt Depth Anything: what transformers' class makes of the same weights, from a picture and its prompt to metres."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recording import difference, network_input, picture
from small import config, randomise, small, upstream

import dpt
from dpt import exchange, factory
from dpt.checkpoints import CheckpointError, layout_of
from dpt.checkpoints.conversion import reverted
from dpt.commands import main
from dpt.config import IMAGENET_MEAN, DPTConfig
from dpt.inference.images import ImageError
from dpt.inference.prompts import load_prompt
from dpt.inference.resizing import network_size, postprocess, preprocess
from dpt.model import DPT
from dpt.zoo import CONFIGS, prompt_depth_anything

transformers = pytest.importorskip("transformers")
DATA = Path(__file__).parents[1] / "nets" / "data"
NAMES = ("prompt-depth-anything-small", "prompt-depth-anything-small-transparent", "prompt-depth-anything-large")


def theirs(**fields) -> torch.nn.Module:
    """transformers' class with random weights."""
    backbone = {
        "model_type": "dinov2",
        "hidden_size": 32,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "image_size": 70,
        "patch_size": 14,
        "out_indices": [1, 2, 4, 5],
        "reshape_hidden_states": False,
    }
    sizes = {"backbone_config": backbone, "reassemble_hidden_size": 32, "neck_hidden_sizes": [8, 12, 16, 20], "fusion_hidden_size": 16}
    stated = {**sizes, "depth_estimation_type": "metric", "max_depth": None, **fields}
    return randomise(transformers.PromptDepthAnythingForDepthEstimation(transformers.PromptDepthAnythingConfig(**stated)))


def sensor(height: int, width: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Metres (B, h, w), each picture's of a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    far = torch.arange(1, batch + 1).view(-1, 1, 1)
    return 0.5 + far * torch.rand(batch, height, width, generator=generator)


def close(ours: torch.Tensor, expected: torch.Tensor, relative: float = 1e-4) -> None:
    assert ours.shape == expected.shape and (ours - expected).abs().max() <= relative * expected.abs().max()
    assert expected.std() > 0.01 * expected.abs().max()


@pytest.mark.parametrize(("fields"), [{}, {"depth_estimation_type": "relative", "max_depth": 3, "head_hidden_size": 16}], ids=str)
def test_equal_to_transformers(tmp_path, fields):
    """Blind spot: the prompt added on the wrong side of the upsampling, of another scale or that of the batch, resized otherwise; a largest
    depth that nothing reads; sizes that are not square, of an odd number of patches."""
    model = theirs(**fields)
    model.save_pretrained(tmp_path)
    ours = dpt.load(tmp_path)
    for number, size in enumerate(((70, 70), (98, 42), (70, 154), (14, 28))):
        x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(size[0]))
        prompt = sensor(*((24, 32), (7, 5), (150, 200), (3, 2))[number], batch=2)
        with torch.inference_mode():
            close(ours(x, prompt), model(x, prompt_depth=prompt[:, None]).predicted_depth)
    assert ours.config.head.metric


@pytest.mark.parametrize("size", [(97, 131), (110, 90)])
def test_equal_to_transformers_from_the_picture_to_the_map(tmp_path, size):
    """Blind spot: the rule, the multiple, the antialiased resize and the prompt's unit of the processor's file; the resize back."""
    model = theirs()
    processor = transformers.models.prompt_depth_anything.image_processing_pil_prompt_depth_anything.PromptDepthAnythingImageProcessorPil(
        size={"height": 70, "width": 70},
        keep_aspect_ratio=True,
        ensure_multiple_of=14,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    millimetres = (1000 * sensor(24, 32)[0]).numpy().astype(np.uint16)
    Image.fromarray(millimetres).save(tmp_path / "prompt.png")
    ours, image = dpt.load(tmp_path), picture(*size)
    inputs = processor(image, prompt_depth=millimetres.astype(np.int32), return_tensors="pt")
    tensor, _ = preprocess(image, ours.config.input)
    assert tensor.shape == inputs["pixel_values"].shape
    levels = ((tensor - inputs["pixel_values"]) * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * 255).abs()
    assert levels.max() < 2.1 and levels.mean() < 0.3  # Pillow rounds twice, once a direction, and its filter to 8 bits
    prompt = torch.from_numpy(load_prompt(tmp_path / "prompt.png"))
    close(prompt, inputs["prompt_depth"][0, 0], 1e-6)
    with torch.inference_mode():
        expected = processor.post_process_depth_estimation(model(**inputs), target_sizes=[size])[0]["predicted_depth"]
        found = ours(inputs["pixel_values"], prompt[None])
        close(postprocess(found[0], tensor.shape[2:], size, ours.config.input), expected)
    close(torch.from_numpy(ours.predict(image, prompt=tmp_path / "prompt.png").depth), expected, 0.02)  # of the grey levels


def test_scaled_by_its_own_prompt():
    """Blind spot: the nearest and farthest of the batch; a prompt of one distance, which upstream divides by zero; half precision."""
    model = small(NAMES[0])
    x, prompt = torch.randn(2, 3, 70, 98), torch.stack((sensor(12, 16)[0], torch.full((12, 16), 2.5)))
    with torch.inference_mode():
        found = model(x, prompt)
        close(found[:1], model(x[:1], prompt[:1]))
        assert torch.equal(found[1], torch.full((70, 98), 2.5))
        assert prompt[0].min() <= found[0].min() and found[0].max() <= prompt[0].max()
        half = model.bfloat16()(x.bfloat16(), prompt)
        assert half.dtype == torch.float32 and (half - found).abs().mean() < 0.05


def test_a_prompt_is_asked_for_and_checked(tmp_path):
    """Blind spot: a map of no scale where no prompt is given, as transformers gives; a prompt that is passed over."""
    model, image = small(NAMES[0]), picture(70, 98)
    for call in (lambda: model(torch.zeros(1, 3, 70, 70)), lambda: model.predict(image)):
        with pytest.raises(ValueError, match=r"prompt-depth-anything-small needs .*prompt"):
            call()
    with pytest.raises(ValueError, match="--prompt FILE"):
        model.predict(image)
    for shape in ((2, 4, 4), (4, 4), (1, 1, 4, 4), (1, 0, 4)):
        with pytest.raises(ValueError, match=r"prompt of shape .*must be \(batch, height, width\)"):
            model(torch.zeros(1, 3, 70, 70), torch.ones(shape))
    plain = small("depth-anything-v2-small")
    for call in (lambda: plain(torch.zeros(1, 3, 70, 70), torch.ones(1, 4, 4)), lambda: plain.predict(image, prompt=np.ones((4, 4)))):
        with pytest.raises(ValueError, match="takes no prompt"):
            call()
    with pytest.raises(ValueError, match="cannot be seen in windows"):
        model.predict(image, prompt=np.ones((4, 4)), slide=True)
    with pytest.raises(ValueError, match="1 prompts for 2 pictures"):
        model.predict([image, image], prompt=np.ones((4, 4)))
    with pytest.raises(ImageError, match="fewer prompts than pictures"):
        model.predict(iter([image, image]), prompt=[np.ones((4, 4))])
    for wrong, message in (
        (np.ones((4, 4, 1)), "has the shape"),
        (np.ones((4, 4), np.uint16), "holds uint16"),
        (np.full((4, 4), np.nan), "holds nan"),
        (-torch.ones(4, 4), "holds -1"),
        (tmp_path / "none.npy", "none.npy: No such file"),
        (tmp_path / "grey.png", "a prompt has one channel of 16 bits"),
        (tmp_path / "text.png", "not a picture"),
    ):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "grey.png")
        (tmp_path / "text.png").write_text("prompt")
        with pytest.raises(ImageError, match=message):
            model.predict(image, prompt=wrong)
    with pytest.raises(TypeError, match="not int"):
        load_prompt(3)


def test_each_picture_has_its_prompt():
    """Blind spot: a batch whose prompts are another picture's, or of different sizes; a mirrored picture with a prompt that is not."""
    model, images = small(NAMES[0]), [picture(70, 98), picture(98, 70)[:, ::-1], picture(70, 98) // 2]
    prompts = [sensor(12, 16, seed=1)[0].numpy(), sensor(16, 12, seed=2)[0].double(), 3 * sensor(9, 12, seed=3)[0]]
    together = model.predict(images, prompt=prompts, batch_size=3)
    for image, prompt, found in zip(images, prompts, together, strict=True):
        np.testing.assert_allclose(found.depth, model.predict(image, prompt=prompt).depth, rtol=1e-4)
    mirrored = model.predict(images[0][:, ::-1].copy(), prompt=prompts[0][:, ::-1].copy()).depth[:, ::-1]
    averaged = model.predict(images[0], prompt=prompts[0], flip=True).depth
    np.testing.assert_allclose(averaged, (mirrored + together[0].depth) / 2, rtol=1e-4)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(1440, 1920, (756, 1008)), (192, 256, (182, 252)), (1008, 756, (1008, 756)), (5, 2000, (14, 1008)), (1073, 20, (994, 14))],
)
def test_sizes_are_the_originals(height, width, expected):
    """Blind spot: a small picture made larger, a side rounded up. Of 1073 rows upstream's product is just below 1008, and 994 is what it
    takes."""
    sizes = CONFIGS[NAMES[0]].input
    assert network_size(height, width, sizes) == expected
    scale = 1008 / max(height, width) if max(height, width) > 1008 else 1.0
    assert network_size(height, width, sizes) == tuple(max(int(side * scale // 14 * 14), 14) for side in (height, width))


def test_averaged_as_opencv():
    """Blind spot: bilinear taps, whole pixels. cv2.resize(..., INTER_AREA) of floats, from 7 pixels to 3 and from 6 to 3."""
    row = np.array([0, 230, 26, 153, 76, 255, 102], np.uint8)
    for length, target in ((7, 3), (6, 3)):
        image = np.repeat(row[None, :length, None], 3, axis=2)
        sizes = config(NAMES[0]).with_("input", mean=(0.0,) * 3, std=(1.0,) * 3, size=(1, target), rule="square", multiple=1).input
        tensor, _ = preprocess(image, sizes)
        share = length / target
        weights = [[max(0.0, min(j + 1, (i + 1) * share) - max(j, i * share)) / share for j in range(length)] for i in range(target)]
        np.testing.assert_allclose(tensor[0, 0, 0].numpy() * 255, np.array(weights) @ row[:length], rtol=1e-5)


def test_the_fast_model_is_the_plain_one():
    """Blind spot: the prompt left out of the fast fusion, or added behind the projection."""
    plain = small(NAMES[0], embed_dim=64, num_heads=2)
    quick = dpt.accelerate(copy.deepcopy(plain), strict=True)
    rows = {row.name: row for row in dpt.fast_report(quick)}
    assert all(rows[f"fusion.blocks.{level}.prompt"].fused for level in range(4)) and all(row.fused for row in rows.values())
    for size in ((70, 98), (14, 42)):
        x, prompt = torch.randn(2, 3, *size), sensor(12, 16, batch=2)
        with torch.inference_mode():
            assert (quick(x, prompt) - plain(x, prompt)).abs().max() <= 2e-5 * plain(x, prompt).abs().max()


REFUSED = [
    ("config.json", "model_type", "depth_anything_3", "'prompt_depth_anything'"),
    ("config.json", "depth_estimation_type", "absolute", "one of relative, metric"),
    ("config.json", "max_depth", "far", "a number, or null"),
    ("preprocessor_config.json", "prompt_scale_to_meter", 1.0, "0.001"),
]


@pytest.mark.parametrize(("file", "field", "value", "rule"), REFUSED)
def test_what_cannot_be_obeyed_is_refused(tmp_path, file, field, value, rule):
    """Blind spot: a field passed over, and a map that is silently another."""
    theirs().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"height": 70, "width": 70}, "ensure_multiple_of": 14}')
    stated = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**stated, field: value}))
    with pytest.raises(CheckpointError, match=rf"{re.escape(file)}.*{field}=.*: it must be .*{re.escape(rule)}"):
        dpt.load(tmp_path)


@pytest.mark.parametrize("layout", prompt_depth_anything.LAYOUTS, ids=lambda layout: layout.name)
def test_files_are_recognised(layout):
    """Blind spot: files taken for Depth Anything's, whose keys they have too; the two small models told apart in silence."""
    for name in NAMES:
        with torch.device("meta"):
            state = upstream(DPT(CONFIGS[name]), layout)
        assert layout_of(state) is layout
        if name == NAMES[2]:
            assert factory.recognised(state, layout, "file").name == name
        else:
            with pytest.raises(CheckpointError, match=f"fits {NAMES[0]}, {NAMES[1]} alike"):
                factory.recognised(state, layout, "file")


@pytest.mark.parametrize("prefix", ["pipeline.", "whatever."])
def test_the_originals_file(tmp_path, prefix):
    """Blind spot: keys behind what training code called its model, nine characters that its loader cuts off; buffers of mean and deviation;
    what a strict loader wants in a file that is written."""
    model = small(NAMES[0])
    layout = prompt_depth_anything.ORIGINAL
    state = {prefix + key: value for key, value in reverted(model.state_dict(), layout, 32).items()}
    assert f"{prefix}_mean" in state and f"{prefix}pretrained.mask_token" in state
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "model.ckpt")
    loaded = dpt.load(tmp_path / "model.ckpt", config(NAMES[0]))
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    assert loaded.config.encoder.pos_offset == 0.1 and loaded.config.input.rule == "at_most" and loaded.config.input.mode == "area"
    exchange.convert(tmp_path / "model.ckpt", tmp_path / "ours.safetensors", "dpt", config(NAMES[0]))
    exchange.convert(tmp_path / "ours.safetensors", tmp_path / "back.ckpt", "prompt-depth-anything")
    back = torch.load(tmp_path / "back.ckpt")["state_dict"]
    assert {key[9:] for key in back} == {key[9:] for key in state} and len(layout.prefix) == 9
    assert all(torch.equal(back[f"pipeline.{key[9:]}"], value) for key, value in state.items())
    torch.testing.assert_close(back["pipeline._mean"].flatten(), torch.tensor(IMAGENET_MEAN))


def test_read_by_transformers(tmp_path):
    """Blind spot: a configuration that transformers takes for another model, or that is read otherwise than it was written."""
    model = small(NAMES[0])
    dpt.save(model, tmp_path / "ours.safetensors")
    exchange.convert(tmp_path / "ours.safetensors", tmp_path / "theirs", "hf")
    found, loaded = transformers.AutoModelForDepthEstimation.from_pretrained(tmp_path / "theirs").eval(), dpt.load(tmp_path / "theirs")
    x, prompt = torch.randn(1, 3, 56, 70), sensor(12, 16)
    with torch.inference_mode():
        close(loaded(x, prompt), found(x, prompt_depth=prompt[:, None]).predicted_depth)
    expected = prompt_depth_anything.TRANSFORMERS.as_run(config(NAMES[0]))
    assert (loaded.config.encoder, loaded.config.decoder, loaded.config.head, loaded.config.input) == (
        expected.encoder,
        expected.decoder,
        expected.head,
        expected.input,
    )
    stated = json.loads((tmp_path / "theirs" / "preprocessor_config.json").read_text())
    assert stated["image_processor_type"] == "PromptDepthAnythingImageProcessor" and stated["size"] == {"height": 756, "width": 756}


def test_the_command(tmp_path, capsys):
    """Blind spot: a prompt that the command does not hand on; results that count as done though the prompt is another."""
    dpt.save(small(NAMES[0]), tmp_path / "model.safetensors")
    Image.fromarray(picture(70, 98)).save(tmp_path / "a.png")
    np.save(tmp_path / "prompt.npy", sensor(12, 16)[0].numpy())
    command = ["predict", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), "--weights", str(tmp_path / "model.safetensors")]
    command += ["--device", "cpu"]
    assert main.main(command) == 2
    assert "--prompt FILE" in capsys.readouterr().err
    prompted = [*command, "--prompt", str(tmp_path / "prompt.npy")]
    assert main.main(prompted) == 0 and main.main(prompted) == 0
    assert "1 done before" in capsys.readouterr().out
    (npy,) = (tmp_path / "out").glob("*.npy")
    found = np.load(npy)
    assert 0.5 <= found.min() < found.max() <= 1.5
    np.save(tmp_path / "prompt.npy", 2 * sensor(12, 16)[0].numpy())
    assert main.main(prompted) == 0 and np.load(npy).max() > 1.5
    Image.fromarray(picture(70, 98)).save(tmp_path / "b.png")
    assert main.main([*prompted[:1], str(tmp_path / "b.png"), *prompted[1:]]) == 2
    assert "--prompt is of one picture, and 2 are given" in capsys.readouterr().err


def test_what_the_family_publishes():
    """Blind spot: Depth Anything V2's licences, its largest depth, a field left behind."""
    for name, file in zip(NAMES, ("vits", "vits-transparent", "vitl"), strict=True):
        full = CONFIGS[name]
        v2 = CONFIGS[f"depth-anything-v2-{'large' if file == 'vitl' else 'small'}"]
        assert full.encoder == v2.encoder and full.decoder == v2.with_("decoder", prompt=True).decoder
        assert full.source.endswith(f"/prompt-depth-anything-{file}/resolve/main/model.ckpt") and full.licence == "Apache-2.0"
        assert full.head.metric and full.head.max_depth == 1


def narrow() -> DPTConfig:
    """The recorded model's size with what the large one computes."""
    full = CONFIGS[NAMES[2]].with_("encoder", embed_dim=16, depth=6, num_heads=2, hooks=(1, 2, 4, 5))
    return full.with_("decoder", neck_channels=(8, 12, 16, 20), features=10)


def recorded_prompt(batch: int) -> torch.Tensor:
    """The oracle's, (B, 12, 16)."""
    values = np.random.RandomState(2).randint(32, 256, (batch, 12, 16))
    return torch.from_numpy(values).float() / 64 * torch.arange(1, batch + 1).view(-1, 1, 1)


@pytest.mark.parametrize("name", ["square", "wide", "tall", "stored"])
def test_equal_to_the_original_code(name):
    """Blind spot: the embedding resized by size and not by scale, the prompt's branch, its scale, the dead unit run."""
    arrays = np.load(DATA / "prompt_depth_anything.npz")
    model = dpt.load(DATA / "prompt_depth_anything.ckpt", narrow())
    batch, height, width = arrays[f"{name}.input"]
    with torch.inference_mode():
        found = model(network_input((batch, height, width)), recorded_prompt(batch))
    assert difference(arrays, f"{name}.output", found).max() < 1e-4


@pytest.mark.parametrize("name", ["small_picture", "large_picture"])
def test_equal_to_the_original_from_the_picture_to_the_map(name):
    """Blind spot: a small picture made larger, another average of a large one, mean and deviation. The original's map is of the tensor's
    size, and so is the small picture."""
    arrays = np.load(DATA / "prompt_depth_anything.npz")
    model, image = dpt.load(DATA / "prompt_depth_anything.ckpt", narrow()), picture(*arrays[f"{name}.picture"])
    tensor, _ = preprocess(image, model.config.input)
    assert difference(arrays, f"{name}.tensor", tensor).max() < 1e-4
    with torch.inference_mode():
        found = model(tensor, recorded_prompt(1))[0]
    assert (difference(arrays, f"{name}.map", found) <= 1 / 65535).mean() >= 0.999
    depth = model.predict(image, prompt=recorded_prompt(1)[0]).depth
    if name == "small_picture":
        np.testing.assert_allclose(depth, found, rtol=1e-5)
    assert depth.shape == image.shape[:2]


def test_training_is_refused(tmp_path):
    """Blind spot: a training that reads all its data first, and then has no prompt."""
    from dpt.training.objective import trained_config
    from dpt.training.recipes import Recipe

    with pytest.raises(ValueError, match="prompt-depth-anything-small cannot be trained: it needs a sensor's depth"):
        trained_config(Recipe.of("prompt-depth-anything-small"), tmp_path)
