"""torch's SGD with momentum, Adam and AdamW on the stacked parameters of many models, each with its own settings."""

import torch
from torch import Tensor


MOMENTUM, BETAS, EPSILON = 0.9, (0.9, 0.999), 1e-8  # torch's defaults


class StackedOptimizer:
    """Updates M models at once.

    Args:
        kind: "sgd", "adam" or "adamw", as torch defines them.
        parameters: `[M, P]`, updated in place.
        learning_rates, weight_decays: `[M, 1]`.
    """

    def __init__(self, kind: str, parameters: Tensor, learning_rates: Tensor, weight_decays: Tensor) -> None:
        self.kind, self.parameters = kind, parameters
        self.rates, self.decays = learning_rates, weight_decays
        self.first, self.second = torch.zeros_like(parameters), torch.zeros_like(parameters)
        self.steps = 0

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """One step along the gradient `[M, P]`."""
        self.steps += 1
        if self.kind == "adamw":
            self.parameters.mul_(1 - self.rates * self.decays)
        else:
            gradient = gradient + self.decays * self.parameters
        if self.kind == "sgd":
            self.first.mul_(MOMENTUM).add_(gradient)
            self.parameters.sub_(self.rates * self.first)
            return
        self.first.lerp_(gradient, 1 - BETAS[0])
        self.second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        corrections = [1 - beta**self.steps for beta in BETAS]
        scale = self.second.sqrt().div_(corrections[1] ** 0.5).add_(EPSILON)
        self.parameters.sub_(self.rates / corrections[0] * self.first / scale)
