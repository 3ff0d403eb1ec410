"""The contents of weight files and of state dicts in memory, before their tensors are put into order."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..tokens.manifest import TensorSpec
from .containers.safetensors_files import SafetensorsFile
from .containers.torch_files import load_torch_file
from .errors import CheckpointError, read_json
from .folders import INDEX_SUFFIX, find_shard, parse_index, refuse_json
from .formats import identify
from .state_dicts import find_state_dict, split_aliases


@dataclass
class Contents:
    """The contents of files or of an object, before their tensors are put into order.

    Attributes:
        specs: every name, tied ones too, in the order found.
        read: name of a stored tensor -> its data.
        owners: alias -> the name under which `read` has it.
        metadata: `__metadata__` of safetensors files.
        in_state_dict_order: the order found is the state dict's.
        nested: the state dict was found inside a larger checkpoint.
        stored_as: name of a stored tensor -> how the file stores it, where that is not the tensor itself
            ("gptq, 4 bits, groups of 128"). `specs` and `read` have the dequantized tensor.
        constants: stored tensors that the architecture computes (causal masks, rotary tables): not weights.
        ignored: what the file holds beside the weights and was not read, one line each.
        close: lets go of mapped files.
    """

    specs: dict[str, TensorSpec]
    read: Callable[[str], torch.Tensor]
    owners: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    in_state_dict_order: bool = True
    nested: bool = False
    stored_as: dict[str, str] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)
    ignored: list[str] = field(default_factory=list)
    close: Callable[[], None] = lambda: None

    @property
    def listed(self) -> list[str]:
        """The names that the file itself lists; aliases in the metadata of a safetensors file are not."""
        return [name for name in self.specs if self.in_state_dict_order or name not in self.owners]


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
        constants=set().union(*(part.constants for part in parts.values())),
        ignored=[line for part in parts.values() for line in part.ignored],
        close=close,
    )
