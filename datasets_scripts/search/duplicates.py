"""Copies among the models of a table: by their fingerprints, and by their weights where these are at hand."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from modeling_wsl.checkpoints.errors import CheckpointError

from ..embedding import EmbeddingTable
from ..sources import ModelSource
from .compare import STRANGERS, judge
from .fingerprints import FingerprintSpace
from .nearest import check_finite, nearest
from .weight_relations import open_source


logger = logging.getLogger(__name__)
NEIGHBORS = 5  # of each model, that are compared by weights
BY_FINGERPRINT = {"copy": "copy or fine-tune", "reordered": "permuted or rescaled copy"}
NOT_COMPARABLE = "not comparable"
UNMATCHED = "no layer could be matched"  # too few inputs to tell neurons: the fingerprints decide


@dataclass(frozen=True)
class Copy:
    """A model of a group of copies.

    Attributes:
        model_id: the model.
        nearest: the member of the group that is nearest to it.
        position: cosine of their position fingerprints.
        verdict: what the two are to each other: a verdict of `hf-wsl compare`; of fingerprints alone "copy or
            fine-tune" or "permuted or rescaled copy"; or "not comparable: " and why the weights do not tell.
        by_weights: whether the weights say so, or the fingerprints alone.
    """

    model_id: str
    nearest: str
    position: float
    verdict: str
    by_weights: bool


def find_copies(
    table: EmbeddingTable, models: Sequence[ModelSource] = (), allow_nonfinite: bool = False
) -> list[list[Copy]]:
    """Groups the models of a table that are copies of each other, directly or by way of others.

    Candidates are pairs whose fingerprints are those of copies (`fingerprints.py`). With weights at hand, each model's
    NEIGHBORS nearest ones are candidates too, and the weights decide: a pair of which both models are at hand is
    dropped where `judge` calls them strangers.

    Args:
        table: of `hf-wsl embed profile`.
        models: whose weights are at hand.
        allow_nonfinite: compare weights that hold NaN or infinite values too.

    Returns:
        The groups of at least two models, in the table's order.

    Raises:
        ValueError: the table has no fingerprints.
    """
    check_finite(table)
    space, names = FingerprintSpace(table), table.model_ids
    at_hand = {model.model_id: model for model in models}
    close = {(i, j): BY_FINGERPRINT[closeness.kind] for i, j, closeness in space.close_pairs()}
    links: dict[tuple[int, int], tuple[str, bool]] = {}
    for pair in sorted(close.keys() | _neighbors(table, at_hand)):
        if not all(names[row] in at_hand for row in pair):
            links[pair] = close[pair], False
            continue
        verdict = _verdict(space, pair, [at_hand[names[row]] for row in pair], allow_nonfinite)
        if verdict == UNMATCHED:
            if close.get(pair) == BY_FINGERPRINT["reordered"]:
                links[pair] = close[pair], False
        elif verdict not in STRANGERS and (pair in close or not verdict.startswith(NOT_COMPARABLE)):
            links[pair] = verdict, True
    linked: dict[int, list[int]] = {}
    for a, b in links:
        linked.setdefault(a, []).append(b)
        linked.setdefault(b, []).append(a)
    groups = []
    for members in components(list(links), len(names)):
        group = []
        for a in members:
            cosines = space.position[linked[a]] @ space.position[a]
            b = linked[a][int(cosines.argmax())]
            group.append(Copy(names[a], names[b], float(cosines.max()), *links[min(a, b), max(a, b)]))
        groups.append(group)
    return groups


def _verdict(
    space: FingerprintSpace, pair: tuple[int, int], models: Sequence[ModelSource], allow_nonfinite: bool
) -> str:
    try:
        with (
            open_source(models[0], allow_nonfinite) as first,
            open_source(models[1], allow_nonfinite) as second,
        ):
            judgement = judge(first, second, space.row_pair(*pair))
            return judgement.verdict if judgement.neurons or judgement.verdict != STRANGERS[0] else UNMATCHED
    except MemoryError:  # of the run, not of these models
        raise
    except Exception as error:  # files from the wild break in any way; the other pairs go on
        known = isinstance(error, CheckpointError)
        reason = error.reason if known else f"{type(error).__name__}: {error}"
        names = [model.model_id for model in models]
        logger.warning("%s and %s are not comparable: %s", *names, reason, exc_info=not known)
        return f"{NOT_COMPARABLE}: {reason}"


def _neighbors(table: EmbeddingTable, at_hand: dict[str, ModelSource]) -> set[tuple[int, int]]:
    """Pairs of near models whose weights are both at hand."""
    at = np.array([i for i, name in enumerate(table.model_ids) if name in at_hand], dtype=np.int64)
    if len(at) < 2:
        return set()
    held = table.select([table.model_ids[i] for i in at])
    neighbors, _ = nearest(held, held.embeddings, NEIGHBORS, "cosine", exclude=np.arange(len(held)))
    return {(int(min(at[i], at[j])), int(max(at[i], at[j]))) for i, row in enumerate(neighbors) for j in row}


def components(links: Sequence[tuple[int, int]], count: int) -> Iterator[list[int]]:
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
