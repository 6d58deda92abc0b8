"""An encoder and a checkpoint family added by CONTRIBUTING.md, in a copy of the package (an op: tests/kernels/test_adding_an_op.py)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENCODER = '''
"""Patches and their mean, four times: an encoder without attention."""

import torch
from torch import nn


class Averages(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.patch = config.patch_size
        self.embed = nn.Conv2d(3, config.embed_dim, self.patch, stride=self.patch)
        self.scale = nn.Parameter(torch.zeros(4))

    def reset_parameters(self, generator=None):
        nn.init.uniform_(self.scale, 1, 2, generator=generator)

    def grid(self, x):
        return x.shape[2] // self.patch, x.shape[3] // self.patch

    def forward(self, x):
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat((tokens.mean(1, keepdim=True), tokens), 1)
        return [scale * tokens for scale in self.scale]
'''
FAMILY = '''
"""A family whose one model is made up."""

from ..config import HALF, DecoderConfig, DPTConfig, EncoderConfig, HeadConfig, InputConfig
from .layout import Layout

MODELS = (
    DPTConfig(
        name="made-up",
        encoder=EncoderConfig(embed_dim=32, depth=4, num_heads=2, hooks=(0, 1, 2, 3)),
        decoder=DecoderConfig(neck_channels=(8, 8, 8, 8), features=8),
        head=HeadConfig(task="depth"),
        input=InputConfig(mean=HALF, std=HALF, size=(64, 64)),
        source="https://example.org/made-up-00000000.pt",
        licence="CC0",
    ),
)
PARAMETERS = {"made-up": 123}
LAYOUTS = (Layout(name="made up", format="made-up", markers=("theirs.fusion.convs.0.weight",), rows=(("{p}", "theirs.{p}"),)),)
'''


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of dpt/ that may be changed; the kernels and all else are the checkout's."""
    shutil.copytree(ROOT / "dpt", tmp_path / "dpt", ignore=shutil.ignore_patterns("__pycache__", "weights"))
    (tmp_path / "kernels").symlink_to(ROOT / "kernels")
    return tmp_path


def add(package: Path, file: str, text: str, *rows: tuple[str, str, str]) -> None:
    """Write a file of the package, and put each row, (file, old, new), where the page says."""
    (package / "dpt" / file).write_text(text)
    for name, old, new in rows:
        path = package / "dpt" / name
        assert path.read_text().count(old) == 1
        path.write_text(path.read_text().replace(old, new))


def run(package: Path, code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=package, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_encoder_is_one_file_and_its_name(package):
    """Blind spot: a place that takes every encoder for a ViT: initialisation, saving, loading, prediction, the fused decoder."""
    add(
        package,
        "nets/encoders/averages.py",
        ENCODER,
        ("config.py", 'ENCODERS = ("vit", ', 'ENCODERS = ("averages", "vit", '),
        ("nets/encoders/__init__.py", "from .vit import ViT", "from .averages import Averages\nfrom .vit import ViT"),
        ("nets/encoders/__init__.py", '{"vit": ViT, ', '{"averages": Averages, "vit": ViT, '),
    )
    code = """
import numpy as np, torch, dpt
config = dpt.zoo.CONFIGS["dpt-large-midas"].with_("encoder", kind="averages", embed_dim=32, num_heads=2)
config = config.with_("decoder", neck_channels=(8, 8, 8, 8), features=8)
model = dpt.build(config, fast=True)
assert dpt.__file__.startswith({folder!r}) and 1 <= model.encoder.scale.min() and model.encoder.scale.max() <= 2
dpt.save(model, "saved.safetensors")
loaded = dpt.load("saved.safetensors")
x = torch.randn(1, 3, 64, 96)
with torch.inference_mode():
    assert type(loaded.encoder).__name__ == "Averages" and torch.allclose(loaded(x), model(x), rtol=1e-4, atol=1e-5)
assert model.predict(np.zeros((50, 70, 3), np.uint8)).depth.shape == (50, 70)
print(sum(row.fused for row in dpt.fast_report(model)))
"""
    assert int(run(package, code.replace("{folder!r}", repr(str(package))))) >= 5


def test_a_family_is_one_file_and_its_name(package):
    """Blind spot: a list of families beside the registry: of names, of layouts, of what dpt info counts."""
    add(
        package,
        "zoo/made_up.py",
        FAMILY,
        ("zoo/__init__.py", "from . import (\n", "from . import (\n    made_up,\n"),
        ("zoo/__init__.py", "    carried,\n)", "    carried,\n    made_up,\n)"),
    )
    code = """
import torch, dpt
from dpt.commands.main import main
assert "made-up" in dpt.models() and main(["info"]) == 0
model = dpt.build("made-up")
torch.save({f"theirs.{key}": value for key, value in model.state_dict().items()}, "theirs.pt")
loaded = dpt.load("theirs.pt")
main(["convert", "theirs.pt", "ours.safetensors", "--to", "dpt"])
main(["convert", "ours.safetensors", "back.pt", "--to", "made-up"])
assert all(torch.equal(value, torch.load("theirs.pt")[key]) for key, value in torch.load("back.pt").items())
assert loaded.config.name == "made-up" and all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
"""
    line = next(line for line in run(package, code).splitlines() if line.startswith("made-up"))
    assert "0.0 M" in line and "CC0" in line
