"""How far models are from each other in their weights, read in pieces."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from modeling_wsl.checkpoints.checkpoint import Checkpoint
from modeling_wsl.tokens.manifest import batch_norm_names


PIECE_ENTRIES = 1 << 22  # of all models together


@dataclass(frozen=True)
class WeightComparison:
    """Of g models, over the floating-point tensors that all of them have, batch-norm statistics left out.

    Attributes:
        distances: float64 `[g, g]`, Euclidean, of the weights.
        norms: float64 `[g]`, Euclidean, of the weights.
        kurtosis: float64 `[g]`, the mean over matrices of the kurtosis of their entries (3 for a normal distribution).
        tensors, entries: how many are compared.
    """

    distances: np.ndarray
    norms: np.ndarray
    kurtosis: np.ndarray
    tensors: int
    entries: int


def compare_weights(checkpoints: Sequence[Checkpoint]) -> WeightComparison:
    """Compares models pairwise in the memory of some pieces of their tensors.

    Args:
        checkpoints: g open ones.

    Raises:
        ValueError: no tensor is of the same name and shape in all of them.
    """
    names = _shared(checkpoints)
    if not names:
        raise ValueError(f"{checkpoints[0].source} and the models beside it share no tensor. Compare fewer of them.")
    count = len(checkpoints)
    gram, norms = np.zeros((count, count)), np.zeros(count)
    kurtosis, entries = [], 0
    for name in names:
        spec = checkpoints[0].tensors[name]
        flat = [checkpoint.read(name).reshape(-1) for checkpoint in checkpoints]
        moments = np.zeros((4, count))
        for start in range(0, spec.numel, max(1, PIECE_ENTRIES // count)):
            piece = torch.stack([t[start : start + max(1, PIECE_ENTRIES // count)].double() for t in flat]).numpy()
            norms += np.square(piece).sum(1)
            moments += [(piece**power).sum(1) for power in range(1, 5)]
            piece -= piece.mean(0)  # what all have in common would drown the differences in rounding
            gram += piece @ piece.T
        entries += spec.numel
        if len(spec.shape) > 1:
            kurtosis.append(_kurtosis(moments / spec.numel))
    square = np.diag(gram)
    distances = np.sqrt(np.maximum(square[:, None] + square - 2 * gram, 0))
    mean_kurtosis = np.mean(kurtosis, axis=0) if kurtosis else np.zeros(count)
    return WeightComparison(distances, np.sqrt(norms), mean_kurtosis, len(names), entries)


def _shared(checkpoints: Sequence[Checkpoint]) -> list[str]:
    first = checkpoints[0]
    statistics = batch_norm_names(first.tensors)
    return [
        name
        for name, spec in first.tensors.items()
        if spec.torch_dtype.is_floating_point
        and spec.torch_dtype != torch.float4_e2m1fn_x2  # packed: not numbers one by one
        and spec.numel
        and name not in statistics
        and all(
            name in other.tensors
            and other.tensors[name].shape == spec.shape
            and other.tensors[name].torch_dtype.is_floating_point
            for other in checkpoints[1:]
        )
    ]


def _kurtosis(moments: np.ndarray) -> np.ndarray:
    """From the raw moments 1 to 4 `[4, g]`; 0 where all entries are equal."""
    first, second, third, fourth = moments
    variance = second - first**2
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    varies = variance > 1e-12 * second
    return np.divide(central, variance**2, out=np.zeros_like(central), where=varies)
