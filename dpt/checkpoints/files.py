"""Checkpoint files, folders and their shards: telling what they are, what they hold, and writing ours.

Reading takes the list of tensors only; `Stored.read` fetches one, so what the model does not use (an optimiser's state) is never read.
Nothing of a file is run (`pickles`), and no more memory is taken than the file has bytes.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import reprlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import safetensors.torch
import torch

from ..config import DPTConfig
from ..system.disk import read_object, write_whole
from ..zoo import LAYOUTS, CheckpointError
from .pickles import Global, unpickle
from .stored import Opaque, Storage, Stored, contiguous_stride

WRAPPERS = ("state_dict", "model", "model_state_dict", "ema")
PREFIX = re.compile(r"(?:(?:module|_orig_mod|model)\.)+")  # DistributedDataParallel, torch.compile, Lightning
MODEL_FILE, INPUT_FILE = "config.json", "preprocessor_config.json"  # beside the weights in a folder of transformers
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
}
_MAX_HEADER = 100_000_000  # bytes, of a safetensors file
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # what torch.save began a file with before 1.6


@dataclass(frozen=True)
class Checkpoint:
    """What a file or a folder holds: tensors by their names, not read yet, and whatever else stood in their place.

    `files` are all those that decide what the model is: the one that was read, its shards, and transformers' configurations beside it.
    `name` is what to call the model. `model`: the one of transformers whose tensors these are, where it is no file.
    """

    path: Path
    files: tuple[Path, ...]
    name: str
    state: Mapping[str, Stored | Opaque | torch.Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    model: torch.nn.Module | None = None

    @property
    def folder(self) -> Path:
        return self.files[0].parent


def read(path: str | Path) -> Checkpoint:
    """A checkpoint file, an index of shards, or a folder that holds one of `WEIGHTS`.

    Raises:
        FileNotFoundError: no such file or folder.
        CheckpointError: it is truncated, is something else, or is ambiguous; the message names the file and says why.
    """
    path = Path(path)
    if path.is_dir():
        return _read_file(_weights_of(path), path, path.resolve().name)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    return _read_file(path, path, path.stem)


def joined(parts: Sequence[Checkpoint]) -> Checkpoint:
    """What several files hold together, a backbone and a head, called as the last; CheckpointError for none, or a tensor in two of them."""
    if len(parts) == 1:
        return parts[0]
    path = Path(" and ".join(str(part.path) for part in parts))
    state: dict[str, Stored | Opaque | torch.Tensor] = {}
    if not parts:
        raise CheckpointError("no file to load: at least one is needed")
    for part in parts:
        twice = state.keys() & part.state.keys()
        if twice:
            raise CheckpointError(f"{path}: {min(twice)} is in {part.path} and in another of them")
        state |= part.state
    return Checkpoint(path, tuple(file for part in parts for file in part.files), parts[-1].name, state)


def _weights_of(folder: Path) -> Path:
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        raise CheckpointError(f"{folder}: the folder holds no weights, which are one of {', '.join(WEIGHTS)}")
    return found[0]


def _read_file(file: Path, path: Path, name: str) -> Checkpoint:
    beside = [file.parent / other for other in (MODEL_FILE, INPUT_FILE) if (file.parent / other).is_file()]
    if not file.name.endswith(".index.json"):
        state, metadata = _read_one(file)
        return Checkpoint(path, (file, *beside), name, state, metadata)
    shards = sorted({file.parent / shard for shard in shards_of(file).values()})
    return Checkpoint(path, (file, *shards, *beside), name, _read_shards(file))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError if it is none."""
    try:
        return read_object(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def shards_of(index: Path) -> dict[str, str]:
    """The `weight_map` of an index as transformers writes it: tensor -> file beside the index."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{index}: weight_map must be an object of tensors' names and files, and not empty")
    for key, name in listed.items():
        if type(name) is not str or Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{index}: weight_map[{key!r}]={reprlib.repr(name)}: it must be the name of a file in the same folder")
    return listed


def _read_shards(index: Path) -> dict[str, Stored | Opaque]:
    """The tensors of all shards that an index lists."""
    listed = shards_of(index)
    state: dict[str, Stored | Opaque] = {}
    for name in sorted(set(listed.values())):
        shard = index.parent / name
        if not shard.is_file():
            raise CheckpointError(f"{index}: its shard {name} is not there")
        found, _ = _read_one(shard)
        twice = state.keys() & found.keys()
        if twice:
            raise CheckpointError(f"{index}: {min(twice)} is in {name} and in another shard")
        for key in (key for key, file in listed.items() if file == name):
            if _bare(key) not in found:
                raise CheckpointError(f"{index}: {key} should be in {name}, and is not")
        state |= found
    return state


def _read_one(path: Path) -> tuple[dict[str, Stored | Opaque], dict[str, str]]:
    """The tensors and the metadata of one file, told by its first bytes."""
    with open(path, "rb") as file:
        start = file.read(9)
        file.seek(0)
        if path.suffix == ".safetensors" or _begins_safetensors(start, os.path.getsize(path)):
            kind, parse = "safetensors", _parse_safetensors
        else:
            kind, parse = "PyTorch", _parse_zip if start.startswith(b"PK\x03\x04") else _parse_legacy
        try:
            content, metadata = parse(file, path)
        except Exception as error:  # bytes that are no such file lead their reader to any error there is
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{path}: not a whole {kind} file ({reason[:300]})") from error
    return _without_prefixes(_unwrapped(content, path), path), metadata


def _begins_safetensors(start: bytes, size: int) -> bool:
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8


def _parse_safetensors(file: BinaryIO, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The format of huggingface/safetensors: the length of a JSON header, the header, the tensors' bytes."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(_exactly(file, 8), "little")
    if length > min(size - 8, _MAX_HEADER):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = json.loads(_exactly(file, length), object_pairs_hook=_no_key_twice)
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(type(value) is str for value in metadata.values()):
        raise ValueError("__metadata__ is not text by name")
    content = {key: _in_safetensors(key, entry, path, 8 + length, size) for key, entry in header.items()}
    end = 0
    for begin, next_end in sorted(entry["data_offsets"] for entry in header.values()):
        if begin != end:
            raise ValueError(f"tensors overlap or leave a gap at byte {min(begin, end)}")
        end = next_end
    if 8 + length + end != size:
        raise ValueError(f"{size - 8 - length} bytes of data, where the tensors take {end}")
    return content, metadata


def _in_safetensors(key: str, entry: Any, path: Path, data: int, size: int) -> Stored | Opaque:
    kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if kind not in _SAFETENSORS_DTYPES:
        return Opaque(f"a tensor of dtype {str(kind)[:20]}")
    dtype = _SAFETENSORS_DTYPES[kind]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"{key} has a shape or offsets that are no such thing")
    if end - begin != math.prod(shape) * dtype.itemsize or data + end > size:
        raise ValueError(f"{key} of shape {shape} and dtype {kind} cannot be bytes {begin} to {end} of {size - data}")
    return Stored(Storage(path, dtype, end - begin, data + begin), dtype, 0, shape, contiguous_stride(shape))


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return values


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise ValueError("the file is truncated")
    return data


def _parse_zip(file: BinaryIO, path: Path) -> tuple[Any, dict[str, str]]:
    """torch.save's zip archive: `data.pkl`, and each storage as `data/<key>`, in one folder."""
    with zipfile.ZipFile(file) as archive:
        records = {record.filename: record for record in archive.infolist()}
        if len(records) != len(archive.infolist()):
            raise ValueError("the archive holds a name twice")
        roots = [name.removesuffix("data.pkl") for name in records if re.fullmatch(r"(?:[^/]*/)?data\.pkl", name)]
        if len(roots) != 1:
            raise ValueError(f"a zip archive with {len(roots)} data.pkl, not one")
        root = roots[0]
        if root + "constants.pkl" in records:
            raise ValueError("a TorchScript archive: save the model's state_dict() with torch.save")
        if any(record.compress_type != zipfile.ZIP_STORED for record in records.values()):
            raise ValueError("a compressed archive, which torch.save never makes")
        if root + "byteorder" in records and archive.read(root + "byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        pickled = io.BytesIO(archive.read(root + "data.pkl"))

        def storage(identity: Any) -> Storage | Opaque:
            found = _storage(identity, path)
            if isinstance(found, Storage):
                record = records[f"{root}data/{identity[2]}"]
                found.size, found.position = record.file_size, _position(file, record)
            return found

        return unpickle(pickled, storage), {}


def _position(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    """Where an uncompressed record's bytes begin: behind its local header, whose two last fields are the lengths of name and extra."""
    file.seek(record.header_offset)
    header = _exactly(file, 30)
    begin = record.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if header[:4] != b"PK\x03\x04" or begin + record.file_size > os.fstat(file.fileno()).st_size:
        raise ValueError(f"{record.filename} is not where the archive says")
    return begin


def _storage(identity: Any, path: Path) -> Storage | Opaque:
    """The storage of a persistent id ("storage", type, key, device, count); its size in bytes, as the id claims it."""
    if not (isinstance(identity, tuple) and len(identity) >= 5 and identity[0] == "storage"):
        return Opaque("an object outside the pickle")
    kind, key, count = identity[1], identity[2], identity[4]
    if not (isinstance(kind, Global) and kind.name in _STORAGE_DTYPES and type(key) is str and type(count) is int and count >= 0):
        return Opaque(f"a storage of type {kind}" if isinstance(kind, Global) else "a storage of no type")
    dtype = _STORAGE_DTYPES[kind.name]
    return Storage(path, dtype, count * dtype.itemsize)


def _parse_legacy(file: BinaryIO, path: Path) -> tuple[Any, dict[str, str]]:
    """torch.save's format before 1.6: five pickles (magic number, protocol, system, content, keys), and each key's storage in order."""
    storages: dict[str, Storage] = {}

    def storage(identity: Any) -> Storage | Opaque:
        found = _storage(identity, path)
        if isinstance(found, Storage):
            if len(identity) > 5 and identity[5] is not None:
                return Opaque("a view of a storage, as PyTorch wrote before 0.4")
            found = storages.setdefault(identity[2], found)
        return found

    def no_storage(identity: Any) -> Opaque:
        return Opaque("an object outside the pickle")

    if unpickle(file, no_storage) != _LEGACY_MAGIC:
        raise ValueError("a pickle that torch.save did not write")
    if unpickle(file, no_storage) != _LEGACY_PROTOCOL:
        raise ValueError("another protocol than 1001")
    system = unpickle(file, no_storage)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise ValueError("its numbers are big-endian")
    content = unpickle(file, storage)
    size = os.fstat(file.fileno()).st_size
    for key in unpickle(file, no_storage):
        count = int.from_bytes(_exactly(file, 8), "little")  # of elements
        found = storages.get(key) if type(key) is str else None
        if found is None:
            raise ValueError("a storage whose type is not known, or that no tensor has")
        found.position, found.size = file.tell(), count * found.dtype.itemsize
        if found.position + found.size > size:
            raise ValueError("the file is truncated")
        file.seek(found.size, os.SEEK_CUR)
    return content, {}


def _unwrapped(content: Any, path: Path) -> Mapping[Any, Any]:
    """The state dict inside what training code wraps around it, at most twice; CheckpointError if it is none, or could be two."""
    for _ in range(2):
        found = [name for name in WRAPPERS if isinstance(content, Mapping) and _holds_tensors(content.get(name))]
        if len(found) > 1:
            names = " and ".join(map(repr, found))
            raise CheckpointError(f"{path}: holds {names}, each of them a state dict: save the one that is meant in a file of its own")
        if found:
            content = content[found[0]]
    if not isinstance(content, Mapping):
        what = content.what if isinstance(content, Opaque) else f"a {type(content).__name__}"
        raise CheckpointError(f"{path}: holds {what}, not a state dict of tensors")
    if not any(isinstance(value, Stored) for value in content.values()):
        names = ", ".join(str(key)[:40] for key in list(content)[:5]) or "nothing"
        raise CheckpointError(f"{path}: holds no state dict of tensors, only {names}; wrappers that are known are {', '.join(WRAPPERS)}")
    return content


def _holds_tensors(value: Any) -> bool:
    """Whether a value is a state dict, or wraps one."""
    if not isinstance(value, Mapping):
        return False
    inner = [value, *(value[name] for name in WRAPPERS if isinstance(value.get(name), Mapping))]
    return any(isinstance(item, Stored) for mapping in inner for item in mapping.values())


def _bare(key: str) -> str:
    """A tensor's name without what wrapped models put before it."""
    prefix = PREFIX.match(key)
    return key[prefix.end() :] if prefix else key


def _without_prefixes(content: Mapping[Any, Any], path: Path) -> dict[str, Stored | Opaque]:
    state: dict[str, Stored | Opaque] = {}
    origin: dict[str, str] = {}
    for key, value in content.items():
        if type(key) is not str:
            raise CheckpointError(f"{path}: its state dict has the key {key!r}, which must be a name")
        name = _bare(key)
        if name in state:
            raise CheckpointError(f"{path}: {origin[name]} and {key} are both {name} without their prefixes")
        state[name] = value if isinstance(value, Stored | Opaque) else Opaque(f"a {type(value).__name__}")
        origin[name] = key
    return _without_own_prefix(state)


def _without_own_prefix(state: dict[str, Stored | Opaque]) -> dict[str, Stored | Opaque]:
    """The state without what all names begin with up to the first dot, if it is of a known layout only so: training code calls its model
    what it likes."""
    bare = {key.partition(".")[2]: value for key, value in state.items()}
    alike = len({key.partition(".")[0] for key in state}) == 1 and len(bare) == len(state)
    known = alike and not any(layout.is_of(state) for layout in LAYOUTS) and any(layout.is_of(bare) for layout in LAYOUTS)
    return bare if known else state


class Configured(Protocol):
    """A module of PyTorch's that knows what it is."""

    config: DPTConfig

    def state_dict(self) -> dict[str, torch.Tensor]: ...


def save(model: Configured, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a model of ours as safetensors with its configuration, whole or not at all, with the mode that new files have.

    Args:
        dtype: floating-point tensors are stored in it; None keeps the model's own.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: models are saved as .safetensors")
    state = {
        key: value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()
        for key, value in model.state_dict().items()
    }
    save_state(state, path, model.config)


def save_state(state: Mapping[str, torch.Tensor], path: Path, config: DPTConfig | None = None) -> None:
    """Write tensors as safetensors, with the configuration of ours that they are of, whole or not at all; folders are made."""
    metadata = {"format": "pt"} if config is None else {"format": "pt", "dpt": json.dumps(asdict(config))}
    path.parent.mkdir(parents=True, exist_ok=True)
    content = safetensors.torch.save(dict(state), metadata=metadata)
    write_whole(path, lambda file: file.write(content))
