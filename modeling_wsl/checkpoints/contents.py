"""The contents of weight files and of state dicts in memory, before their tensors are put into order."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..tokens.manifest import TensorSpec
from .containers.container import Contents
from .containers.safetensors_files import SafetensorsFile
from .containers.torch_files import load_torch_file
from .errors import CheckpointError, read_json
from .folders import INDEX_SUFFIX, find_shard, parse_index, refuse_json
from .formats import identify
from .state_dicts import find_state_dict, split_aliases


def memory_contents(name: str, content: Mapping[str, Any], key: str | None) -> Contents:
    """Contents of a state dict, or of a training checkpoint already in memory (or unpickled from a file)."""
    found_at, tensors = find_state_dict(name, content, key)
    _, owners = split_aliases(tensors)
    specs = {name: TensorSpec.of(name, tensor) for name, tensor in tensors.items()}
    return Contents(specs, tensors.__getitem__, owners, nested=bool(found_at))


def file_contents(path: Path, key: str | None) -> Contents:
    """Contents of a weight file, or of the shards of an index."""
    kind = identify(path)
    if kind in ("torch archive", "torch legacy"):
        return memory_contents(str(path), load_torch_file(path, kind), key)
    if key is not None:
        raise CheckpointError(path, f"is a {kind} file: it has no nested state dict for key={key!r}", "Leave key= out")
    if kind == "safetensors":
        file = SafetensorsFile(path)
        owners = saved_aliases(file.header.metadata, file.header.tensors)
        specs = file.header.tensors | {
            alias: TensorSpec(alias, file.header.tensors[owner].shape, file.header.tensors[owner].dtype)
            for alias, owner in owners.items()
        }
        return Contents(specs, file.read, owners, file.header.metadata, in_state_dict_order=False, close=file.close)
    content = read_json(path, "the file")
    if not path.name.endswith(INDEX_SUFFIX) and not (isinstance(content, dict) and "weight_map" in content):
        refuse_json(path, content)
    return sharded_contents(path, content)


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
