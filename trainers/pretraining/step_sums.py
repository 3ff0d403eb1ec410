"""Sums over optimizer steps that stay on the device: Python asks for them once per line of metrics, not each step."""

from __future__ import annotations

import math
import time

import torch
from accelerate import Accelerator


NAMES = ("loss", "loss_reconstruction", "loss_contrastive", "r2")
_NEVER = 2**31 - 1


class StepSums:
    """Losses, R2 and token counts since the last `take`, and the first step whose loss was not finite."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(len(NAMES), device=self.accelerator.device)
        self._first_bad_step = torch.tensor(_NEVER, device=self.accelerator.device)
        self._tokens = 0
        self._pause = 0.0
        self._started = time.monotonic()
        self.steps = 0

    def add(self, step: int, parts: torch.Tensor, tokens: int) -> None:
        """Adds a step's values, this process's part of them.

        Args:
            step: number of the step, from 1.
            parts: float32 `[4]` in the order of `NAMES`.
            tokens: tokens that hold weights.
        """
        self._sums += parts
        # Which step went wrong is remembered on the device: asking each step would make the GPU wait for Python.
        bad = torch.where(parts[0].isfinite(), _NEVER, step)
        self._first_bad_step = torch.minimum(self._first_bad_step, bad)
        self._tokens += tokens
        self.steps += 1

    def pause(self, seconds: float) -> None:
        """Leaves time spent on something else (an evaluation, a checkpoint) out of the tokens per second."""
        self._pause += seconds

    def take(self) -> tuple[dict[str, float | None], int, int | None]:
        """Means since the last call, over all processes (every one must call it), and starts anew.

        Returns:
            The means by name (None where not finite: JSON has no NaN) with "tokens_per_s"; tokens seen; the first step
            whose loss was not finite, or None.
        """
        tokens = torch.tensor([float(self._tokens)], device=self.accelerator.device)
        *sums, tokens = self.accelerator.reduce(torch.cat([self._sums, tokens]), "sum").tolist()
        first_bad = int(self.accelerator.gather(self._first_bad_step.reshape(1)).min())
        means = {name: total / self.steps for name, total in zip(NAMES, sums, strict=True)}
        values = {name: mean if math.isfinite(mean) else None for name, mean in means.items()}
        values["tokens_per_s"] = tokens / max(time.monotonic() - self._started - self._pause, 1e-9)
        self._reset()
        return values, round(tokens), None if first_bad == _NEVER else first_bad
