"""Who was fine-tuned from whom: a tree over models of one origin, from their weights alone."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.sparse.csgraph import minimum_spanning_tree

from modeling_wsl.checkpoints.errors import CheckpointError
from modeling_wsl.embedding.model_embedding import position_of

from ..sources import ModelSource
from .duplicates import NOT_COMPARABLE, components
from .fingerprints import POSITION_COSINE
from .weight_relations import (
    NotComparableError,
    WeightComparison,
    compare_weights,
    open_source,
    stated_parents,
)


logger = logging.getLogger(__name__)
SIBLING_SHARE = 0.25  # of the squared distance: between 0 for parent and child, and 0.5 for siblings


@dataclass(frozen=True)
class Descent:
    """An edge of the tree.

    Attributes:
        parent, child: model ids.
        distance: of their weights, relative to the norm of the parent's.
        agreement: share of the signs of direction (growing norm, growing kurtosis) that say the same: 0, 0.5 or 1.
        stated: whether the child states this parent; None where it states none of the group.
    """

    parent: str
    child: str
    distance: float
    agreement: float
    stated: bool | None


@dataclass(frozen=True)
class LineageTree:
    """The likely descent of a group of models.

    Attributes:
        root: model id.
        edges: from the root downwards.
        agreement: mean agreement of the edges: 1 where all signs point away from the root, 0.5 for a coin.
        margin: by how much the second best root agrees less; 0 means that nothing but the order tells them apart.
        tensors, entries: how many are compared.
        problem: why the models, of which `root` is the first, cannot be compared; then there are no edges.
    """

    root: str
    edges: tuple[Descent, ...]
    agreement: float
    margin: float
    tensors: int
    entries: int
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """The tree as text, one line a model."""
        if self.problem is not None:
            yield f"{self.root}  ({NOT_COMPARABLE}: {self.problem})"
            return
        yield (
            f"{self.root}  (root: {self.agreement:.0%} of the signs agree, {self.margin:.0%} more than for the next "
            f"best; {self.tensors} tensors, {self.entries:,} entries)"
        )
        yield from self._below(self.root, "")

    def _below(self, parent: str, indent: str) -> Iterator[str]:
        own = [edge for edge in self.edges if edge.parent == parent]
        for edge in own:
            last = edge is own[-1]
            stated = "" if edge.stated is None else ", as it states" if edge.stated else ", though it states another"
            signs = f"{edge.agreement:.0%} of the signs agree"
            yield f"{indent}{'└─' if last else '├─'} {edge.child}  (distance {edge.distance:.3g}, {signs}{stated})"
            yield from self._below(edge.child, indent + ("   " if last else "│  "))


def lineage_trees(models: Sequence[ModelSource], allow_nonfinite: bool = False) -> list[LineageTree]:
    """Groups models of one origin (by the position cosine of copies, `fingerprints.py`), and the tree of each group.

    Edges: the minimum spanning tree of the Euclidean distances of weights over the tensors that the group shares, with
    siblings hung on their common parent. Horwitz et al. 2024 ("Unsupervised Model Tree Heritage Recovery", arXiv
    2405.18432) build trees of weight distances too, and direct them by the kurtosis of weights, which changes one way
    along a branch. Direction, here: training makes norms and kurtosis grow more often than not, so the root is the
    model from which most edges lead to larger ones.

    That is a guess with odds. Over 40 known trees of 8 small networks on digits (MLP and CNN, five kinds of tasks,
    AdamW and SGD) 82 % of the roots and 84 % of the directed edges were right, where fine-tunes got new heads 88 % and
    95 %; given the root, 91 % of the edges. Roots with a large margin were not right more often. A model that was
    trained further along the way of a sibling cannot be told from that one's child.

    Args:
        allow_nonfinite: compare weights that hold NaN or infinite values too.
        models: to group. Those of a group are open at once, mapped, and compared piece by piece.

    Returns:
        The trees of groups of at least two models, in the order of their first models. A model that cannot be read is
        left out with a warning.
    """
    positions, readable = [], []
    for model in models:
        try:
            with open_source(model, allow_nonfinite) as checkpoint:
                positions.append(position_of(checkpoint))
        except CheckpointError as error:
            logger.warning("left out: %s", error)
            continue
        readable.append(model)
    if not positions:
        return []
    cosines = np.stack(positions) @ np.stack(positions).T
    links = [(int(i), int(j)) for i, j in np.argwhere(np.triu(cosines > POSITION_COSINE, 1))]
    groups = components(links, len(readable))
    return [_tree_or_problem([readable[at] for at in group], allow_nonfinite) for group in groups]


def _tree_or_problem(models: Sequence[ModelSource], allow_nonfinite: bool) -> LineageTree:
    try:
        return lineage_tree(models, allow_nonfinite)
    except (CheckpointError, NotComparableError) as error:
        names = ", ".join(model.model_id for model in models[1:])
        reason = error.reason if isinstance(error, CheckpointError) else str(error)
        return LineageTree(models[0].model_id, (), 0.0, 0.0, 0, 0, problem=f"beside {names}: {reason}")


def lineage_tree(models: Sequence[ModelSource], allow_nonfinite: bool = False) -> LineageTree:
    """The tree over models of one origin; see `lineage_trees`.

    Raises:
        CheckpointError: a model cannot be read.
        NotComparableError: no tensor is in all of them.
    """
    with ExitStack() as stack:
        comparison = compare_weights([stack.enter_context(open_source(model, allow_nonfinite)) for model in models])
    logger.info("compared %d models of %d shared tensors", len(models), comparison.tensors)
    # scipy takes a distance of 0, that of exact copies, for no edge; what is added to all does not change the tree.
    weights = comparison.distances + (comparison.distances.max() or 1.0)
    links = np.argwhere(minimum_spanning_tree(np.triu(weights, 1)).toarray() > 0)
    rooted = [_rooted(links, root) for root in range(len(models))]
    agreements = [np.mean([_agreement(comparison, *edge) for edge in edges]) for edges in rooted]
    root = int(np.argmax(agreements))
    second = max(value for at, value in enumerate(agreements) if at != root)
    stated = stated_parents(models)
    names = [model.model_id for model in models]
    edges = []
    for parent, child in _lifted(rooted[root], comparison.distances):
        said = stated.get(names[child])
        edges.append(
            Descent(
                names[parent],
                names[child],
                float(comparison.distances[parent, child] / max(comparison.norms[parent], 1e-30)),
                _agreement(comparison, parent, child),
                None if said is None else said == names[parent],
            )
        )
    best = float(agreements[root])
    return LineageTree(names[root], tuple(edges), best, best - second, comparison.tensors, comparison.entries)


def _rooted(links: np.ndarray, root: int) -> list[tuple[int, int]]:
    """The undirected edges `[g - 1, 2]` of a tree as (parent, child), breadth first from a root."""
    neighbors: dict[int, list[int]] = {}
    for a, b in links.tolist():
        neighbors.setdefault(a, []).append(b)
        neighbors.setdefault(b, []).append(a)
    edges, seen, frontier = [], {root}, [root]
    for parent in frontier:
        for child in sorted(neighbors.get(parent, [])):
            if child not in seen:
                seen.add(child)
                edges.append((parent, child))
                frontier.append(child)
    return edges


def _lifted(edges: Sequence[tuple[int, int]], distances: np.ndarray) -> list[tuple[int, int]]:
    """Hangs siblings, which a spanning tree chains, on their common parent; parents still come first.

    Fine-tunes s, t of p that are trained on one task drift the same way before they part, and are nearer to each other
    than to p. Were t a child of s, `(p - s)(t - s)` would be 0 or, on a straight way, negative; of siblings it is half
    the squared distance of s and t.
    """
    squared = distances**2
    parent = {child: of for of, child in edges}
    for _, child in edges:
        while (of := parent[child]) in parent:
            above = parent[of]
            product = (squared[above, of] + squared[of, child] - squared[above, child]) / 2
            if product <= SIBLING_SHARE * squared[of, child]:
                break
            parent[child] = above
    return [(of, child) for child, of in parent.items()]


def _agreement(comparison: WeightComparison, parent: int, child: int) -> float:
    signs = [comparison.norms, comparison.kurtosis]
    return float(np.mean([(np.sign(sign[child] - sign[parent]) + 1) / 2 for sign in signs]))
