"""Methods that embed models without a backbone, which a backbone must beat: the profile of their layers, a linear map
of each token, statistics of tensors, spectral norms of matrices."""

import logging
from collections.abc import Callable, Iterable

import numpy as np
import torch

from hf_wsl.options import ConfigError
from hf_wsl.workers import one_thread, torch_threads
from modeling_wsl import CheckpointError, open_checkpoint
from modeling_wsl.backbone.losses import MIN_STD
from modeling_wsl.checkpoints.canonical import embedding_view
from modeling_wsl.checkpoints.checkpoint import Checkpoint
from modeling_wsl.checkpoints.identity.spelling import plain_names
from modeling_wsl.embedding.model_embedding import ModelEmbedding, embed_checkpoint
from modeling_wsl.embedding.pooling import LatentPool
from modeling_wsl.tokens.manifest import TensorSpec, WeightManifest, split_name

from ..sources import ModelSource
from .embed_config import EmbedConfig
from .embedding_table import FINGERPRINTS
from .linear_projection import Covariance, LinearBaseline, random_projection, standardize


logger = logging.getLogger(__name__)

TOKEN_STATISTICS = 2
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
ENTRIES_AT_ONCE = 1 << 22  # of a matrix, that are widened together
LARGE_MATRIX = 1 << 20  # entries from which threads help
OUTPUT_LAST = ("kernel", "recurrent_kernel")  # leaf names of Keras, TensorFlow and Flax


def tensor_shapes(manifest: WeightManifest) -> dict[str, tuple[int, ...]]:
    """Plain name -> shape of every tokenized tensor, in order: a wrapper makes no other architecture."""
    specs = [spec for layer in manifest.layers for spec in layer.tensors]
    plain = plain_names(spec.name for spec in specs)
    return {plain[spec.name]: spec.shape for spec in specs}


class UnlikeModelsError(ConfigError):
    """Models of unlike tensors, where a method puts the numbers of tensors side by side."""


class SameTensors:
    """Refuses a model whose tensors are not those of the first that was kept: only models of one architecture have
    comparable vectors, where a method puts the numbers of tensors side by side.

    Args:
        what: needs it, for the message.
        instead: what does not.
    """

    def __init__(self, what: str, instead: str):
        self.what, self.instead = what, instead
        self.first: tuple[str, dict[str, tuple[int, ...]]] | None = None

    def check(self, name: str, manifest: WeightManifest) -> None:
        """Raises UnlikeModelsError, naming both models and the first tensor that differs."""
        if self.first is None:
            return
        shapes, (first, expected) = tensor_shapes(manifest), self.first
        if list(shapes.items()) != list(expected.items()):
            names = dict.fromkeys([*expected, *shapes])
            differs = next((tensor for tensor in names if shapes.get(tensor) != expected.get(tensor)), None)
            difference = f"{differs} is {_shape(shapes, differs)} there and {_shape(expected, differs)} here"
            raise UnlikeModelsError(
                f"{self.what} needs models with the same tensors, and {name} is not like {first}: "
                f"{difference if differs else 'their order differs'}. Leave it out, or use {self.instead}."
            )

    def keep(self, name: str, manifest: WeightManifest) -> None:
        """To be called once a model has been read to its end: the first such is what others are compared with."""
        if self.first is None:
            self.first = (name, tensor_shapes(manifest))


def _shape(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "missing"


class WeightSections:
    """The profile of a model's layers, and beside it the two fingerprints that tell copies; see `embed_model`."""

    same = None  # models of any tensors stand side by side

    def __init__(self, config: EmbedConfig):
        self.extractor = config.feature_extractor()
        self.embeddings: dict[str, ModelEmbedding] = {}

    def add(
        self, name: str, checkpoint: Checkpoint, manifest: WeightManifest, advance: Callable[[int], object]
    ) -> None:
        """Embeds a model; see `PackedEncoder.add`."""
        self.embeddings[name] = embed_checkpoint(checkpoint)
        advance(manifest.num_tokens)

    def finish(self) -> dict[str, tuple[np.ndarray, None]]:
        """Name -> profile float32 `[273]`, and None: there are none of layers."""
        return {name: (embedding.profile, None) for name, embedding in self.embeddings.items()}

    def fingerprints(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """ "position" and "probe" of models: float32 `[models, 128]` each."""
        rows = [self.embeddings[name] for name in names]
        return {section: np.stack([getattr(row, section) for row in rows]) for section in FINGERPRINTS}


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
                revision = None if model.path else model.revision
                with embedding_view(open_checkpoint(model.location, revision=revision)) as checkpoint:
                    for window in extractor.stream(checkpoint):
                        standardized, _, std = standardize(window["tokens"], window["token_mask"])
                        covariance.update(standardized[(std > MIN_STD).squeeze(-1)])  # an even token has no direction
            except CheckpointError as error:
                logger.warning("pca is not fitted on %s: %s", model.model_id, error)
    return covariance.principal_components(rank)


class WeightStatistics:
    """Mean, variance and quantiles of each tensor (Unterthiner et al. 2020), or norms of each matrix.

    * "statistics": mean, variance and the quantiles 0, 25, 50, 75 and 100 % of every tensor, in state-dict order.
    * "pooled-statistics": the same, pooled (`pool_tensors`) over the matrices (two dimensions or more) and over the
      other tensors of a model.
    * "spectral-norms": the largest singular value of each matrix (convolutions flattened to `[out, rest]`, those of
      Keras too, where outputs come last), and its ratio to the Frobenius norm; in state-dict order where all
      models have the same tensors, pooled otherwise.

    Tensors are read one at a time, in float32.
    """

    def __init__(self, method: str, config: EmbedConfig):
        self.method = method
        self.extractor = config.feature_extractor()
        self.same = SameTensors("statistics", "pooled-statistics") if method == "statistics" else None
        self.threads = torch.get_num_threads()  # `embed_models` reads the models with one
        self.rows: dict[str, np.ndarray] = {}  # name -> [tensors, statistics]
        self.shapes: dict[str, dict[str, tuple[int, ...]]] = {}

    def add(
        self, name: str, checkpoint: Checkpoint, manifest: WeightManifest, advance: Callable[[int], object]
    ) -> None:
        """Measures a model; see `PackedEncoder.add`."""
        if self.same is not None:
            self.same.check(name, manifest)
        rows = []
        for layer in manifest.layers:
            for spec in layer.tensors:
                if self.method != "spectral-norms":
                    rows.append(tensor_statistics(self._read(checkpoint, spec)))
                elif len(spec.shape) > 1:
                    with torch_threads(self.threads if spec.numel >= LARGE_MATRIX else 1):
                        output_last = is_output_last(spec.name) and spec.name not in checkpoint.layouts
                        rows.append(matrix_norms(self._read(checkpoint, spec), output_last))
            advance(layer.num_tokens)
        if not rows:
            raise CheckpointError(checkpoint.source, "has no matrix, so no spectral norm", "Use another method")
        if self.same is not None:
            self.same.keep(name, manifest)
        self.rows[name] = np.array(rows)
        self.shapes[name] = tensor_shapes(manifest)

    @property
    def is_pooled(self) -> bool:
        """Whether vectors are pooled over tensors, rather than put side by side."""
        if self.method != "spectral-norms":
            return self.method == "pooled-statistics"
        return len({tuple(shapes.items()) for shapes in self.shapes.values()}) > 1

    def finish(self) -> dict[str, tuple[np.ndarray, None]]:
        """Name -> embedding float32 `[d]`, and None: there are none of layers."""
        if not self.is_pooled:
            return {name: (rows.reshape(-1).astype(np.float32), None) for name, rows in self.rows.items()}
        return {name: (self._pool(name, rows), None) for name, rows in self.rows.items()}

    def _read(self, checkpoint: Checkpoint, spec: TensorSpec) -> torch.Tensor:
        tensor = checkpoint.read(spec.name)
        checkpoint.check_finite(spec.name, tensor)
        return tensor

    def _pool(self, name: str, rows: np.ndarray) -> np.ndarray:
        shapes = list(self.shapes[name].values())
        entries = np.array([np.prod(shape, dtype=np.float64) for shape in shapes])
        matrices = np.array([len(shape) > 1 for shape in shapes])
        if self.method == "spectral-norms":
            return pool_tensors(rows, entries[matrices])
        return np.concatenate([pool_tensors(rows[kind], entries[kind]) for kind in (matrices, ~matrices)])


def tensor_statistics(tensor: torch.Tensor) -> list[float]:
    """Mean, population variance and `QUANTILES` of all entries."""
    values = tensor.to(torch.float32, copy=True).reshape(-1)  # a copy: quantiles sort it in part, in place
    variance, mean = torch.var_mean(values, correction=0)
    return [mean.item(), variance.item(), *np.quantile(values.numpy(), QUANTILES, overwrite_input=True)]


def is_output_last(name: str) -> bool:
    """Whether the last dimension of a tensor of this name counts outputs, and not the first."""
    return split_name(name)[1] in OUTPUT_LAST


def matrix_norms(tensor: torch.Tensor, output_last: bool = False) -> list[float]:
    """The largest singular value of a tensor seen as a matrix `[out, rest]`, and its ratio to the Frobenius norm.

    By the eigenvalues of the smaller Gram matrix: exact for the largest value, and the matrix is widened in parts.

    Args:
        tensor: `[out, ...]`.
        output_last: it is `[..., out]`, as Keras' kernels are.
    """
    matrix = tensor.reshape(-1, tensor.shape[-1]) if output_last else tensor.reshape(len(tensor), -1)
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    gram = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64)
    for part in matrix.split(max(1, ENTRIES_AT_ONCE // matrix.shape[1])):
        part = part.float()
        gram += (part.T @ part).double()
    largest = torch.linalg.eigvalsh(gram)[-1].clamp_min(0).sqrt().item()
    frobenius = gram.trace().sqrt().item()
    return [largest, largest / frobenius if frobenius > 0 else 0.0]


def pool_tensors(rows: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """Pools statistics `[tensors, s]` over tensors: mean, standard deviation, minimum and maximum of each, and the
    logarithms of one plus the number of tensors and of their entries: float32 `[4 * s + 2]`, 0 without tensors."""
    counts = np.log1p([len(rows), entries.sum()])
    if not len(rows):
        return np.concatenate([np.zeros(4 * rows.shape[1]), counts]).astype(np.float32)
    return np.concatenate([rows.mean(0), rows.std(0), rows.min(0), rows.max(0), counts]).astype(np.float32)
