"""OneCycle as a schedule that is a pure function of the step, and Muon with AdamW, for `create_scheduler` and
`create_optimizer` of the trainers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from modeling_wsl.backbone.stack import WSLLayer


_START_DIVISOR, _FINAL_DIVISOR = 25.0, 1e4  # of torch's OneCycleLR, the paper's scheduler
_MOMENTUM_DIP = 0.10


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


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * share))


class OneCycle(LRScheduler):
    """`one_cycle` over an optimizer's groups: the learning rate of all, beta1 of those that have betas.

    torch's own OneCycleLR keeps values from step to step, so a resumed run would need its state, and it refuses an
    optimizer of which only a part has betas.

    Args:
        optimizer: its groups' learning rate and first beta are the peak and the start.
        total_steps: of the run.
        warmup_fraction: share of the steps in which the rate rises.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, total_steps: int, warmup_fraction: float) -> None:
        self.total_steps, self.warmup_fraction = total_steps, warmup_fraction
        self._beta1 = [group["betas"][0] if "betas" in group else 0.0 for group in optimizer.param_groups]
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        rates = []
        for group, rate, beta1 in zip(self.optimizer.param_groups, self.base_lrs, self._beta1, strict=True):
            options = {"learning_rate": rate, "beta1": beta1, "warmup_fraction": self.warmup_fraction}
            now, momentum = one_cycle(self.last_epoch, self.total_steps, **options)
            if "betas" in group:
                group["betas"] = (momentum, group["betas"][1])
            rates.append(now)
        return rates


def schedule_state(scheduler: LRScheduler) -> dict[str, Any]:
    """What `move_to_step` needs beside the step: nothing of a schedule that is a function of the step alone."""
    if isinstance(scheduler, LambdaLR | OneCycle):
        return {}
    numbers = int | float | str | list | None
    return {name: value for name, value in scheduler.state_dict().items() if isinstance(value, numbers)}


def move_to_step(scheduler: LRScheduler, step: int, saved: dict[str, Any]) -> None:
    """Puts a fresh schedule where one that made `step` steps stood.

    Args:
        saved: its `schedule_state`. Schedules that are functions of the step follow the options of now, so that a
            resumed run may change its learning rate.
    """
    if not isinstance(scheduler, LambdaLR | OneCycle):
        scheduler.load_state_dict(saved)
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        return
    scheduler.last_epoch = step - 1
    scheduler.optimizer._opt_called = True  # else torch warns of a schedule that runs before its optimizer
    scheduler.step()


def muon_with_adamw(
    model: nn.Module, learning_rate: float, weight_decay: float, momentum: float, **adamw: Any
) -> MuonWithAdamW:
    """Muon over the matrices of the transformer's blocks, AdamW over everything else that is trained.

    Args:
        adamw: of `torch.optim.AdamW`: betas, eps.
    """
    matrices = block_matrices(model)
    return MuonWithAdamW(
        torch.optim.Muon(
            matrices, lr=learning_rate, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            parameter_groups(model, weight_decay, without=matrices), lr=learning_rate, fused=True, **adamw
        ),
    )


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


def block_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trainable matrices of the transformer's blocks: what Muon is for. Projections in and out are not."""
    blocks = [module for module in model.modules() if isinstance(module, WSLLayer)]
    return [p for block in blocks for p in block.parameters() if p.ndim == 2 and p.requires_grad]


class MuonWithAdamW(torch.optim.Optimizer):
    """Steps `torch.optim.Muon` and `torch.optim.AdamW` together; parameter groups and state are one.

    Muon orthogonalizes the momentum of a matrix by a few matmuls in bfloat16. Its steps are scaled to the size of
    AdamW's ("match_rms_adamw", arXiv 2502.16982), so one learning rate and one weight decay serve both.

    Args:
        muon: over the matrices, made with `adjust_lr_fn="match_rms_adamw"`.
        adamw: over the rest.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self._parts = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], defaults={})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both; `closure` recomputes the loss, as in every optimizer of torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, groups in zip(self._parts, self._groups_of_parts(), strict=True):
            # Bound anew each time: `load_state_dict` puts new groups and a new state in the place of the old ones.
            part.param_groups, part.state = groups, self.state
            part.step()
        return loss

    def _groups_of_parts(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The groups of Muon and of AdamW, which alone has two betas."""
        groups = self.param_groups
        return [g for g in groups if "betas" not in g], [g for g in groups if "betas" in g]
