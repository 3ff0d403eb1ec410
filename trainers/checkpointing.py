"""Checkpoints of a run: written whole or not at all, loadable by `from_pretrained`, enough to resume bit for bit.

`checkpoint-<step>/` holds the model (float32) as its library saves it, optimizer.safetensors, trainer_state.json of
transformers and run_state.json of ours. No pickles. Randomness needs no state: every draw is seeded by the step.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model
from safetensors.torch import save_model as save_module
from torch import nn
from transformers import FeatureExtractionMixin, PreTrainedModel
from transformers.utils import logging as hf_logging

from hf_wsl.files import remove_folder, replacing_folder

from .distribution import as_part_of, whole


OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "run_state.json"
_NUMBER = "#"  # behind the name of a state that is a number, not a tensor
_FOLDER = re.compile(r"checkpoint-(\d+)")


class CheckpointStateError(ValueError):
    """A checkpoint that cannot be resumed from; the message names the folder and the remedy."""


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest step first."""
    folder = Path(output_dir)
    paths = folder.iterdir() if folder.is_dir() else ()
    complete = [path for path in paths if _FOLDER.fullmatch(path.name) and (path / STATE_FILE).is_file()]
    return sorted(complete, key=checkpoint_step)


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return next(reversed(list_checkpoints(output_dir)), None)


def checkpoint_step(folder: Path) -> int:
    return int(_FOLDER.fullmatch(folder.name)[1])


@contextmanager
def new_checkpoint(output_dir: str | Path, step: int, keep: int | None) -> Iterator[Path]:
    """Gives a temporary folder to fill; it becomes `checkpoint-<step>`, and all but the `keep` newest are deleted.

    Args:
        keep: complete checkpoints that stay, the one just written among them in any case; None: all.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    with replacing_folder(final, flush=True) as partial:  # a rename must not survive a power cut without its content
        yield partial
    for old in list_checkpoints(output_dir)[:-keep] if keep else ():
        if old != final:
            remove_folder(old)


def save_model(
    folder: Path,
    model: nn.Module,
    processing: FeatureExtractionMixin | None = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes what `from_pretrained` reads, quietly (a bar per file would cut through the run's own); of a model that
    is none of transformers', `model.safetensors` alone.

    Args:
        processing: feature extractor or tokenizer, saved beside it.
        weights: of a model that lies in parts on several processes; None: the model's own.
    """
    if not isinstance(model, PreTrainedModel):
        save_module(model, str(folder / "model.safetensors"))
        return
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, state_dict=weights)
    finally:
        if shown:
            hf_logging.enable_progress_bar()
    if processing is not None:
        processing.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", file)  # safetensors writes files that nobody else may read


@contextmanager
def finished_model(folder: Path) -> Iterator[Path]:
    """An empty folder for the files of a finished model; at the end they move into `folder`, config.json last.

    After an error nothing is moved. What a killed process left is deleted by the next one.
    """
    partial = folder / ".partial-model"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, folder / file.name)
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


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Puts the weights and buffers of a checkpoint back into a whole model, bit for bit.

    Raises:
        CheckpointStateError: they do not fit the model, or a file is damaged.
    """
    files = sorted(checkpoint.glob("model*.safetensors"))
    try:
        if len(files) == 1:
            load_model(model, files[0])  # knows which names share a tensor
            return
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        model.load_state_dict(tensors)
    except (RuntimeError, OSError, SafetensorError) as error:
        raise CheckpointStateError(f"{checkpoint} does not fit the model or is damaged: {error}") from error


def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores the optimizer's state by parameter name, in the memory layout of the parameters.

    Raises:
        CheckpointStateError: a parameter's state is missing or misshapen, or the file is damaged.
    """
    path = checkpoint / OPTIMIZER_FILE
    stored: dict[str, dict[str, torch.Tensor]] = {}
    try:
        for key, tensor in load_file(path).items():
            name, _, kept = key.rpartition(".")
            stored.setdefault(name, {})[kept] = tensor
    except (OSError, SafetensorError) as error:
        raise CheckpointStateError(f"{path} cannot be read: {error}. Resume from an earlier checkpoint") from error
    state: dict[int, dict[str, torch.Tensor | float]] = {}
    for index, (name, parameter) in enumerate(_named_parameters(model, optimizer)):
        for kept, tensor in stored.get(name, {}).items():
            if tensor.ndim and tensor.shape != parameter.shape:
                shapes = f"'{name}' is {list(tensor.shape)}, the model has {list(parameter.shape)}"
                raise CheckpointStateError(f"{path}: {shapes}. The model has changed since it was saved")
            value = as_part_of(tensor, parameter) if tensor.ndim else tensor
            if kept.endswith(_NUMBER):
                kept, value = kept.removesuffix(_NUMBER), tensor.item()
            state.setdefault(index, {})[kept] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool = True
) -> dict[str, torch.Tensor]:
    """The optimizer's state by parameter name, whole and on the CPU.

    Args:
        keep: false for the processes that only help to put moments together which lie in parts; they get {}.
    """
    tensors = {}
    for name, parameter in _named_parameters(model, optimizer):
        for kept, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, int | float):
                value, kept = torch.tensor(value, dtype=torch.float64), f"{kept}{_NUMBER}"
            tensor = whole(value.detach())
            if keep:
                tensors[f"{name}.{kept}"] = tensor.cpu().contiguous()
    return tensors


def _named_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.nn.Parameter]]:
    """The optimizer's parameters, in its order, each after its name in the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [(names[id(p)], p) for group in optimizer.param_groups for p in group["params"]]
