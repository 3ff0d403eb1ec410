"""Embeds models by statistics of their tensors, and by spectral norms of their matrices."""

from collections.abc import Callable

import numpy as np
import torch

from hf_wsl.workers import torch_threads
from modeling_wsl import CheckpointError
from modeling_wsl.checkpoints.checkpoint import Checkpoint
from modeling_wsl.tokens.manifest import TensorSpec, WeightManifest, split_name

from .embed_config import EmbedConfig
from .same_tensors import SameTensors, tensor_shapes


QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
ENTRIES_AT_ONCE = 1 << 22  # of a matrix, that are widened together
LARGE_MATRIX = 1 << 20  # entries from which threads help
OUTPUT_LAST = ("kernel", "recurrent_kernel")  # leaf names of Keras, TensorFlow and Flax


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
                        rows.append(matrix_norms(self._read(checkpoint, spec), is_output_last(spec.name)))
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
