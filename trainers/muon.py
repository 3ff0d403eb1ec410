"""Muon for the matrices of the transformer's blocks and AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


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
