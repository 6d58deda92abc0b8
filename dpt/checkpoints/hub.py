"""Files and models from elsewhere: addresses, and models on transformers' hub by name ("Intel/dpt-large"), through huggingface_hub and its
cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..zoo import CheckpointError
from . import downloads
from .files import INPUT_FILE, MODEL_FILE, WEIGHTS, Checkpoint, joined, read, shards_of
from .objects import is_object, read_object

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ADDRESS = re.compile(r"(?:https?|file)://.+")
_HUB_FILE = re.compile(r"https://huggingface\.co/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>[^?]+)(?:\?.*)?")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".json")
Source = str | Path | nn.Module | Sequence[str | Path | nn.Module]


def find(source: Source) -> Checkpoint:
    """`read` of a file or folder here, of a file at an address, of a model on the hub, or of a model object of transformers, or several of
    these `joined`; they, `fetched` and `folder_of` say what they raise. CheckpointError for what is none of these."""
    if is_object(source):
        return read_object(source)
    if isinstance(source, Sequence) and not isinstance(source, str):
        return joined([find(part) for part in source])
    if not isinstance(source, str | Path):
        rule = "a path, an address, the name of a model on the hub, a model of transformers, or a list of these"
        raise CheckpointError(f"a {type(source).__module__}.{type(source).__qualname__}: what is loaded must be {rule}")
    name = str(source)
    if ADDRESS.fullmatch(name):
        return read(fetched(name))
    if Path(source).exists() or not is_name(name):
        return read(source)
    return replace(read(folder_of(name)), path=Path(name), name=name.partition("/")[2])


def fetched(url: str) -> Path:
    """The file of an address: from huggingface_hub's cache for one of the hub, else from torch.hub's; downloaded where it is missing.

    Raises:
        DownloadError: an OSError; with the reason, and the way by hand.
    """
    match = _HUB_FILE.fullmatch(url)
    if match is None:
        return downloads.fetch(url, Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2].partition("?")[0])
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
    except ImportError as error:
        raise ImportError(f"{url}: files on the hub need the package huggingface_hub: pip install huggingface_hub") from error
    repository, file, revision = match["repository"], match["file"], match["revision"]
    cached = try_to_load_from_cache(repository, file, revision=revision)  # nothing is asked of the network then
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except Exception as error:  # the package and its HTTP client raise errors of many families
        advice = "Get it by other means and give its path as the weights (--weights FILE)"
        raise downloads.DownloadError(f"{url} could not be downloaded: {_reason(error)}. {advice}") from error


def is_name(text: str) -> bool:
    """Whether a text that names no file here may name a model: owner/name, and no checkpoint's suffix."""
    return NAME.fullmatch(text) is not None and not text.endswith(_SUFFIXES)


def folder_of(name: str) -> Path:
    """The folder of the cache that holds a model's configuration and weights; what is missing is downloaded, once.

    Raises:
        CheckpointError: the hub or the cache has no such model, or it cannot be reached; names the model, the reason and the way by hand.
    """
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError(f"{name}: models on the hub need the package huggingface_hub: pip install huggingface_hub") from error

    missing: list[EntryNotFoundError] = []

    def fetch(file: str, revision: str) -> Path:
        """A file of the model, from the cache where it is there: nothing is asked of the network then."""
        cached = try_to_load_from_cache(name, file, revision=revision)
        if cached is not None and not isinstance(cached, str):  # the cache knows that the model has none
            raise EntryNotFoundError(f"it has no {file}")
        return Path(cached or hf_hub_download(name, file, revision=revision))

    def fetch_if_there(file: str) -> Path | None:
        try:
            return fetch(file, commit)
        except EntryNotFoundError as error:  # it has none of that name; or none that can be had now
            missing.append(error)
            return None

    try:
        commit = fetch(MODEL_FILE, "main").parent.name  # the cache's folder of a commit: the other files are to be of the same
        fetch_if_there(INPUT_FILE)
        if missing and isinstance(missing[-1], LocalEntryNotFoundError):  # it may well have one, and other means than the default
            raise EntryNotFoundError(f"{INPUT_FILE} is not in the cache and cannot be downloaded now: {_reason(missing[-1])}")
        weights = next((path for file in WEIGHTS if (path := fetch_if_there(file)) is not None), None)
        if weights is None:
            raise next((error for error in missing if isinstance(error, LocalEntryNotFoundError)), missing[-1])
        if weights.name.endswith(".index.json"):
            for shard in sorted(set(shards_of(weights).values())):
                fetch(shard, commit)
    except CheckpointError:
        raise
    except Exception as error:  # the package and its HTTP client raise errors of many families
        raise CheckpointError(
            f"{name}: no such file or folder here, and the hub's model could not be had ({_reason(error)}); by hand: download "
            f"{MODEL_FILE}, {INPUT_FILE} and the weights from https://huggingface.co/{name}/tree/main into a folder, and give that "
            "(--weights FOLDER)"
        ) from error
    return weights.parent


def _reason(error: Exception) -> str:
    """The kind of an error and its first line; of a file that is not in the cache, why the hub could not be asked for it."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the network's error, or that HF_HUB_OFFLINE is set; the other advises to check the connection
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
