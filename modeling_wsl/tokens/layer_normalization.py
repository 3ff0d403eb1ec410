"""SANE's layer-wise normalization: the weights of each layer in units of a zoo, and back (Schürholt et al., 2024).

A layer's weights, less the mean of that layer over all models of a zoo, in its standard deviations. `hf-wsl tokenize`
fits both; the feature extractor keeps and applies them. The way back is exact up to rounding, not bit by bit.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from ..checkpoints.errors import NotTokenizableError
from .manifest import WeightManifest


# Layer name -> [mean, standard deviation].
LayerStatistics = Mapping[str, Sequence[float]]


def check_statistics(statistics: LayerStatistics) -> dict[str, list[float]]:
    """The statistics as JSON holds them.

    Raises:
        ValueError: a layer has not got two finite numbers, the second above 0; it is named.
    """
    checked = {name: [float(value) for value in values] for name, values in statistics.items()}
    for name, values in checked.items():
        if len(values) != 2 or not all(map(math.isfinite, values)) or values[1] <= 0:
            raise ValueError(
                f"layer_normalization of layer {name!r} is {values}; give its mean and its standard deviation, above "
                "0, as `hf-wsl tokenize --layer_normalization` writes them."
            )
    return checked


def check_layers(manifest: WeightManifest, statistics: LayerStatistics, source: object) -> None:
    """Raises NotTokenizableError, naming `source`, where a model has layers that the zoo has not."""
    unknown = [layer.name for layer in manifest.layers if layer.name not in statistics]
    if unknown:
        first, known = (
            ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
            for names in (unknown, list(statistics))
        )
        raise NotTokenizableError(
            source,
            f"has layers that the zoo of the layer_normalization has not: {first} (the zoo has {known})",
            "Only models with the zoo's layers can be normalized; for others take a backbone trained without it",
        )


def normalize_layers_(tokens: torch.Tensor, manifest: WeightManifest, statistics: LayerStatistics, start: int) -> None:
    """Normalizes weights in place; the padding stays 0.

    Args:
        tokens: `[T, d_t]` float32 or float64, the tokens from `start` on.
        manifest: of the whole model; all its layers are in `statistics` (see `check_layers`).
    """
    stop = start + len(tokens)
    mean, std = _of_tokens(manifest, statistics, start, stop, tokens)
    tokens.sub_(mean).div_(std).masked_fill_(~manifest.token_mask(start, stop), 0)


def restore_layers(tokens: torch.Tensor, manifest: WeightManifest, statistics: LayerStatistics) -> torch.Tensor:
    """The inverse of `normalize_layers_` on all tokens of a model, in float32 or float64 as the manifest says."""
    wide = tokens.to(manifest.dtype)
    mean, std = _of_tokens(manifest, statistics, 0, manifest.num_tokens, wide)
    return torch.addcmul(mean, wide, std)


def _of_tokens(
    manifest: WeightManifest, statistics: LayerStatistics, start: int, stop: int, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each token's layer, each `[T, 1]`, on the device and in the dtype of `like`."""
    table = torch.tensor([statistics[layer.name] for layer in manifest.layers], dtype=like.dtype)  # [layers, 2]
    layer = manifest.positions(start, stop)[:, 1]
    return table[layer].to(like.device).split(1, dim=1)
