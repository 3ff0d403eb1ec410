"""Distillation: a target learns the outputs of its donor on unlabeled images (Hinton et al. 2015)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..batch_norm import model_inputs
from ..ranking import logits_of
from .fit import num_examples, select_examples


BATCH = 64
LEARNING_RATE = 1e-3
TEMPERATURE = 2.0
WARM_UP = 0.1  # of the steps


def distill(
    module: nn.Module, donor: nn.Module, inputs: Any, donor_inputs: Any, epochs: int, seed: int
) -> dict[str, Any]:
    """Trains a module towards its donor's outputs (AdamW, one cycle), in place.

    Args:
        module, donor: both give logits of one shape.
        inputs, donor_inputs: the same examples as each of them takes them.
        epochs: passes over the examples.
        seed: of their order.

    Returns:
        "epochs", "steps", "loss" of the last epoch.

    Raises:
        ValueError: the outputs differ in shape.
    """
    total = num_examples(inputs)
    steps = -(-total // BATCH) * epochs
    optimizer = torch.optim.AdamW(module.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, max(steps, 2), pct_start=WARM_UP)
    generator = torch.Generator().manual_seed(seed)
    mean = 0.0
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of dropout
        for _ in range(epochs):
            module.train()
            losses = []
            for chosen in torch.randperm(total, generator=generator).split(BATCH):
                if len(chosen) < 2:
                    continue  # a batch norm takes no batch of one
                with torch.no_grad():
                    wanted = _logits(donor, donor_inputs, chosen)
                given = _logits(module, inputs, chosen)
                if given.shape != wanted.shape:
                    raise ValueError(
                        f"distill_epochs: the target gives outputs of shape {list(given.shape)}, the donor "
                        f"{list(wanted.shape)}. Distillation needs the donor's classes: leave it out."
                    )
                loss = functional.kl_div(
                    (given / TEMPERATURE).log_softmax(-1), (wanted / TEMPERATURE).softmax(-1), reduction="batchmean"
                )
                optimizer.zero_grad()
                (loss * TEMPERATURE**2).backward()
                nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                losses.append(float(loss.detach()))
            mean = sum(losses) / max(len(losses), 1)
    module.eval()
    return {"epochs": epochs, "steps": steps, "loss": mean}


def _logits(module: nn.Module, inputs: Any, chosen: torch.Tensor) -> torch.Tensor:
    arguments, keywords = model_inputs(select_examples(inputs, chosen), torch.device("cpu"))
    return logits_of(module(*arguments, **keywords))
