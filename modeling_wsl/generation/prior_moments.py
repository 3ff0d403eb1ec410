"""The sums that a latent prior is fitted from, gathered in a stream, and what follows from them."""

import torch
from torch import Tensor

from ..tokens.kinds import FEATURES


# Of all kinds together, what a kind's own evidence is mixed with.
PRIOR_LAYERS = 4.0
PRIOR_TOKENS = 200.0
MAX_LAYERS = 512  # of a kind, that are kept for their effects


class LayerMoments:
    """Of the tokens of one layer and kind; a row is a token's features and latents side by side."""

    def __init__(self) -> None:
        self.count = 0
        self.sum: Tensor | float = 0.0
        self.second: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        """Takes in tokens `[n, features + latents]` float64."""
        self.count += len(rows)
        self.sum = self.sum + rows.sum(0)
        self.second = self.second + rows.T @ rows


class KindMoments:
    """Of a kind of tensor: between layers (each counts once, by its mean) and within them; and some of the layers."""

    def __init__(self) -> None:
        self.tokens = self.layers = 0
        self.between: Tensor | float = 0.0
        self.within: Tensor | float = 0.0
        self.within_mean: Tensor | float = 0.0
        self.kept: list[tuple[Tensor, int]] = []  # mean, tokens
        self._every = 1

    def add(self, layer: LayerMoments) -> None:
        """Takes in a layer, when all its tokens have been added."""
        mean = layer.sum / layer.count
        within = layer.second - layer.count * torch.outer(mean, mean)
        if self.layers % self._every == 0:
            self.kept.append((mean, layer.count))
            if len(self.kept) > MAX_LAYERS:  # every second one, from here on too: they stay spread over all
                self.kept, self._every = self.kept[::2], 2 * self._every
        self.tokens += layer.count
        self.layers += 1
        self.between = self.between + torch.outer(mean, mean)
        self.within = self.within + within
        self.within_mean = self.within_mean + within / layer.count


def solve(kinds: list[KindMoments]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tensors of `LatentPrior`, in its order, of the moments of every kind."""
    fitted = [moments for moments in kinds if moments.tokens]
    width = len(FEATURES)
    common = _regress(sum(moments.between + moments.within_mean for moments in fitted), width, None)
    coefficients, sums, degrees = [], [], []
    for moments in kinds:
        own = common
        sums.append(torch.zeros(common.shape[1], common.shape[1]).double())
        degrees.append(moments.tokens - moments.layers)
        if moments.tokens:
            own = _regress(moments.between + moments.within_mean, width, common)
            contrast = torch.cat([-own, torch.eye(own.shape[1]).double()])  # residual = row @ contrast
            sums[-1] = contrast.T @ moments.within @ contrast
        coefficients.append(own)
    shared = sum(sums) / max(sum(degrees), 1)
    covariances = [
        (own + PRIOR_TOKENS * shared) / (count + PRIOR_TOKENS) for own, count in zip(sums, degrees, strict=True)
    ]
    kept = [(mean, kind, count) for kind, moments in enumerate(kinds) for mean, count in moments.kept]
    means, layer_kinds, layer_tokens = zip(*kept, strict=True)
    return (
        torch.stack(coefficients).float(),
        torch.stack([_factor(covariance) for covariance in covariances]),
        torch.stack(means).float(),
        torch.tensor(layer_kinds),
        torch.tensor(layer_tokens),
    )


def _regress(second: Tensor, width: int, towards: Tensor | None) -> Tensor:
    """Ridge regression `[features, latents]` of the latents on the features, towards other coefficients."""
    penalty = 1e-3 if towards is None else PRIOR_LAYERS
    left = second[:width, :width] + penalty * torch.eye(width).double()
    right = second[:width, width:] + (0 if towards is None else penalty * towards)
    return torch.linalg.solve(left, right)


def _factor(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return (vectors * values.clamp_min(0).sqrt()).float()
