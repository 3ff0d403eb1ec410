"""Mean and deviation of each layer over a zoo, from one pass over every model: float64, window by window, mergeable.

Each model has a mapping layer name -> [count, mean, sum of squared deviations]; those of the training models, merged,
give what layer-wise normalization works with (`modeling_wsl/tokens/layer_normalization.py`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from transformers.feature_extraction_utils import BatchFeature


Moments = Mapping[str, Sequence[float]]
# Deviations below what float32 resolves at the mean are rounding: such a layer is constant.
RESOLUTION = torch.finfo(torch.float32).eps


def window_moments(window: BatchFeature) -> dict[str, list[float]]:
    """The moments of the layers in a window of `WSLFeatureExtractor.stream`, padding left out."""
    mask, layers = window["token_mask"], window["manifest"].layers
    values = window["tokens"].double()  # [T, d_t], the padding 0
    index, layer = torch.unique(window["positions"][:, 1], return_inverse=True)
    zeros = torch.zeros(len(index), dtype=torch.float64)
    count = zeros.index_add(0, layer, mask.sum(1).double())
    mean = zeros.index_add(0, layer, values.sum(1)) / count
    deviations = (values - mean[layer, None]).square_().mul_(mask).sum(1)
    table = torch.stack([count, mean, zeros.index_add(0, layer, deviations)], dim=1).tolist()
    return {layers[i].name: row for i, row in zip(index.tolist(), table, strict=True)}


def merge_moments(parts: Iterable[Moments]) -> dict[str, list[float]]:
    """The moments of all parts together (Chan et al., 1983), layers in order of first appearance."""
    merged: dict[str, list[float]] = {}
    for part in parts:
        for name, (count, mean, squares) in part.items():
            before, its_mean, its_squares = merged.get(name, (0.0, 0.0, 0.0))
            total, step = before + count, mean - its_mean
            squares += its_squares + step * step * before * count / total
            merged[name] = [total, its_mean + step * count / total, squares]
    return merged


def layer_statistics(moments: Moments) -> dict[str, list[float]]:
    """Layer name -> [mean, standard deviation]; a layer that is constant over the zoo has 1 for its deviation."""
    statistics = {}
    for name, (count, mean, squares) in moments.items():
        std = math.sqrt(squares / count)
        statistics[name] = [mean, std if std > RESOLUTION * abs(mean) else 1.0]
    return statistics
