"""Copies among the models of a table: exact ones, near ones, fine-tunes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ..embedding import EmbeddingTable
from ..sources import ModelSource
from .calibration import SAME_EMBEDDING, Calibration
from .fingerprints import Closeness, FingerprintSpace
from .nearest import FeatureSpace, check_finite, nearest, pairs_within
from .weight_relations import EXACT, FINE_TUNE, NEAR, REORDERED, WeightVerdicts


NEAR_POSITION = 0.98  # position cosine of copies with slight noise, casts and the like
NEIGHBORS = 5  # of each model, that are compared by weights


@dataclass(frozen=True)
class Copy:
    """A model of a group of copies.

    Attributes:
        model_id: the model.
        nearest: the member of the group that is nearest to it by embedding.
        distance: to it, of the metric.
        verdict: what the two are to each other: "exact", "near", "fine-tune-like", "reordered" (same weights, other
            order of neurons), or "not comparable: " and why their weights do not tell.
        by_weights: whether the weights say so, or the embeddings alone.
    """

    model_id: str
    nearest: str
    distance: float
    verdict: str
    by_weights: bool


def find_copies(
    table: EmbeddingTable,
    *,
    metric: str = "cosine",
    standardize: bool = True,
    calibration: Calibration | None = None,
    models: Sequence[ModelSource] = (),
) -> list[list[Copy]]:
    """Groups the models of a table that are copies of each other, directly or by way of others.

    Candidates are pairs whose fingerprints are those of copies, where the table has any (`hf-wsl embed profile`); else
    pairs within the calibrated threshold, or without a calibration those with the same embedding. With
    weights at hand, each model's NEIGHBORS nearest ones are candidates too, and the weights decide: a pair of which
    both models are at hand is dropped where they are no copies.

    Args:
        table: of embeddings.
        metric, standardize: see `nearest`; a calibration brings its own features.
        calibration: of tables made like this one.
        models: whose weights are at hand.

    Returns:
        The groups of at least two models, in the table's order.

    Raises:
        ConfigError: the calibration is of another method.
    """
    check_finite(table)
    if calibration is not None:
        calibration.check(table)
        space, limits = calibration.space(metric), calibration.metrics[metric]
    else:
        space = FeatureSpace.of(table.embeddings, metric, standardize)
        limits = dict.fromkeys(("exact", "near", "threshold"), SAME_EMBEDDING[metric])
    rows = space.features(table.embeddings)
    names = table.model_ids
    verdicts = WeightVerdicts(models)
    close = {
        (int(a), int(b))
        for i, j in pairs_within(rows, space.squared(limits["threshold"]))
        for a, b in zip(i, j, strict=True)
    }
    told: dict[tuple[int, int], Closeness] = {}
    if table.fingerprints and calibration is None:
        told = {(i, j): closeness for i, j, closeness in FingerprintSpace(table).close_pairs()}
        close = set(told)
    links: dict[tuple[int, int], str | None] = {}  # pair -> what the weights say, None where they are not at hand
    for a, b in sorted(close | _neighbors(table, metric, standardize, verdicts)):
        if not (names[a] in verdicts and names[b] in verdicts):
            links[a, b] = None
        elif (said := verdicts.relation(names[a], names[b], are_close=(a, b) in close)) is not None:
            links[a, b] = said
    linked: dict[int, list[int]] = {}
    for a, b in links:
        linked.setdefault(a, []).append(b)
        linked.setdefault(b, []).append(a)
    groups = []
    for members in _components(list(links), len(names)):
        group = []
        for a in members:
            squared = np.square(rows[linked[a]] - rows[a]).sum(1)
            b = linked[a][int(squared.argmin())]
            distance = float(space.distance(squared.min()))
            pair = (min(a, b), max(a, b))
            said = links[pair]
            if pair in told:
                level = _level(told[pair], distance <= limits["exact"])
            else:
                level = EXACT if distance <= limits["exact"] else NEAR if distance <= limits["near"] else FINE_TUNE
            group.append(Copy(names[a], names[b], distance, said or level, said is not None))
        groups.append(group)
    return groups


def _level(closeness: Closeness, is_same: bool) -> str:
    """What two models are by their fingerprints; `is_same`: their profiles agree to the last digits."""
    if closeness.kind == "reordered":
        return REORDERED
    if closeness.position > NEAR_POSITION:
        return EXACT if is_same and closeness.position > 1 - 1e-6 else NEAR
    return FINE_TUNE


def _neighbors(
    table: EmbeddingTable, metric: str, standardize: bool, verdicts: WeightVerdicts
) -> set[tuple[int, int]]:
    """Pairs of near models whose weights are both at hand."""
    at = np.array([i for i, name in enumerate(table.model_ids) if name in verdicts], dtype=np.int64)
    if len(at) < 2:
        return set()
    held = table.select([table.model_ids[i] for i in at])
    neighbors, _ = nearest(
        held, held.embeddings, NEIGHBORS, metric, standardize=standardize, exclude=np.arange(len(held))
    )
    return {(int(min(at[i], at[j])), int(max(at[i], at[j]))) for i, row in enumerate(neighbors) for j in row}


def _components(links: Sequence[tuple[int, int]], count: int) -> Iterator[list[int]]:
    """The connected components of at least two of `count` nodes, each ascending, in the order of their first."""
    if not links:
        return
    i, j = np.array(links).T
    _, label = connected_components(coo_array((np.ones(len(i)), (i, j)), shape=(count, count)), directed=False)
    _, firsts = np.unique(label, return_index=True)
    for first in np.sort(firsts):
        members = np.flatnonzero(label == label[first])
        if len(members) > 1:
            yield members.tolist()
