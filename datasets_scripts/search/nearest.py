"""Nearest neighbors among the embeddings of a table: exact and blockwise, or by faiss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import pairwise_distances_chunked

from hf_wsl.options import ConfigError

from ..embedding import EmbeddingTable
from .search_config import METRICS


BLOCK_ENTRIES = 1 << 23  # of a matrix of distances in memory: 64 MB of float64
SPARE_CANDIDATES = 32  # of faiss, whose float32 distances may swap close neighbors
# Squared distances come from products of rows; what they are off by, relative to the squared norms.
ROUNDING = 1e-12


@dataclass(frozen=True)
class FeatureSpace:
    """The space in which embeddings are compared.

    Attributes:
        metric: "cosine" (one minus the cosine, 0 to 2) or "euclidean".
        center, scale: float64 `[d]`: features are `(embedding - center) / scale`.
    """

    metric: str
    center: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, embeddings: np.ndarray, metric: str, standardize: bool = True) -> FeatureSpace:
        """The space of a table's embeddings `[n, d]`.

        Args:
            standardize: every feature gets mean 0 and standard deviation 1 over the table; one that is constant in
                the table counts as it is.
        """
        if metric not in METRICS:
            raise ConfigError(f"the metric is '{metric}'; choose {' or '.join(METRICS)}")
        size = embeddings.shape[1]
        if not standardize:
            return cls(metric, np.zeros(size), np.ones(size))
        center, deviation = embeddings.mean(0, dtype=np.float64), embeddings.std(0, dtype=np.float64)
        constant = deviation <= 1e-6 * np.abs(center)  # float32 has no more digits
        return cls(metric, center, np.where(constant | (deviation == 0), 1.0, deviation))

    def features(self, embeddings: np.ndarray) -> np.ndarray:
        """Float64 `[n, d + 1]` whose distances `distance` turns into those of the metric.

        For the cosine rows have length 1; a row of zeros, which has no direction, becomes orthogonal to all others.
        """
        features = (embeddings.astype(np.float64) - self.center) / self.scale
        norm = np.linalg.norm(features, axis=1, keepdims=True)
        zero = norm == 0
        if self.metric == "cosine":
            return np.hstack([features / np.where(zero, 1.0, norm), zero])
        return np.hstack([features, np.zeros_like(norm)])

    def distance(self, squared: np.ndarray) -> np.ndarray:
        """From squared Euclidean distances of features to distances of the metric."""
        return squared / 2 if self.metric == "cosine" else np.sqrt(squared)

    def squared(self, distance: float) -> float:
        """The inverse of `distance`."""
        return 2 * distance if self.metric == "cosine" else distance**2


def nearest(
    table: EmbeddingTable,
    queries: np.ndarray,
    k: int,
    metric: str = "cosine",
    *,
    standardize: bool = True,
    index: str = "exact",
    exclude: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of a table that are nearest to each query; equally near ones in the table's order.

    Args:
        table: of n embeddings.
        queries: float32 `[q, d]`, made as the table was.
        k: neighbors; as many as there are, if there are fewer.
        metric: one of METRICS.
        standardize: see `FeatureSpace.of`.
        index: "exact"; "faiss" (exact too, faster); or "faiss:FACTORY", one of faiss' approximate indexes by its
            `index_factory` string ("faiss:HNSW32"), whose distances are exact but which may miss neighbors.
        exclude: int `[q]`, a row of the table that is no neighbor of the query, -1 for none: a query of the table
            is not its own neighbor.

    Returns:
        indices int64 `[q, k]` of rows and distances float32 `[q, k]`, ascending. An approximate index that finds fewer
        than k gives -1 and infinity.

    Raises:
        ConfigError: an unknown metric or index, k below 1, queries of another size, or faiss is not installed.
        ValueError: an embedding is not finite.
    """
    check_finite(table)
    queries = np.atleast_2d(queries)
    if k < 1:
        raise ConfigError(f"{k} neighbors were asked for; ask for at least 1")
    if queries.shape[1] != table.embeddings.shape[1]:
        raise ConfigError(
            f"the query has {queries.shape[1]} features and the table {table.embeddings.shape[1]}. Embed both by the "
            "same backbone, method and pooling"
        )
    if not np.isfinite(queries).all():
        raise ValueError("A query's embedding holds NaN or infinity. Embed a model whose weights are finite.")
    space = FeatureSpace.of(table.embeddings, metric, standardize)
    rows, wanted = space.features(table.embeddings), space.features(queries)
    exclude = np.full(len(queries), -1) if exclude is None else np.asarray(exclude)
    k = min(k, len(rows) - bool((exclude >= 0).any()))
    search = _exact_candidates if index == "exact" else _faiss_candidates
    indices = np.full((len(wanted), k), -1, np.int64)
    distances = np.full((len(wanted), k), np.inf, np.float32)
    for at, candidates in enumerate(search(rows, wanted, k + 1, index)):
        candidates = candidates[candidates != exclude[at]]
        # Differences, not products: the distance of equal rows is 0, and the order does not hang on rounding.
        squared = np.square(rows[candidates] - wanted[at]).sum(1)
        best = np.lexsort((candidates, squared))[:k]
        indices[at, : len(best)] = candidates[best]
        distances[at, : len(best)] = space.distance(squared[best])
    return indices, distances


def check_finite(table: EmbeddingTable) -> None:
    """Raises ValueError naming the first model whose embedding holds NaN or infinity."""
    bad = np.flatnonzero(~np.isfinite(table.embeddings).all(1))
    if len(bad):
        raise ValueError(
            f"The embedding of {table.model_ids[bad[0]]} holds NaN or infinity. Embed the models again without it."
        )


def pairs_within(rows: np.ndarray, squared_radius: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of rows within a distance, block by block, as (i, j) int64 `[pairs]` with i < j.

    Args:
        rows: features `[n, d]` float64.
        squared_radius: of Euclidean distances, itself included.
    """
    for start, squared, slack in _blocks(rows, rows):
        i, j = np.nonzero(squared <= squared_radius + slack[:, None])
        i += start
        i, j = i[i < j], j[i < j]
        for part in np.array_split(np.arange(len(i)), len(i) * rows.shape[1] // BLOCK_ENTRIES + 1):
            close = np.square(rows[i[part]] - rows[j[part]]).sum(1) <= squared_radius
            yield i[part][close], j[part][close]


def nearest_of_other_groups(rows: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Squared distance `[n]` of each row of features `[n, d]` to the nearest of another group; infinite if none."""
    names, group = np.unique(groups, return_inverse=True)
    nearest_squared = np.full(len(rows), np.inf)
    if len(names) == 1:
        return nearest_squared
    for start, squared, _ in _blocks(rows, rows):
        at = slice(start, start + len(squared))
        squared[group[at, None] == group] = np.inf
        nearest_squared[at] = np.square(rows[squared.argmin(1)] - rows[at]).sum(1)
    return nearest_squared


def _exact_candidates(rows: np.ndarray, queries: np.ndarray, k: int, _: str) -> Iterator[np.ndarray]:
    """For each query the rows that may be among its k nearest, as far as rounding leaves it open."""
    k = min(k, len(rows))
    for _, squared, slack in _blocks(rows, queries):
        kth = np.partition(squared, k - 1, axis=1)[:, k - 1]
        for distances, limit in zip(squared, kth + 2 * slack, strict=True):
            yield np.flatnonzero(distances <= limit)


def _blocks(rows: np.ndarray, queries: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """First query, squared distances `[block, n]` and their rounding `[block]`, for consecutive queries."""
    norms = np.square(queries).sum(1)
    largest = np.square(rows).sum(1).max(initial=0)
    megabytes, start = BLOCK_ENTRIES * 8 / 2**20, 0
    for squared in pairwise_distances_chunked(queries, rows, working_memory=megabytes, squared=True):
        yield start, squared, ROUNDING * (norms[start : start + len(squared)] + largest)
        start += len(squared)


def _faiss_candidates(rows: np.ndarray, queries: np.ndarray, k: int, index: str) -> Iterator[np.ndarray]:
    library, _, factory = index.partition(":")
    if library != "faiss":
        raise ConfigError(f"the index is '{index}'; choose exact, faiss or faiss:FACTORY (faiss:HNSW32)")
    try:
        import faiss
    except ImportError as error:
        raise ConfigError("the index 'faiss' needs faiss: pip install 'hf-wsl[search]', or take exact") from error
    try:
        built = faiss.index_factory(rows.shape[1], factory or "Flat")
    except RuntimeError as error:
        raise ConfigError(f"faiss knows no index '{factory}' ({str(error).splitlines()[-1]})") from error
    flat = np.ascontiguousarray(rows, np.float32)
    try:
        built.train(flat)
        built.add(flat)
        _, neighbors = built.search(np.ascontiguousarray(queries, np.float32), min(len(rows), k + SPARE_CANDIDATES))
    except RuntimeError as error:
        raise ConfigError(
            f"faiss cannot make the index '{factory}' of {len(rows)} embeddings of {rows.shape[1]} numbers "
            f"({str(error).splitlines()[-1]}). Take exact, or a smaller index"
        ) from error
    for candidates in neighbors:
        yield candidates[candidates >= 0]
