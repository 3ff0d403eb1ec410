"""How much each forward pass of an optimizer step counts, so that the step is one mean over all its weights."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from modeling_wsl import WSLConfig
from modeling_wsl.backbone.losses import loss_scale


def shares_of_passes(
    accelerator: Accelerator, config: WSLConfig, inputs: list[tuple[torch.Tensor | None, ...]]
) -> list[torch.Tensor | float]:
    """The share of a step's counted weights that each of this process's passes holds, over all processes.

    Weighted by them, the passes' means add up to the mean over the whole step. That leaves only what a pass computes
    over its own windows: sigma with loss_normalization="batch", and the negatives of NT-Xent.

    Args:
        inputs: of each pass (tokens, token_mask, positions), on the device.
    """
    if len(inputs) == 1 and accelerator.num_processes == 1:
        return [1.0]
    counted = [
        loss_scale(*batch, config.loss_normalization, config.loss_mask_padding)[1].sum(dtype=torch.float64)
        for batch in inputs
    ]
    counts = torch.stack(counted)
    total = accelerator.reduce(counts.sum(), "sum")
    return list((counts / total.clamp(min=1)).float())
