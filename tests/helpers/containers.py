"""The containers that checkpoints come in, for the tests of reading them."""

from pathlib import Path

import torch
from safetensors.torch import save_file


def save_zip(content, path):
    torch.save(content, path)


def save_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_protocol(protocol, zipped):
    return lambda content, path: torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)


WRITERS = {
    "zip": save_zip,
    "legacy": save_legacy,
    "safetensors": lambda content, path: save_file({key: value.contiguous() for key, value in content.items()}, path),
}


def path_for(folder: Path, writer: str) -> Path:
    return folder / ("file.safetensors" if writer == "safetensors" else "file.pth")


def equal(loaded: torch.nn.Module, model: torch.nn.Module) -> bool:
    return all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
