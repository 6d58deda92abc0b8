"""`dpt export`, as a user calls it: ONNX files of open sizes, with and without processing, and programs of torch.export."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dpt
import dpt.exporting as exporting
from dpt.commands import arguments, main
from dpt.commands.demo import PICTURES
from dpt.exporting import BOUND, checking, onnx_files

ROOT = Path(__file__).parents[3]
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
SIZES = (((64, 64), 1), ((48, 192), 3), ((240, 112), 2))  # multiples of 16, from three patches on


def called(*argv: str) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main.main(["export", *argv])
    return code, out.getvalue()


@pytest.fixture(scope="module")
def model() -> dpt.DPT:
    return dpt.build("dpt-tiny-depth", weights="pretrained")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, str]:
    """An ONNX file, and what was told of it, by a process of its own: what the exporter logs would be seen there."""
    path = tmp_path_factory.mktemp("export") / "tiny.onnx"
    command = [sys.executable, "-m", "dpt", "export", "dpt-tiny-depth", "-o", str(path), "--trtexec"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return path, done.stdout


def given(size: tuple[int, int], batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    return np.abs(found - wanted).max() / np.ptp(wanted)


def test_an_onnx_file_of_open_sizes(written, model):
    """Blind spot: sides that are open in name only. It is run here by ONNX Runtime itself, at other sizes than the command tries."""
    path, told = written
    run = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run
    for size, batch in SIZES:
        x = given(size, batch)
        with torch.no_grad():
            assert apart(run(["depth"], {"image": x.numpy()})[0], model(x).numpy()) < 2e-5
    read = onnx.load(path)
    assert [entry.version for entry in read.opset_import if not entry.domain] == [exporting.OPSET]
    assert {entry.key: entry.value for entry in read.metadata_props}["model"] == "dpt-tiny-depth"
    assert str(ROOT).encode() not in path.read_bytes(), "the exporter notes lines of source files"


def test_what_is_told(written):
    path, told = written
    assert told.startswith(f"{path} ({path.stat().st_size / 1e6:.1f} MB): dpt-tiny-depth, opset {exporting.OPSET}\n")
    assert "  takes image: float32 (batch, 3, 16*rows, 16*columns), RGB from 0 to 1, less (0.5, 0.5, 0.5), over (0.5, 0.5, 0.5)\n" in told
    assert "  gives depth: inverse depth up to scale and shift\n" in told
    tried = "1 of 192x192, 2 of 144x96, 1 of 112x176"
    worst = float(re.search(rf"beside PyTorch on {tried} \(width x height\): (\S+) of the range apart", told)[1])
    assert 0 < worst < 2e-5
    exec(f"import onnxruntime; {re.search('load it: (.*)', told)[1].replace(path.name, str(path))}", {})


def test_openvino_reads_it(written, model):
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(written[0]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert compiled.input(0).partial_shape.is_dynamic
    for size, batch in SIZES[1:]:
        x = given(size, batch)
        with torch.no_grad():
            assert apart(compiled([x.numpy()])[0], model(x).numpy()) < 2e-5


def test_the_line_for_tensorrt(written, model):
    """Blind spot: names that the graph has not, for which trtexec fails or, worse, does not; a recipe that reads as if it had been run."""
    path, told = written
    head, line = told.splitlines()[-2:]
    assert head == "  TensorRT, which has not been run:"
    options = dict(word.removeprefix("--").partition("=")[::2] for word in shlex.split(line)[1:])
    assert (options["minShapes"], options["maxShapes"]) == ("image:1x3x96x96", "image:4x3x384x384")
    nodes = {node.name: node for node in onnx.load(path).graph.node}
    named = [name.removesuffix(":fp32") for name in options["layerPrecisions"].split(",")]
    kinds = [nodes[name].op_type for name in named]
    assert kinds == ["LayerNormalization"] * sum(isinstance(module, torch.nn.LayerNorm) for module in model.modules()) + ["Conv"]
    assert "head.conv3.weight" in nodes[named[-1]].input
    assert "fp16" in options and options["precisionConstraints"] == "obey"
    assert "has not been run" in (ROOT / "docs" / "export.md").read_text()


def test_pictures_in_and_maps_of_their_size_out(tmp_path, model):
    """Blind spot: processing other than `predict`'s; a graph of the one picture's size that it was traced with."""
    path = tmp_path / "tiny.onnx"
    code, told = called("dpt-tiny-depth", "-o", str(path), "--with-processing", "--size", "192,256")
    assert code == 0 and "takes image: uint8 (batch, height, width, 3), RGB" in told
    assert "the network sees 256x192 pixels (width x height); dpt predict shows it pictures of 640x480 at 256x192, 480x640 at" in told
    run = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run
    for size in ((480, 640), (90, 120), (193, 257)):  # which dpt predict shows at 192x256
        images = np.stack([np.asarray(Image.open(picture).convert("RGB").resize(size[::-1])) for picture in PICTURES[:2]])
        for found, image in zip(run(["depth"], {"image": images})[0], images, strict=True):
            assert apart(found, model.predict(image).depth) < 2e-5


def test_a_program_of_torch_export(tmp_path):
    """Blind spot: a program that only the process that made it can run; sides of the example."""
    path = tmp_path / "scenes.pt2"
    code, told = called("dpt-tiny-scenes", "-o", str(path))
    assert code == 0 and "a program of torch.export" in told and 'load it: torch.export.load("scenes.pt2").module()' in told
    assert "gives logits: logits of the classes" in told
    program, model = torch.export.load(path).module(), dpt.build("dpt-tiny-scenes", weights="pretrained")
    for size, batch in SIZES[1:]:
        x = given(size, batch)
        with torch.no_grad():
            assert apart(program(x).numpy(), model(x).numpy()) < 1e-6


def test_another_map_ends_with_1_and_nothing_written(tmp_path, monkeypatch, capsys):
    def off(graph, path, check):
        path.write_bytes(b"x")
        return [path], "", lambda image: graph.module(image) * 1.1

    monkeypatch.setattr(exporting, "_program", off)
    assert main.main(["export", "dpt-tiny-depth", "-o", str(tmp_path / "a.pt2")]) == 1
    assert re.match(
        r"dpt export: dpt-tiny-depth: depth of 1 of 192x192 differs .* more than 0.001: nothing is written\n", capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["-o", "a.onnx"], "it needs NAME, a model, or --weights FILE"),
        (["dpt-tiny-depth", "-o", "a.pb"], "DST must end in .onnx or .pt2"),
        (["dpt-tiny-depth", "-o", "a.onnx", "--aot"], "--aot makes a .pt2"),
        (["dpt-tiny-depth", "-o", "a.pt2", "--opset", "20"], "--opset is of a .onnx"),
        (["dpt-tiny-depth", "-o", "a.onnx", "--opset", "7"], "'7': it must be a whole number from 18 to 23"),
        (["dpt-tiny-depth", "-o", "a.onnx", "--size", "192"], "'192': it must be two whole numbers from 1, HEIGHT,WIDTH"),
        (["dpt-tiny-depth", "-o", "a.pt2", "--trtexec"], "--trtexec is of a .onnx"),
        (["dpt-tiny-depth", "-o", "a.onnx", "--trtexec", "--with-processing"], "--trtexec is of a graph without --with-processing"),
    ],
)
def test_what_is_asked_for_wrongly(argv, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["export", *argv])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_what_ends_with_2(tmp_path, monkeypatch, capsys):
    """Blind spot: a stack trace where a package is missing, or a size is not the model's."""
    assert main.main(["export", "dpt-tiny-depth", "-o", str(tmp_path / "a.onnx"), "--size", "100,64"]) == 2
    assert "size 100x64 (height x width): both must be multiples of 16" in capsys.readouterr().err
    find = exporting.packages.importlib.util.find_spec
    monkeypatch.setattr(exporting.packages.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    assert main.main(["export", "dpt-tiny-depth", "-o", str(tmp_path / "a.onnx")]) == 2
    assert "onnxruntime must be installed for that: pip install '.[export]'; --no-check does without" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_help_tells_what_the_code_does():
    told = " ".join(main.parser_of("export").format_help().split())
    assert f"(default: {exporting.OPSET}, " in told and f"from {onnx_files.OPSETS[0]} to {onnx_files.OPSETS[-1]}" in told
    assert f"more than {BOUND:g} of its range" in told and f"{onnx_files.INLINE / 1e9:g} GB" in told
    assert checking.BOUND == BOUND and "export" in arguments.export.__name__
