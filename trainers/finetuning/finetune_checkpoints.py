"""Checkpoints of a fine-tuning run: model, optimizer and history, whole or not at all; no pickles.

`checkpoint-<step>/` holds model.safetensors, optimizer.safetensors and run_state.json. Randomness needs no state:
every draw is seeded by the step.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from hf_wsl.files import write_json

from ..checkpointing import (
    OPTIMIZER_FILE,
    STATE_FILE,
    CheckpointStateError,
    new_checkpoint,
    optimizer_tensors,
    read_state,
)


MODEL_FILE = "model.safetensors"


def save_finetuning(
    output_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Writes `checkpoint-<step>` under another name, renames it, and deletes the older ones."""
    with new_checkpoint(output_dir, step, keep=1) as partial:
        save_model(model, str(partial / MODEL_FILE))
        save_file(optimizer_tensors(model, optimizer), partial / OPTIMIZER_FILE)
        write_json(partial / STATE_FILE, state)


def load_finetuning(checkpoint: Path, run: dict[str, Any]) -> dict[str, Any]:
    """The state that was saved, once it is sure that it belongs to this run.

    Args:
        run: what decides the result of a run; compared with what the state says under "run".

    Raises:
        CheckpointStateError: the checkpoint is damaged, or of another run.
    """
    state = read_state(checkpoint)
    found = state.get("run", {})
    changed = [f"{key} was {found.get(key)}, now {value}" for key, value in run.items() if found.get(key) != value]
    if changed:
        raise CheckpointStateError(
            f"{checkpoint} is of another run ({'; '.join(changed)}). Choose another output_dir, or delete this one"
        )
    return state


def restore(checkpoint: Path, model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    """Puts weights, buffers and AdamW's moments back, bit for bit and in the memory layout that they had.

    Raises:
        CheckpointStateError: they do not fit the model.
    """
    try:
        load_model(model, checkpoint / MODEL_FILE)
        moments = load_file(checkpoint / OPTIMIZER_FILE)
    except (RuntimeError, OSError) as error:
        raise CheckpointStateError(f"{checkpoint} does not fit the model or is damaged: {error}") from error
    for name, parameter in model.named_parameters():
        if f"{name}.step" not in moments:  # it has had no gradient so far
            continue
        optimizer.state[parameter] = {"step": moments[f"{name}.step"].to(parameter.device)}
        for moment in ("exp_avg", "exp_avg_sq"):
            value = torch.empty_like(parameter, requires_grad=False)
            optimizer.state[parameter][moment] = value.copy_(moments[f"{name}.{moment}"])


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a state dict's names and values."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
