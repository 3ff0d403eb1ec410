"""Embeds models as a backbone does, with a linear map of each token in the backbone's place: what it must beat."""

import logging
from collections.abc import Callable, Iterable

import numpy as np
import torch

from hf_wsl.workers import one_thread
from modeling_wsl import CheckpointError, open_checkpoint
from modeling_wsl.backbone.losses import MIN_STD
from modeling_wsl.checkpoints.checkpoint import Checkpoint
from modeling_wsl.embedding.pooling import LatentPool
from modeling_wsl.tokens.manifest import WeightManifest

from ..sources import ModelSource
from .embed_config import EmbedConfig
from .linear_projection import Covariance, LinearBaseline, random_projection, standardize
from .same_tensors import SameTensors


logger = logging.getLogger(__name__)

TOKEN_STATISTICS = 2


class TokenProjection:
    """Latents of a token: its projection once standardized, its mean, and the logarithm of its standard deviation.

    Together `latent_size` numbers, of the same meaning as those of a backbone with `token_standardization`, which has
    this map as its linear path: what is left to a backbone is what it learned of the context.

    Args:
        projection: of standardized tokens to `latent_size - 2` numbers (fewer where tokens are shorter).
        config: of the run.
    """

    def __init__(self, projection: LinearBaseline, config: EmbedConfig):
        self.projection = projection
        self.config = config
        self.extractor = config.feature_extractor()
        self.same = SameTensors("pooling='layers'", "pooling='mean'") if config.pooling == "layers" else None
        self.done: dict[str, tuple[np.ndarray, dict[str, np.ndarray] | None]] = {}

    def add(
        self, name: str, checkpoint: Checkpoint, manifest: WeightManifest, advance: Callable[[int], object]
    ) -> None:
        """Embeds a model; see `PackedEncoder.add`."""
        if self.same is not None:
            self.same.check(name, manifest)
        width = len(self.projection.components) + TOKEN_STATISTICS
        pool = LatentPool(manifest.layers, width, self.config.pooling)
        for window in self.extractor.stream(checkpoint):
            pool.add(self.latents(window["tokens"], window["token_mask"]), window["positions"][:, 1])
            advance(len(window["tokens"]))
        if self.same is not None:
            self.same.keep(name, manifest)
        self.done[name] = (pool.embedding(), pool.per_layer() if self.config.per_layer else None)

    def latents(self, tokens: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        """`[tokens, d_t]`, twice, to `[tokens, latent_size]` float32."""
        standardized, mean, std = standardize(tokens, token_mask)
        projected = (standardized - self.projection.mean) @ self.projection.components.T
        return torch.cat([projected, mean, std.clamp_min(MIN_STD).log()], dim=1)

    def finish(self) -> dict[str, tuple[np.ndarray, dict[str, np.ndarray] | None]]:
        return self.done


def make_projection(method: str, config: EmbedConfig, models: Iterable[ModelSource]) -> LinearBaseline:
    """The map of "random-projection", or of "pca", fitted on all tokens of `models`, each standardized.

    Raises:
        ValueError: none of the models could be read, or all their tokens are constant.
    """
    rank = min(config.latent_size - TOKEN_STATISTICS, config.token_size)
    if method == "random-projection":
        return random_projection(rank, config.token_size, config.seed)
    extractor, covariance = config.feature_extractor(), Covariance(config.token_size)
    with one_thread():
        for model in models:
            try:
                with open_checkpoint(model.location, revision=None if model.path else model.revision) as checkpoint:
                    for window in extractor.stream(checkpoint):
                        standardized, _, std = standardize(window["tokens"], window["token_mask"])
                        covariance.update(standardized[(std > MIN_STD).squeeze(-1)])  # an even token has no direction
            except CheckpointError as error:
                logger.warning("pca is not fitted on %s: %s", model.model_id, error)
    return covariance.principal_components(rank)
