"""From the latents of a model's tokens, which arrive in pieces, to one vector for the model (paper, B.2.2)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..tokens.manifest import LayerSpec, check_choice


POOLINGS = ("mean", "moments", "layers")
MIN_RELATIVE_STD = 1e-6  # below it, what float32 latents differ by is rounding


class LatentPool:
    """Sums over the tokens of one model, in float64: memory does not grow with the number of tokens.

    Args:
        layers: of the model's manifest.
        latent_size: numbers per token.
        pooling: what `embedding` gives. "mean": of all tokens, `[latent_size]`. "moments": mean, standard deviation
            and skewness of each latent number over all tokens, `[3 * latent_size]`. "layers": the mean of each layer,
            `[layers * latent_size]`; comparable between models of one architecture only.

    Raises:
        ValueError: an unknown pooling.
    """

    def __init__(self, layers: Sequence[LayerSpec], latent_size: int, pooling: str = "mean"):
        check_choice("pooling", pooling, POOLINGS)
        self.layers = tuple(layers)
        self.pooling = pooling
        self.sums = torch.zeros(len(layers), latent_size, dtype=torch.float64)
        self.powers = torch.zeros(2, latent_size, dtype=torch.float64)  # sums of squares and of cubes
        self.num_tokens = 0

    def add(self, latents: Tensor, layer_indices: Tensor) -> None:
        """Takes in latents `[tokens, latent_size]` and the layer of each token, int64 `[tokens]`."""
        latents = latents.cpu().double()
        self.sums.index_add_(0, layer_indices, latents)
        self.num_tokens += len(latents)
        if self.pooling == "moments":
            squares = latents.square()
            self.powers[0] += squares.sum(0)
            self.powers[1] += (squares * latents).sum(0)

    def layer_means(self) -> np.ndarray:
        """Float32 `[layers, latent_size]`."""
        counts = torch.tensor([layer.num_tokens for layer in self.layers])
        return (self.sums / counts[:, None]).float().numpy()

    def per_layer(self) -> dict[str, np.ndarray]:
        """Layer name -> its mean, float32 `[latent_size]`."""
        return {layer.name: mean for layer, mean in zip(self.layers, self.layer_means(), strict=True)}

    def embedding(self) -> np.ndarray:
        """Float32 vector of the whole model; see `pooling`."""
        if self.pooling == "layers":
            return self.layer_means().reshape(-1)
        mean = self.sums.sum(0) / self.num_tokens  # [latent_size]
        if self.pooling == "mean":
            return mean.float().numpy()
        square, cube = self.powers / self.num_tokens
        std = (square - mean.square()).clamp_min(0).sqrt()
        third = cube - 3 * mean * square + 2 * mean**3
        varies = std > MIN_RELATIVE_STD * (square.sqrt() + MIN_RELATIVE_STD)
        std = torch.where(varies, std, 0)
        skewness = torch.where(varies, third / torch.where(varies, std, 1) ** 3, 0)
        return torch.cat([mean, std, skewness]).float().numpy()
