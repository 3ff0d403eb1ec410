"""Fine-tunes and other near copies: models whose weights are those of another model, slightly changed.

A split that parts them validates on what was trained on. Exact copies are told by their hash (`splits.py`); near ones
by the position of their weights (the rule of `search/fingerprints.py`), or by what they state as their base model.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from modeling_wsl.checkpoints.checkpoint import Checkpoint
from modeling_wsl.checkpoints.errors import NotTokenizableError
from modeling_wsl.embedding.model_embedding import position_of

from .search.fingerprints import POSITION_COSINE


@dataclass(frozen=True)
class NearCopyItem:
    """The facts of a model that tell its near copies.

    Attributes:
        model_id: names the group if the model is its first.
        fingerprint: as `fingerprint` makes it; None leaves the model to what is stated of its base.
        base_model: id of what it was fine-tuned from, if that is stated.
        repository: id by which others may name it as their base, where `model_id` is another.
    """

    model_id: str
    fingerprint: Mapping[str, str] | None
    base_model: str | None = None
    repository: str | None = None


def fingerprint(checkpoint: Checkpoint) -> dict[str, str]:
    """The position of a model: 350 bytes of JSON, whatever the model's size.

    Args:
        checkpoint: an open one; all its matrices are read, one at a time.

    Returns:
        `position`: base64 of 128 float16. Empty for a model without matrices, with constant ones alone, or where NaN
        and infinite weights leave nothing to tell.
    """
    try:
        position = position_of(checkpoint)
    except NotTokenizableError:
        return {}
    if not position.any() or not np.isfinite(position).all():
        return {}
    return {"position": base64.b64encode(position.astype("<f2").tobytes()).decode()}


def near_copy_groups(items: Sequence[NearCopyItem]) -> list[str]:
    """Groups models that are near copies of each other, directly or by way of others.

    Two models are linked if the cosine of their positions is that of copies; if one states the other as its base; or
    if both state the same base. Copies with permuted neurons are not found: their probes are alike, but so are those
    of untrained models of one architecture, which must not be tied. Nor are models of which a small part is shared,
    such as a detector with the backbone of others, unless they state it.

    Args:
        items: the models. Time grows with the square of their number.

    Returns:
        for each model the `model_id` of the first model of its group; its own if it is alone.
    """
    if not items:
        return []
    edges = [*_alike(items), *_stated(items), (0, 0)]
    i, j = np.array(edges).T
    size = len(items)
    _, label = connected_components(coo_array((np.ones(len(i)), (i, j)), shape=(size, size)), directed=False)
    _, first, group = np.unique(label, return_index=True, return_inverse=True)
    return [items[at].model_id for at in first[group]]


def _alike(items: Sequence[NearCopyItem]) -> Iterator[tuple[int, int]]:
    """Pairs of models whose positions are those of copies."""
    known = [
        (at, item.fingerprint["position"]) for at, item in enumerate(items) if "position" in (item.fingerprint or {})
    ]
    positions = np.array([np.frombuffer(base64.b64decode(text), "<f2") for _, text in known], dtype=np.float32)
    for i in range(len(known) - 1):
        for offset in np.flatnonzero(positions[i + 1 :] @ positions[i] > POSITION_COSINE):
            yield known[i][0], known[i + 1 + int(offset)][0]


def _stated(items: Sequence[NearCopyItem]) -> Iterator[tuple[int, int]]:
    """Pairs of models of which one is the other's base, or that have one base. Ids of the Hub ignore case."""
    ids: dict[str, int] = {}
    for i, item in enumerate(items):
        for name in (item.model_id, item.repository):
            if name is not None:
                ids.setdefault(name.lower(), i)
    first: dict[str, int] = {}
    for i, item in enumerate(items):
        if item.base_model is not None:
            base = item.base_model.lower()
            yield i, first.setdefault(base, ids.get(base, i))
