"""Folders whose files are parts of one model, and the layout that they have."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from ..file_names import is_weight_name, part_of


Layout = Literal["dcp", "universal", "zero", "megatron", "ranks"]
DCP_METADATA = ".metadata"
DCP_SUFFIX = ".distcp"
DCP_FOLDER = re.compile(r"(pytorch_model_fsdp|model)(_\d+)?")  # where accelerate and others put it
ZERO_FILE = re.compile(
    r"(\w*zero_pp_rank_\d+_)?mp_rank_\d+_(model|optim)_states\.pt|layer_\d+-model_\d+-model_states\.pt"
)
MEGATRON_FOLDER = re.compile(r"mp_rank_(?P<tensor>\d+)(_(?P<pipeline>\d+))?(_\d+)?")
MEGATRON_FILES = ("model_optim_rng.pt", "model_rng.pt", "model_optim_rng.safetensors")
STEP_FOLDER = re.compile(r"(global_step|iter_)\d+(_universal)?|release")
RANK_FOLDER = re.compile(r"(mp|tp)_rank_\d+(_(pp_rank_)?\d+)*")  # NeMo's and Megatron's, one a rank
UNIVERSAL = "zero"  # in a universal checkpoint of DeepSpeed: a folder a parameter, and in it `fp32.pt`
JOIN = "Join the parts with the tool that wrote them, and pass what it writes"
MAX_NAME = 200  # of a folder that `latest` names


def layout_of(folder: Path, names: Iterable[str]) -> Layout | None:
    """The layout of the parts that lie directly in a folder; None where there are none."""
    names = list(names)
    if DCP_METADATA in names and any(name.endswith(DCP_SUFFIX) for name in names):
        return "dcp"
    if any(ZERO_FILE.fullmatch(name) for name in names):
        return "universal" if UNIVERSAL + "/" in names and universal_files(folder) else "zero"
    if megatron_files(folder, names):
        return "megatron"
    weights = [name for name in names if is_weight_name(name)]
    parts = [part_of(name, names) for name in weights]
    return "ranks" if parts and None not in parts and len({part.group for part in parts}) == 1 else None


def part_names(names: Iterable[str]) -> list[str]:
    """Those of the files of a folder that are parts of its model; none where it has no layout of parts."""
    names = list(names)
    belongs = {
        "dcp": lambda name: name == DCP_METADATA or name.endswith(DCP_SUFFIX),
        "zero": ZERO_FILE.fullmatch,
        "ranks": is_weight_name,
    }.get(layout_of(Path(), names))
    return [name for name in names if belongs(name)] if belongs else []


def universal_files(folder: Path) -> dict[str, Path]:
    """The files of a universal checkpoint by parameter."""
    inside = sorted((folder / UNIVERSAL).iterdir()) if (folder / UNIVERSAL).is_dir() else []
    return {path.name: path / "fp32.pt" for path in inside if (path / "fp32.pt").is_file()}


def megatron_files(folder: Path, names: Iterable[str]) -> list[Path]:
    """The files of Megatron's ranks, `mp_rank_00/model_optim_rng.pt` and so on, in order of ranks."""
    ranks = sorted(name[:-1] for name in names if name.endswith("/") and MEGATRON_FOLDER.fullmatch(name[:-1]))
    return [folder / rank / file for rank in ranks for file in MEGATRON_FILES if (folder / rank / file).is_file()]


def find_parts(folder: Path, names: Iterable[str]) -> Path | None:
    """The folder that holds the parts of the model of `folder`: itself, or the one that it points to."""
    names = list(names)
    if layout_of(folder, names):
        return folder
    if any(is_weight_name(name) for name in names):
        return None
    if latest := latest_step(folder):
        return latest
    for inner in parts_folders(folder, names):
        inside = folder / inner
        if inside.is_dir() and layout_of(inside, list_files(inside)):
            return inside
    return None


def parts_folders(folder: Path, names: Iterable[str]) -> list[str]:
    """Names of the folders that hold parts of the model of `folder`, not a model of their own; the newest first.

    Where several steps lie side by side each is a checkpoint of its own, and there are none.
    """
    names = list(names)
    folders = [name[:-1] for name in names if name.endswith("/")]
    steps = [name for name in folders if STEP_FOLDER.fullmatch(name)]
    inner = [name for name in folders if DCP_FOLDER.fullmatch(name) and (folder / name / DCP_METADATA).is_file()]
    ranks = [name for name in folders if MEGATRON_FOLDER.fullmatch(name)]
    ranks += [UNIVERSAL] if UNIVERSAL in folders and layout_of(folder, names) == "universal" else []
    return (steps if len(steps) == 1 else []) + (inner if len(inner) == 1 else []) + ranks


def latest_step(folder: Path) -> Path | None:
    """The folder of a step that DeepSpeed's `latest` or Megatron's counter names."""
    for name, pattern in (
        ("latest_universal", "{}"),
        ("latest", "{}"),
        ("latest_checkpointed_iteration.txt", "iter_{:0>7}"),
    ):
        path = folder / name
        if path.is_file() and path.stat().st_size <= MAX_NAME:
            said = path.read_text(encoding="utf-8", errors="replace").strip()
            step = said if said == "release" else pattern.format(said)
            if STEP_FOLDER.fullmatch(step) and (folder / step).is_dir():
                return folder / step
    return None


def list_files(folder: Path) -> list[str]:
    """File names directly in a folder, sorted; folders end in a slash."""
    return sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(folder))
