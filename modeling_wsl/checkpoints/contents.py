"""The contents of weight files and of state dicts in memory, before their tensors are put into order."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..tokens.manifest import TensorSpec
from .containers.axes import axes_by_format, unknown_axes
from .containers.container import Contents, StoredArray, array_contents
from .containers.gguf_files import gguf_contents
from .containers.hdf5_files import hdf5_contents, keras_contents
from .containers.msgpack_files import msgpack_contents
from .containers.numpy_files import npy_contents, npz_contents
from .containers.onnx_files import onnx_contents
from .containers.safetensors_files import SafetensorsFile
from .containers.tensorflow_files import tensorflow_contents
from .containers.torch_files import load_torch_file
from .errors import CheckpointError, read_json, shorten
from .file_names import is_index
from .folders import find_shard, parse_index, refuse_json
from .formats import identify
from .parts.joining import parts_contents
from .parts.layouts import MEGATRON_FILES, MEGATRON_FOLDER
from .parts.ranks import megatron_contents, refuse_other_ranks
from .state_dicts import find_state_dict, list_beside, list_state_dicts, split_aliases


class Framework(NamedTuple):
    """Another framework's kind of file: its name for messages, and its reader."""

    name: str
    read: Callable[[Path, str | None], Contents]


# By the kind that `identify` names.
FRAMEWORKS = {
    "flax": Framework("MessagePack of Flax", msgpack_contents),
    "gguf": Framework("GGUF", gguf_contents),
    "hdf5": Framework("HDF5", hdf5_contents),
    "keras": Framework("an archive of Keras", keras_contents),
    "npy": Framework("an array of NumPy", npy_contents),
    "npz": Framework("an archive of NumPy", npz_contents),
    "onnx": Framework("ONNX", onnx_contents),
    "tensorflow": Framework("a table of TensorFlow", tensorflow_contents),
}


def memory_contents(name: str, content: Mapping[str, Any], key: str | None) -> Contents:
    """Contents of a state dict, or of a training checkpoint already in memory (or unpickled from a file)."""
    path, tensors = find_state_dict(name, content, key)
    _, owners = split_aliases(tensors)
    specs = {name: TensorSpec.of(name, tensor) for name, tensor in tensors.items()}
    ignored = list_beside(content, path)
    return Contents(specs, tensors.__getitem__, owners, nested=bool(path), ignored=ignored)


def file_keys(path: Path) -> list[str]:
    """The keys of the state dicts of a file, as `file_contents` takes them; none where no key is needed.

    Raises:
        CheckpointError: the file cannot be read safely.
    """
    if path.is_dir() or (kind := identify(path)) not in ("torch archive", "torch legacy", "pickle"):
        return []
    keys = list_state_dicts(load_torch_file(path, kind))
    return keys if len(keys) > 1 else []


def file_contents(path: Path, key: str | None) -> Contents:
    """Contents of a weight file, of the shards of an index, or of a folder of parts."""
    if path.is_dir():
        return parts_contents(path, key)
    kind = identify(path)
    if path.name in MEGATRON_FILES and MEGATRON_FOLDER.fullmatch(path.parent.name) and kind != "safetensors":
        return megatron_contents(path.parent.parent, [path], partial(load_torch_file, kind=kind))
    if kind in ("torch archive", "torch legacy", "pickle"):
        content = load_torch_file(path, kind)
        refuse_other_ranks(path, content)
        contents = memory_contents(str(path), content, key)
        return written_elsewhere(path, contents, "paddle") if path.suffix.lower() == ".pdparams" else contents
    if kind in FRAMEWORKS:
        return framework_contents(path, kind, key)
    if key is not None:
        reason = f"is a {kind} file: it has no state dict under the key {shorten(key)}"
        raise CheckpointError(path, reason, f"Leave #{key} out")
    if kind == "safetensors":
        file = SafetensorsFile(path)
        owners = saved_aliases(file.header.metadata, file.header.tensors)
        specs = file.header.tensors | {
            alias: replace(file.header.tensors[owner], name=alias) for alias, owner in owners.items()
        }
        told = {"metadata": file.header.metadata, "in_state_dict_order": False}
        contents = Contents(specs, file.read, owners, close=file.close, **told)
        return written_elsewhere(path, contents, file.header.metadata.get("format", ""))
    content = read_json(path, "the file")
    if not is_index(path.name) and not (isinstance(content, dict) and "weight_map" in content):
        refuse_json(path, content)
    return sharded_contents(path, content)


def framework_contents(path: Path, kind: str, key: str | None) -> Contents:
    """Contents of a file of another framework; whatever its library makes of a damaged file is a `CheckpointError`."""

    @contextmanager
    def telling(what: str) -> Iterator[None]:
        try:
            yield
        except (CheckpointError, MemoryError):
            raise
        except Exception as error:  # their parsers fail in many ways, some of C
            reason = f"{what} cannot be read as {FRAMEWORKS[kind].name} ({type(error).__name__}: {shorten(error)})"
            raise CheckpointError(path, reason, "The file is damaged or forged; fetch or write it again") from error

    with telling("the file"):
        contents = FRAMEWORKS[kind].read(path, key)

    def read(name: str) -> torch.Tensor:
        with telling(shorten(name)):
            return contents.read(name)

    return replace(contents, read=read)


def written_elsewhere(path: Path, contents: Contents, written_by: str) -> Contents:
    """Contents of a file of a common format that "flax", "tf", "mlx" or "paddle" wrote, as `[out, in, ...]`."""
    stored = {name: spec for name, spec in contents.specs.items() if name not in contents.owners}
    axes, unknown = axes_by_format(written_by, {name: spec.shape for name, spec in stored.items()})
    statistics = {name for name in stored if written_by == "paddle" and name.endswith(("._mean", "._variance"))}
    told = {"ignored": contents.ignored + unknown_axes(unknown), "constants": contents.constants | statistics}
    if axes:
        arrays = {n: StoredArray(spec.shape, spec.dtype, partial(contents.read, n)) for n, spec in stored.items()}
        turned = array_contents(path, arrays, axes)
        owner = contents.owners
        specs = {name: replace(turned.specs[owner.get(name, name)], name=name) for name in contents.specs}
        told |= {"specs": specs, "read": turned.read, "layouts": turned.layouts}
    return replace(contents, **told)


def saved_aliases(metadata: Mapping[str, str], tensors: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Tied names that `safetensors.torch.save_model` left out: it notes alias -> kept name in the metadata."""
    return {alias: kept for alias, kept in metadata.items() if alias not in tensors and kept in tensors}


def sharded_contents(path: Path, content: Any) -> Contents:
    """Contents of the shards that an index lists, checked to agree with it."""
    index = parse_index(path, content)
    paths = {shard: find_shard(path, shard) for shard in index.shards}  # a missing one is told before any is read
    parts = {}
    for shard, place in paths.items():
        if identify(place) == "json":
            raise CheckpointError(place, "is JSON, not a shard with weights", "Fetch it again")
        parts[shard] = file_contents(place, key=None)
        index.check_shard(shard, parts[shard].listed)
    specs = {name: spec for part in parts.values() for name, spec in part.specs.items()}
    owners = {alias: owner for part in parts.values() for alias, owner in part.owners.items()}
    place_of = {name: part for part in parts.values() for name in part.specs}

    def close() -> None:
        for part in parts.values():
            part.close()

    return Contents(
        specs,
        lambda name: place_of[name].read(name),
        owners,
        metadata={name: value for part in parts.values() for name, value in part.metadata.items()},
        in_state_dict_order=all(part.in_state_dict_order for part in parts.values()),
        stored_as={name: how for part in parts.values() for name, how in part.stored_as.items()},
        layouts={name: axes for part in parts.values() for name, axes in part.layouts.items()},
        constants=set().union(*(part.constants for part in parts.values())),
        ignored=[line for part in parts.values() for line in part.ignored],
        close=close,
    )
