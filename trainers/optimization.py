"""The optimizer, and its learning rate as a pure function of the step, so that a resumed run cannot drift."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_wsl.backbone.stack import WSLLayer

from .muon import MuonWithAdamW
from .pretraining.pretrain_config import PretrainConfig


_START_DIVISOR, _FINAL_DIVISOR = 25.0, 1e4  # of torch's OneCycleLR, the paper's scheduler
_MOMENTUM_DIP = 0.10


def parameter_groups(
    model: nn.Module, weight_decay: float, without: Sequence[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """The trainable parameters, with weight decay on matrices and kernels only: norms and biases gain nothing.

    Args:
        without: parameters to leave out.
    """
    excluded = {id(parameter) for parameter in without}
    trainable = [p for p in model.parameters() if p.requires_grad and id(p) not in excluded]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: PreTrainedModel, config: PretrainConfig) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters, by `config.optimizer`.

    AdamW with weight decay on matrices only, fused where torch has the kernel; with "muon" the matrices of the blocks
    are Muon's.
    """
    matrices = block_matrices(model) if config.optimizer == "muon" else []
    adamw = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay, without=matrices),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=model.device.type in ("cpu", "cuda", "xpu"),
    )
    if config.optimizer == "adamw":
        return adamw
    muon = torch.optim.Muon(
        matrices,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        momentum=config.muon_momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return MuonWithAdamW(muon, adamw)


def block_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trainable matrices of the transformer's blocks: what Muon is for. Projections in and out are not."""
    blocks = [module for module in model.modules() if isinstance(module, WSLLayer)]
    return [p for block in blocks for p in block.parameters() if p.ndim == 2 and p.requires_grad]


def one_cycle(
    step: int, total_steps: int, *, learning_rate: float, beta1: float, warmup_fraction: float
) -> tuple[float, float]:
    """Learning rate and beta1 of a step, equal to `torch.optim.lr_scheduler.OneCycleLR` (cosine, cycled momentum).

    The rate rises from a 25th to its peak, then falls to a 10 000th of its start; beta1 moves the other way by 0.1.

    Args:
        step: 0-based index of the optimizer step.
        total_steps: steps of the whole run; past it the last values hold.
    """
    start = learning_rate / _START_DIVISOR
    low = max(beta1 - _MOMENTUM_DIP, 0.0)
    peak = warmup_fraction * total_steps - 1
    last = total_steps - 1
    if step <= peak:
        share = step / peak if peak > 0 else 1.0
        return _cosine(start, learning_rate, share), _cosine(beta1, low, share)
    share = min((step - peak) / (last - peak), 1.0) if last > peak else 1.0
    return _cosine(learning_rate, start / _FINAL_DIVISOR, share), _cosine(low, beta1, share)


def constant(
    step: int, total_steps: int, *, learning_rate: float, beta1: float, warmup_fraction: float
) -> tuple[float, float]:
    """Linear warm-up over `warmup_fraction` of the steps, then level; beta1 stays. Arguments of `one_cycle`."""
    return learning_rate * min((step + 1) / max(warmup_fraction * total_steps, 1.0), 1.0), beta1


SCHEDULES = {"onecycle": one_cycle, "constant": constant}


def set_step(optimizer: torch.optim.Optimizer, learning_rate: float, beta1: float) -> None:
    """Writes the learning rate of the coming step into every parameter group, and beta1 into AdamW's."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        if "betas" in group:
            group["betas"] = (beta1, group["betas"][1])


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * share))
