"""Checkpoints of a run: written whole or not at all, loadable by `from_pretrained`, enough to resume bit for bit.

`checkpoint-<step>/` holds config.json and model.safetensors (float32), preprocessor_config.json, optimizer.safetensors
and trainer_state.json. No pickles. Randomness needs no state: every draw is seeded by the step.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import FeatureExtractionMixin, PreTrainedModel
from transformers.utils import logging as hf_logging

from hf_wsl.files import write_json

from .distribution import as_part_of, whole


OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "trainer_state.json"
# What an optimizer keeps of a parameter.
_ADAMW_STATE, _MUON_STATE = ("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",)
_PARTIAL, _OUTDATED = ".partial-", ".outdated-"
_FOLDER = re.compile(r"checkpoint-(\d+)")


class CheckpointStateError(ValueError):
    """A checkpoint that cannot be resumed from; the message names the folder and the remedy."""


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest step first."""
    folder = Path(output_dir)
    found = (
        [p for p in folder.iterdir() if _FOLDER.fullmatch(p.name) and (p / STATE_FILE).is_file()]
        if folder.is_dir()
        else []
    )
    return sorted(found, key=checkpoint_step)


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return next(reversed(list_checkpoints(output_dir)), None)


def checkpoint_step(folder: Path) -> int:
    return int(_FOLDER.fullmatch(folder.name)[1])


def save_checkpoint(
    output_dir: str | Path,
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor] | None,
    moments: dict[str, torch.Tensor],
    feature_extractor: FeatureExtractionMixin,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Writes `checkpoint-<state["step"]>` through a temporary folder, then deletes all but the `keep` newest.

    Args:
        weights: see `save_model`.
        moments: see `optimizer_tensors`.
        state: JSON content of trainer_state.json; must hold "step".
        keep: complete checkpoints that stay, the one just written among them in any case.

    Returns:
        The folder.
    """
    output_dir = Path(output_dir)
    final = output_dir / f"checkpoint-{state['step']}"
    partial = output_dir / f"{_PARTIAL}{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_model(partial, model, feature_extractor, weights)
    save_file(moments, partial / OPTIMIZER_FILE)
    write_json(partial / STATE_FILE, state)
    publish_folder(partial, final)
    for old in list_checkpoints(output_dir)[:-keep]:
        if old != final:
            shutil.rmtree(old)
    return final


def save_model(
    folder: Path,
    model: PreTrainedModel,
    feature_extractor: FeatureExtractionMixin,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes what `from_pretrained` reads, quietly (a bar per file would cut through the run's own).

    Args:
        weights: of a model that lies in parts on several processes; None: the model's own.
    """
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, state_dict=weights)
    finally:
        if shown:
            hf_logging.enable_progress_bar()
    feature_extractor.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", weights)  # safetensors writes files that nobody else may read


def publish_folder(partial: Path, final: Path) -> None:
    """Renames a finished folder into place; one of that name is moved aside first and deleted after."""
    for file in partial.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())  # a rename must not survive a power cut that its content does not
    outdated = final.with_name(f"{_OUTDATED}{final.name}")
    shutil.rmtree(outdated, ignore_errors=True)
    if final.exists():
        final.rename(outdated)
    partial.rename(final)
    shutil.rmtree(outdated, ignore_errors=True)


def remove_leftovers(output_dir: Path) -> None:
    """Deletes what a process that was killed while saving left behind."""
    for pattern in (f"{_PARTIAL}*", f"{_OUTDATED}*"):
        for folder in output_dir.glob(pattern):
            shutil.rmtree(folder)
    for file in output_dir.glob(".*.tmp"):
        file.unlink()


def publish_files(partial: Path, final: Path) -> None:
    """Moves every file of a finished folder into an existing one, config.json last, and deletes the emptied folder."""
    for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, final / file.name)
    partial.rmdir()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """trainer_state.json of a checkpoint. Raises CheckpointStateError where it is missing or no JSON."""
    path = checkpoint / STATE_FILE
    if not path.is_file():
        raise CheckpointStateError(
            f"{checkpoint}: no {STATE_FILE}, so there is nothing to resume from. Give a folder checkpoint-<step>; to "
            "start from a model's weights alone use --model_name_or_path"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointStateError(f"{path}: damaged ({error}). Resume from an earlier checkpoint") from error


def load_optimizer(checkpoint: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Restores the optimizer's state by parameter name.

    Raises:
        CheckpointStateError: a parameter's state is missing, misshapen, or another optimizer's.
    """
    path = checkpoint / OPTIMIZER_FILE
    names = _parameter_states(model, optimizer)
    state: dict[int, dict[str, torch.Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        stored = set(file.keys())
        for index, (name, parameter, kept) in enumerate(names):
            if f"{name}.{kept[0]}" not in stored:
                raise CheckpointStateError(
                    f"{path}: no state for parameter '{name}' ('{kept[0]}'). The model or the option 'optimizer' has "
                    "changed since it was saved"
                )
            moments = {moment: file.get_tensor(f"{name}.{moment}") for moment in kept}
            shape = moments[kept[-1]].shape
            if shape != parameter.shape:
                raise CheckpointStateError(f"{path}: '{name}' is {list(shape)}, the model has {list(parameter.shape)}")
            state[index] = {
                moment: as_part_of(tensor, parameter) if tensor.shape == parameter.shape else tensor
                for moment, tensor in moments.items()
            }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def optimizer_tensors(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, keep: bool = True
) -> dict[str, torch.Tensor]:
    """The optimizer's state by parameter name, whole and on the CPU.

    Args:
        keep: false for the processes that only help to put moments together which lie in parts; they get {}.
    """
    tensors = {}
    for name, parameter, kept in _parameter_states(model, optimizer):
        for moment in kept if parameter in optimizer.state else ():
            tensor = whole(optimizer.state[parameter][moment].detach())
            if keep:
                tensors[f"{name}.{moment}"] = tensor.cpu().contiguous()
    return tensors


def _parameter_states(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> list[tuple[str, torch.nn.Parameter, tuple[str, ...]]]:
    """The optimizer's parameters, in its order: name in the model, parameter, names of what is kept of it."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        (names[id(p)], p, _ADAMW_STATE if "betas" in group else _MUON_STATE)
        for group in optimizer.param_groups
        for p in group["params"]
    ]
