"""Sums over optimizer steps that stay on the device, and the share of a step that each of its passes holds."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from accelerate import Accelerator

from modeling_wsl import WSLConfig
from modeling_wsl.backbone.losses import loss_scale


NAMES = ("loss_reconstruction", "loss_contrastive", "r2")
_NEVER = 2**31 - 1


def counted_weights(config: WSLConfig, inputs: dict[str, Any]) -> torch.Tensor:
    """The weights of a pass that the reconstruction loss averages over, a float64 scalar.

    Passes weighted by their share of a step's counted weights add up to the mean over the whole step, however it is
    split over passes and processes. That leaves only what a pass computes over its own windows: sigma with
    loss_normalization="batch", and the negatives of NT-Xent.
    """
    batch = (inputs["tokens"], inputs["token_mask"], inputs["positions"])
    _, counted = loss_scale(*batch, config.loss_normalization, config.loss_mask_padding)
    return counted.sum(dtype=torch.float64)


class StepSums:
    """Losses, R2 and token counts since the last `take`, and the first step whose loss was not finite."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._first_bad_step = torch.tensor(_NEVER, device=accelerator.device)
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(len(NAMES), device=self.accelerator.device)
        self._tokens = 0
        self._pause = 0.0
        self._started = time.monotonic()

    def add(self, step: int, loss: torch.Tensor, parts: torch.Tensor, tokens: int) -> None:
        """Adds a pass's values, as this process's part of the step.

        Args:
            step: number of the step, from 1.
            loss: scalar.
            parts: float32 `[3]` in the order of `NAMES`.
            tokens: tokens that hold weights.
        """
        self._sums += parts
        # Which step went wrong is remembered on the device: asking each step would make the GPU wait for Python.
        bad = torch.where(loss.isfinite(), _NEVER, step)
        self._first_bad_step = torch.minimum(self._first_bad_step, bad)
        self._tokens += tokens

    def pause(self, seconds: float) -> None:
        """Leaves time spent on something else (an evaluation, a checkpoint) out of the tokens per second."""
        self._pause += seconds

    def first_bad_step(self) -> int | None:
        """The first step whose loss was not finite, on any process (every one must call it), or None."""
        first_bad = int(self.accelerator.gather(self._first_bad_step.reshape(1)).min())
        return None if first_bad == _NEVER else first_bad

    def take(self, steps: int) -> tuple[dict[str, float | None], int]:
        """Means over so many steps since the last call, over all processes (every one must call it); starts anew.

        Returns:
            The means by name (None where not finite: JSON has no NaN) with "tokens_per_s"; tokens seen.
        """
        tokens = torch.tensor([float(self._tokens)], device=self.accelerator.device)
        *sums, tokens = self.accelerator.reduce(torch.cat([self._sums, tokens]), "sum").tolist()
        means = {name: total / max(steps, 1) for name, total in zip(NAMES, sums, strict=True)}
        values = {name: mean if math.isfinite(mean) else None for name, mean in means.items()}
        values["tokens_per_s"] = tokens / max(time.monotonic() - self._started - self._pause, 1e-9)
        self._reset()
        return values, round(tokens)
