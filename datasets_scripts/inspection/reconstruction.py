"""The part of each layer that survives the way through a backbone, beside two linear maps of each token."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils.logging import is_progress_bar_enabled

from modeling_wsl import WSLFeatureExtractor
from modeling_wsl.backbone.encoding import STREAM_WINDOW, HaloedWindows, haloed_rows, run_batch
from modeling_wsl.backbone.losses import MIN_RELATIVE_STD, MIN_STD, token_moments
from modeling_wsl.checkpoints.checkpoint import Checkpoint

from ..embedding.linear_projection import Covariance, LinearBaseline, random_projection, standardize


HALO = 64
BATCH_SIZE = 8
# A latent's two numbers for a token's mean and standard deviation, which the linear maps are given as well.
TOKEN_STATISTICS = 2


@dataclass(frozen=True)
class Fidelity:
    """Figures of reconstructed weights; in units of its zoo for a backbone that normalizes layers.

    Attributes:
        relative_error: |reconstruction - weights| / |weights|, Euclidean; None where all weights are 0.
        r2: share of the variance within tokens that is kept, each token in units of its own standard deviation
            (`reconstruction_r2`); None where no token varies.
    """

    relative_error: float | None
    r2: float | None


@dataclass(frozen=True)
class Reconstruction:
    """Method ("backbone", "pca", "random projection") -> `Fidelity`, over all tokens and layer by layer.

    Attributes:
        backbone: as it was named.
        latent_size: numbers per token; both linear maps have as many.
        num_tokens: of the model, as this backbone cuts it.
        overall: method -> fidelity.
        layers: layer name -> method -> fidelity.
    """

    backbone: str
    latent_size: int
    num_tokens: int
    overall: dict[str, Fidelity]
    layers: dict[str, dict[str, Fidelity]]


class LayerErrors:
    """Sums of squares by layer, float64 `[layers]` each."""

    def __init__(self, num_layers: int):
        self.sums = torch.zeros(4, num_layers, dtype=torch.float64)  # error, weights, standardized error, variance

    def add(self, reconstruction: Tensor, tokens: Tensor, mask: Tensor, layers: Tensor) -> None:
        """Adds tokens `[n, d_t]` and their reconstruction; `layers` int64 `[n]`."""
        _, variance, count = token_moments(tokens, mask)
        varies = ((variance >= MIN_STD**2) & (count > 1)).squeeze(-1)
        error = torch.where(mask, reconstruction - tokens, 0).double().square().sum(1)
        weights = torch.where(mask, tokens, 0).double().square().sum(1)
        level = torch.zeros(2, self.sums.shape[1], dtype=torch.float64)  # squares and entries of each layer, here
        level.index_add_(1, layers, torch.stack([weights, mask.sum(1).double()]))
        least = (MIN_RELATIVE_STD**2 * level[0] / level[1].clamp_min(1))[layers]  # as `reconstruction_r2` has it
        sigma_squared = torch.maximum(variance.squeeze(-1).double(), least).clamp_min(MIN_STD**2)
        standardized = torch.where(varies, error / sigma_squared, 0)
        share = torch.where(varies, variance.squeeze(-1).double() / sigma_squared, 0)
        terms = torch.stack([error, weights, standardized, count.squeeze(-1).double() * share])
        self.sums.index_add_(1, layers, terms)

    def fidelities(self) -> tuple[Fidelity, list[Fidelity]]:
        """Over all tokens, and of each layer."""
        return _fidelity(self.sums.sum(1)), [_fidelity(column) for column in self.sums.T]


def _fidelity(sums: Tensor) -> Fidelity:
    error, weights, standardized, variance = sums.tolist()
    return Fidelity((error / weights) ** 0.5 if weights else None, 1 - standardized / variance if variance else None)


def reconstruct_layers(
    name: str, model: PreTrainedModel, extractor: WSLFeatureExtractor, checkpoint: Checkpoint
) -> Reconstruction:
    """Sends a model through a backbone in haloed windows, in the memory of a few of them.

    Beside it stand a random orthogonal projection of each standardized token, and PCA: fitted on one half of this
    model's tokens and used on the other, and left out where a half has fewer tokens than directions are kept. Both
    are given the token's mean and standard deviation and fill up the latent's size with the rest.

    Args:
        name: of the backbone, for the record.
        model, extractor: the backbone and what belongs to it.
        checkpoint: open; it has tokens, and its weights are finite.
    """
    manifest = extractor.layout_of(checkpoint)
    rank = min(model.config.latent_size - TOKEN_STATISTICS, extractor.token_size)
    random = random_projection(rank, extractor.token_size, seed=0)
    maps = {"random projection": (random, random)}  # of the tokens of even index, and of the others
    if halves := _fit_on_other_half(extractor, checkpoint, rank):
        maps["pca"] = halves
    errors = {method: LayerErrors(len(manifest.layers)) for method in ("backbone", *maps)}
    chunks = extractor.stream(checkpoint, STREAM_WINDOW)
    halo = HALO if model.code.in_context else 0  # else a window's numbers are those of its own tokens
    windows = HaloedWindows(manifest.num_tokens, model.config.window_size, halo)
    for reconstruction, tokens, mask, positions in _reconstruct(model, chunks, windows):
        layers = positions[:, 1]
        errors["backbone"].add(reconstruction, tokens, mask, layers)
        standardized, mean, std = standardize(tokens, mask)
        odd = positions[:, :1] % 2 == 1
        for method, (even_map, odd_map) in maps.items():
            projected = torch.where(odd, odd_map.reconstruct(standardized), even_map.reconstruct(standardized))
            errors[method].add(projected * std + mean, tokens, mask, layers)
    fidelities = {method: sums.fidelities() for method, sums in errors.items()}
    return Reconstruction(
        backbone=name,
        latent_size=model.config.latent_size,
        num_tokens=manifest.num_tokens,
        overall={method: overall for method, (overall, _) in fidelities.items()},
        layers={
            layer.name: {method: by_layer[index] for method, (_, by_layer) in fidelities.items()}
            for index, layer in enumerate(manifest.layers)
        },
    )


def _fit_on_other_half(
    extractor: WSLFeatureExtractor, checkpoint: Checkpoint, rank: int
) -> tuple[LinearBaseline, LinearBaseline] | None:
    """PCA for the tokens of even index, fitted on those of odd index, and the other way round."""
    even, odd = Covariance(extractor.token_size), Covariance(extractor.token_size)
    for window in extractor.stream(checkpoint, STREAM_WINDOW):
        standardized, _, std = standardize(window["tokens"].float(), window["token_mask"])
        varies, index = (std > MIN_STD).squeeze(-1), window["positions"][:, 0]
        even.update(standardized[varies & (index % 2 == 0)])
        odd.update(standardized[varies & (index % 2 == 1)])
    if min(even.count, odd.count) < rank:
        return None
    return odd.principal_components(rank), even.principal_components(rank)


def _reconstruct(
    model: PreTrainedModel, chunks: Iterator, windows: HaloedWindows
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Reconstruction, tokens, mask and positions of consecutive tokens, each once, float32 on the CPU."""
    rows = haloed_rows(chunks, windows)
    hidden = not is_progress_bar_enabled()
    with tqdm(total=len(windows), desc="Reconstructing", unit="window", leave=False, disable=hidden) as bar:
        while batch := list(islice(rows, BATCH_SIZE)):
            fields = {name: torch.stack([row[name] for _, row in batch]) for name in batch[0][1]}
            fields["tokens"] = fields["tokens"].float()
            outputs = run_batch(model, lambda **inputs: model(**inputs).reconstruction, fields, None).float().cpu()
            for place, (index, _) in enumerate(batch):
                start, stop = (token - windows.row_start(index) for token in windows.core(index))
                core = (outputs, fields["tokens"], fields["token_mask"], fields["positions"])
                yield tuple(part[place, start:stop] for part in core)
            bar.update(len(batch))
