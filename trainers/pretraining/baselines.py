"""What a latent of the same size reaches without learning: a random orthogonal projection, and PCA over tokens.

Both see tokens standardized one by one over their weights (zero where padded), and are scored like the backbone. They
are given each token's mean and standard deviation for free, the backbone must spend latent numbers on them. A backbone
whose R2 does not pass these two lines has learned nothing that helps.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from datasets_scripts.embedding.linear_projection import Covariance, LinearBaseline, standardize
from modeling_wsl.backbone.losses import MIN_STD, R2Accumulator
from modeling_wsl.tokens.manifest import mask_from_valid_entries

from ..data.windows.crops import tiles
from ..data.windows.training_batches import TrainingBatches
from ..data.windows.window_data import WindowDataset


_CHUNK = 8192  # tokens in memory at once


def fit_pca(
    dataset: WindowDataset | TrainingBatches, rank: int, max_tokens: int, *, affine: bool = True
) -> LinearBaseline:
    """PCA over the training tokens, each standardized.

    Args:
        dataset: whose `sample` gives the tokens.
        rank: latent size r; at most d_t directions exist.
        max_tokens: tokens to fit on, about.
        affine: false divides tokens by their std without centring them and fits about the origin. Such a map commutes
            with the scale of a token, so it also holds for tokens that are not standardized (`linear_path` without
            `token_standardization`).
    """
    covariance = Covariance(dataset.token_size)
    for tokens, mask in _chunks(dataset.sample(max_tokens)):
        standardized, _, std = standardize(tokens, mask)
        vectors = standardized if affine else tokens * mask / std.clamp(min=MIN_STD)
        covariance.update(vectors[(std > MIN_STD).squeeze(-1)])  # a token of equal entries has no direction
    return covariance.principal_components(min(rank, dataset.token_size), center=affine)


def evaluate(baselines: dict[str, LinearBaseline], dataset: WindowDataset, max_windows: int = 0) -> dict[str, float]:
    """R2 of each baseline over the same tokens that the backbone is evaluated on."""
    scores = {name: R2Accumulator() for name in baselines}
    for crop in tiles(dataset.num_tokens, _CHUNK, max_windows):
        tokens, valid = (part[crop.start : crop.start + crop.length] for part in dataset.window(crop.window))
        tokens, mask = _as_tensors(tokens, valid)
        standardized, mean, std = standardize(tokens, mask)
        for name, baseline in baselines.items():
            scores[name].update(baseline.reconstruct(standardized) * std + mean, tokens, mask)
    return {name: float(score.compute()) for name, score in scores.items()}


def _chunks(sample: Iterator[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Sampled tokens and valid entries as (tokens, mask) of some thousand tokens each."""
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    held = 0
    for part in sample:
        parts.append(part)
        held += len(part[0])
        if held >= _CHUNK:
            yield _as_tensors(*(np.concatenate(column) for column in zip(*parts, strict=True)))
            parts, held = [], 0
    if parts:
        yield _as_tensors(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _as_tensors(tokens: np.ndarray, valid: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    mask = mask_from_valid_entries(torch.from_numpy(valid.astype(np.int64)), tokens.shape[1])
    return torch.from_numpy(tokens.astype(np.float32)), mask
