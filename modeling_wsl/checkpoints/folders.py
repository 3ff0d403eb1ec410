"""Folders of weights: which file is the one to read, and shards that agree with their index."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import CheckpointError, NoWeightsError, read_json, shorten
from .formats import (
    CONVERT,
    FOREIGN_SUFFIXES,
    FRAMEWORK_WEIGHTS,
    READABLE,
    SAFETENSORS_SUFFIXES,
    SUFFIXES,
    TORCH_SUFFIXES,
)


# In the order in which transformers, timm and PEFT look for them; safetensors first.
WEIGHT_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
ADAPTER_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
# What trainers leave beside the weights.
NOT_WEIGHTS = ("training_args.bin", "optimizer.", "optimizer_", "scheduler.", "scaler.", "rng_state", "random_states")
INDEX_SUFFIX = ".index.json"


def choose_weights(source: object, names: Iterable[str]) -> str:
    """The one weight file (or index of shards) among the file names of a folder.

    Raises:
        NoWeightsError: there is none; what is there is listed, and named if its format is known.
        CheckpointError: there are several.
    """
    names = sorted(names)
    adapters = [name for name in ADAPTER_NAMES if name in names]
    standard = [name for name in WEIGHT_NAMES if name in names]
    if adapters and standard:
        reason = f"holds a model ({standard[0]}) and an adapter ({adapters[0]})"
        raise CheckpointError(source, reason, "Pass the path of the file that is meant")
    if adapters or standard:
        return (adapters or standard)[0]
    weights = [name for name in names if not name.startswith(NOT_WEIGHTS)]
    for suffixes in (SAFETENSORS_SUFFIXES, TORCH_SUFFIXES, FRAMEWORK_WEIGHTS):
        indices = [n for n in weights if n.endswith(tuple(suffix + INDEX_SUFFIX for suffix in suffixes))]
        files = [n for n in weights if n.lower().endswith(suffixes)]
        shards = [n for n in files if "-of-0" in n]
        if len(indices) == 1:
            return indices[0]
        if shards and not indices:
            reason = f"holds shards ({shorten(shards[0], 60)}, {len(shards)} in all) without their index"
            raise CheckpointError(source, reason, f"Fetch the {INDEX_SUFFIX} file that belongs to them")
        if len(indices or files) > 1:
            listed = ", ".join((indices or files)[:8])
            reason = f"holds {len(indices or files)} weight files: {listed}"
            raise CheckpointError(source, reason, "Pass the path of the one that is meant")
        if files:
            return files[0]
    listed = ", ".join(names[:12]) or "nothing"
    if len(names) > 12:
        listed += f" and {len(names) - 12} more"
    foreign = [name for name in names if PurePosixPath(name).suffix.lower() in FOREIGN_SUFFIXES]
    advice = READABLE
    if foreign:
        what, fix = SUFFIXES[PurePosixPath(foreign[0]).suffix.lower()]
        advice = f"{foreign[0]} {what}. {fix}"
    raise NoWeightsError(source, f"holds no weights that can be read; there is {listed}", advice)


@dataclass(frozen=True)
class ShardIndex:
    """A checked index: tensor name -> shard file name, in the index's order."""

    path: Path
    weight_map: Mapping[str, str]

    @property
    def shards(self) -> list[str]:
        return sorted(set(self.weight_map.values()))

    def check_shard(self, shard: str, names: Iterable[str]) -> None:
        """Refuses a shard that does not hold exactly the tensors which the index places in it.

        Raises:
            CheckpointError: naming the tensor, the shard that has it and the one that should.
        """
        held = set(names)
        promised = {name for name, place in self.weight_map.items() if place == shard}
        fix = "Shards and index are from different models, or damaged; fetch them again"
        if missing := sorted(promised - held):
            reason = f"the index places tensor {shorten(missing[0])} in {shard}, which does not hold it"
            raise CheckpointError(self.path, reason, fix)
        if extra := sorted(held - promised):
            place = self.weight_map.get(extra[0])
            instead = f"the index places it in {place}" if place else "the index does not list it"
            raise CheckpointError(self.path, f"{shard} holds tensor {shorten(extra[0])}; {instead}", fix)


def parse_index(source: Path, content: Any) -> ShardIndex:
    """Checks a parsed `*.index.json`: a mapping from tensor names to files of the same folder.

    Raises:
        CheckpointError: `weight_map` is missing, empty or of wrong types, or a name leads out of the folder.
    """
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        reason = "has no weight_map from tensor names to shards"
        raise CheckpointError(source, reason, "Pass the folder or the weight file, or write the index again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard:
            reason = f"its weight_map gives {shorten(shard)} as the shard of {shorten(name)}"
            raise CheckpointError(source, reason, "A shard is the name of a file in the same folder")
        check_inside(source, shard)
    return ShardIndex(source, weight_map)


def check_inside(source: object, name: str) -> None:
    """Refuses a file name that leads out of its folder, before anything looks for the file.

    Raises:
        CheckpointError: the name is absolute, has `..`, a drive, a backslash or a NUL.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or any(c in name for c in "\\:\0"):
        reason = f"names the file {shorten(name)}, which is not inside its folder"
        raise CheckpointError(source, reason, "Shards lie beside their index; copy them there and correct the names")


def find_shard(index: Path, name: str) -> Path:
    """The path of a shard beside its index.

    A symbolic link may lead out of the folder only as those of a Hugging Face cache do, from
    `models--x/snapshots/<commit>/` to `models--x/blobs/`.

    Raises:
        CheckpointError: the shard is missing, or a link that leads elsewhere.
    """
    path = index.parent / name
    if not path.exists():
        reason = f"lacks the shard {name}" + (" (a broken link)" if path.is_symlink() else "")
        raise CheckpointError(index, reason, "Fetch or copy it beside the index")
    folder = index.parent.resolve()
    if path.resolve().is_relative_to(folder):
        return path
    # One step only: a blob may itself be a link into a store that several caches share.
    blob = Path(os.path.normpath(path.parent.resolve() / os.readlink(path))) if path.is_symlink() else path.resolve()
    if blob.parent.name == "blobs" and folder.is_relative_to(blob.parent.parent / "snapshots"):
        return path
    reason = f"names the shard {name}, a link out of the folder (to {shorten(blob)})"
    raise CheckpointError(index, reason, "Copy the file beside the index")


def read_config(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """The library whose folder this is ("peft", "timm", "transformers" or None) and its parsed config ({} if none).

    Raises:
        CheckpointError: config.json or adapter_config.json is not a JSON object.
    """
    adapter = folder / "adapter_config.json"
    path = adapter if adapter.is_file() else folder / "config.json"
    if not path.is_file():
        return None, {}
    config = read_json(path, "the config", unique_keys=False)
    if not isinstance(config, dict):
        raise CheckpointError(path, "is not a JSON object", "Fetch or write it again")
    if path == adapter:
        return "peft", config
    if isinstance(config.get("architecture"), str):
        return "timm", config
    return "transformers" if {"model_type", "architectures"} & set(config) else None, config


def list_files(folder: Path) -> list[str]:
    """File names directly in a folder; folders end in a slash."""
    return sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(folder))


def refuse_json(path: Path, content: Any) -> None:
    """Refuses a JSON file that is no index of shards, telling what it is.

    Raises:
        CheckpointError: always.
    """
    first: Sequence = content if isinstance(content, list) else [content]
    groups = content.get("weightsManifest") if isinstance(content, dict) else first
    if isinstance(groups, list) and groups and isinstance(groups[0], dict) and {"paths", "weights"} <= set(groups[0]):
        what = "is a TensorFlow.js manifest, whose weights lie in shards of their own"
        raise CheckpointError(path, what, CONVERT)
    raise CheckpointError(path, "is JSON, not weights", "Pass the folder or the weight file beside it")


def local_subfolder(path: Path, subfolder: str) -> Path:
    """A folder inside a local folder."""
    inside = path / subfolder
    if not inside.is_dir() or not inside.resolve().is_relative_to(path.resolve()):
        raise CheckpointError(path, f"has no folder {shorten(subfolder)} inside", "Correct subfolder=")
    return inside
