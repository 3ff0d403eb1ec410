"""Linear maps of standardized tokens to a latent of a given size: PCA, fitted in a stream, and a random projection."""

from dataclasses import dataclass

import torch

from modeling_wsl.backbone.losses import MIN_STD, token_moments


@dataclass(frozen=True)
class LinearBaseline:
    """The reconstruction `(x - mean) C^T C + mean` of standardized tokens x.

    Attributes:
        components: C, float32 `[r, d_t]` with orthonormal rows.
        mean: float32 `[d_t]`.
    """

    components: torch.Tensor
    mean: torch.Tensor

    def reconstruct(self, standardized: torch.Tensor) -> torch.Tensor:
        """Maps `[tokens, d_t]` to its projection, same shape."""
        return (standardized - self.mean) @ self.components.T @ self.components + self.mean


def standardize(tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Standardizes each token over its valid entries.

    Args:
        tokens: float32 `[tokens, d_t]`.
        mask: bool `[tokens, d_t]`.

    Returns:
        The standardized tokens (zero where masked), mean `[tokens, 1]` and population std `[tokens, 1]`.
    """
    mean, variance, _ = token_moments(tokens, mask)
    std = variance.sqrt()
    return (tokens - mean) * mask / std.clamp(min=MIN_STD), mean, std


class Covariance:
    """Streaming mean and second moment of vectors, float64; products run in float32 over chunks.

    Args:
        size: d, entries of a vector.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.sum = torch.zeros(size, dtype=torch.float64)
        self.second = torch.zeros(size, size, dtype=torch.float64)

    def update(self, vectors: torch.Tensor) -> None:
        """Adds `[n, d]` vectors."""
        self.count += len(vectors)
        self.sum += vectors.sum(0, dtype=torch.float64)
        self.second += (vectors.T @ vectors).double()

    def principal_components(self, rank: int, center: bool = True) -> LinearBaseline:
        """The leading `rank` directions, about the origin where `center` is false. ValueError without vectors."""
        if self.count == 0:
            raise ValueError(
                "PCA needs at least one token whose weights are not all equal; what it was to be fitted on has none"
            )
        mean = self.sum / self.count if center else torch.zeros_like(self.sum)
        covariance = self.second / self.count - torch.outer(mean, mean)
        vectors = torch.linalg.eigh(covariance).eigenvectors  # ascending
        components = vectors[:, -rank:].flip(1).T
        # An eigenvector's sign is the library's choice; fix it so that machines agree.
        components = components * components.gather(1, components.abs().argmax(1, keepdim=True)).sign()
        return LinearBaseline(components.float().contiguous(), mean.float())


def random_projection(rank: int, token_size: int, seed: int) -> LinearBaseline:
    """A random orthonormal basis of `rank` directions, uniform over subspaces."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(token_size, min(rank, token_size), generator=generator, dtype=torch.float64)
    return LinearBaseline(torch.linalg.qr(gaussian).Q.T.float().contiguous(), torch.zeros(token_size))
