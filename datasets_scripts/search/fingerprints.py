"""Copies by their fingerprints: one rule for tables, pairs of models, and a model against a table."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from modeling_wsl.embedding.model_embedding import ModelEmbedding
from modeling_wsl.embedding.profile import profile_names

from ..embedding.embedding_table import FINGERPRINTS, EmbeddingTable


# Chosen on the public models of one half of 23 owners; of the other half, 1 of 61 models has a stranger within these,
# and copies with int8 weights, with noise as large as the weights, half pruned, permuted or rescaled are all within.
POSITION_COSINE = 0.45
PROBE_DISTANCE = 0.55  # relative to the density around both models
DENSITY_RANKS = slice(5, 10)  # neighbors whose mean distance is the density around a model: copies of it come before
SIZES = [profile_names().index(f"count: {name}") for name in ("log layers", "log all entries")]
SIZE_RATIO = np.log(1.25)  # reordered copies have as many layers and weights, but for a head
MIN_ROWS = 20  # of a table whose densities mean something
EPS = 1e-12


@dataclass(frozen=True)
class Closeness:
    """How near two models are by their fingerprints.

    Attributes:
        position: cosine of their weights as they stand, -1 to 1.
        probe: distance of their responses, relative to the density around both; None where there is no table of
            strangers to tell it.
        same_size: whether they have about as many layers and weights.
    """

    position: float
    probe: float | None
    same_size: bool = True

    @property
    def kind(self) -> str | None:
        """ "copy" by position, "reordered" by probe alone, None for strangers."""
        if self.position > POSITION_COSINE:
            return "copy"
        is_reordered = self.same_size and self.probe is not None and self.probe < PROBE_DISTANCE
        return "reordered" if is_reordered else None


class FingerprintSpace:
    """The fingerprints of a table's models, and the density around each.

    Args:
        table: made by `hf-wsl embed profile`.

    Raises:
        ValueError: the table has no fingerprints.
    """

    def __init__(self, table: EmbeddingTable):
        if set(table.fingerprints) != set(FINGERPRINTS):
            raise ValueError(
                f"The table was made by {table.made_by.get('method', 'an unknown method')} and has no fingerprints. "
                "Make it with `hf-wsl embed profile`."
            )
        self.table = table
        self.position, probe = (table.fingerprints[name].astype(np.float64) for name in FINGERPRINTS)
        self.center = probe.mean(0)
        self.probe = _unit(probe - self.center)
        self.sizes = table.embeddings[:, SIZES].astype(np.float64)

    @cached_property
    def density(self) -> np.ndarray:
        """Float64 `[n]`: mean distance of each model's probe to those of its neighbors; NaN in small tables."""
        distances = 1 - self.probe @ self.probe.T
        np.fill_diagonal(distances, np.inf)
        return _density(distances)

    def closeness(self, model: ModelEmbedding) -> list[Closeness]:
        """How near a model is to each of the table."""
        distances = self._distances(model.probe)
        relative = distances / np.sqrt(_density(distances[None])[0] * self.density)
        cosines = self.position @ model.position.astype(np.float64)
        same = _same_size(self.sizes, model.profile[SIZES])
        return [Closeness(float(c), _known(d), bool(s)) for c, d, s in zip(cosines, relative, same, strict=True)]

    def pair(self, first: ModelEmbedding, second: ModelEmbedding) -> Closeness:
        """How near two models are that are not in the table, whose models stand for strangers."""
        around = [_density(self._distances(model.probe)[None])[0] for model in (first, second)]
        units = [_unit(model.probe.astype(np.float64) - self.center) for model in (first, second)]
        relative = (1 - float(units[0] @ units[1])) / np.sqrt(around[0] * around[1])
        same = bool(_same_size(first.profile[SIZES], second.profile[SIZES]))
        return Closeness(float(first.position @ second.position), _known(relative), same)

    def row_pair(self, i: int, j: int) -> Closeness:
        """How near two models of the table are."""
        relative = (1 - float(self.probe[i] @ self.probe[j])) / np.sqrt(self.density[i] * self.density[j])
        same = bool(_same_size(self.sizes[i], self.sizes[j]))
        return Closeness(float(self.position[i] @ self.position[j]), _known(relative), same)

    def near(self, other: EmbeddingTable, row: int, own: int) -> Closeness:
        """How near a row of another table is to a row of this one."""
        position, probe = (other.fingerprints[name][row].astype(np.float64) for name in FINGERPRINTS)
        relative = self._distances(probe)[own] / np.sqrt(_density(self._distances(probe)[None])[0] * self.density[own])
        same = bool(_same_size(other.embeddings[row, SIZES], self.sizes[own]))
        return Closeness(float(self.position[own] @ position), _known(relative), same)

    def close_pairs(self) -> Iterator[tuple[int, int, Closeness]]:
        """Pairs (i, j), i < j, of the table's rows that are copies by the rule."""
        for i in range(len(self.table) - 1):
            cosines = self.position[i + 1 :] @ self.position[i]
            relative = (1 - self.probe[i + 1 :] @ self.probe[i]) / np.sqrt(self.density[i] * self.density[i + 1 :])
            reordered = (relative < PROBE_DISTANCE) & _same_size(self.sizes[i + 1 :], self.sizes[i])
            for offset in np.flatnonzero((cosines > POSITION_COSINE) | reordered):
                yield i, i + 1 + int(offset), Closeness(float(cosines[offset]), _known(relative[offset]))

    def stranger_cosines(self) -> np.ndarray:
        """Ascending cosines of position of all pairs of the table that are no copies by the rule."""
        cosines = self.position @ self.position.T
        relative = (1 - self.probe @ self.probe.T) / np.sqrt(self.density[:, None] * self.density)
        is_stranger = np.triu((cosines <= POSITION_COSINE) & ~(relative < PROBE_DISTANCE), 1)
        return np.sort(cosines[is_stranger])

    def _distances(self, probe: np.ndarray) -> np.ndarray:
        return 1 - self.probe @ _unit(probe.astype(np.float64) - self.center)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / (np.linalg.norm(rows, axis=-1, keepdims=True) + EPS)


def _density(distances: np.ndarray) -> np.ndarray:
    """Of rows of distances to the models of a table; NaN where these are too few to tell."""
    if distances.shape[1] < MIN_ROWS:
        return np.full(len(distances), np.nan)
    return np.sort(distances, axis=1)[:, DENSITY_RANKS].mean(1) + EPS


def _same_size(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (np.abs(first - second) < SIZE_RATIO).all(-1)


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
