"""Relations between models by their weights and by what they state: distances, copies, families of models."""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from hf_wsl.run_folder import SETTINGS_FILE
from modeling_wsl import open_checkpoint
from modeling_wsl.checkpoints.canonical import canonical, equal_values, same_network
from modeling_wsl.checkpoints.checkpoint import Checkpoint
from modeling_wsl.checkpoints.errors import CheckpointError, read_json
from modeling_wsl.checkpoints.order import natural_key
from modeling_wsl.tokens.manifest import TensorSpec, batch_norm_names

from ..model_facts import HubFacts, find_facts
from ..near_copies import NearCopyItem, fingerprint, near_copy_groups
from ..sources import PROPERTIES_FILE, ZOO_MODELS, ModelSource


logger = logging.getLogger(__name__)
PIECE_ENTRIES = 1 << 22  # of all compared models together
EXACT, NEAR, FINE_TUNE, REORDERED = "exact", "near", "fine-tune-like", "reordered"
NOT_COMPARABLE = "not comparable"
# Noise of 1 % of a tensor's deviation, and casts to sixteen or eight bits, stay below; fine-tunes seldom do.
NEAR_DISTANCE = 0.02


class NotComparableError(ValueError):
    """Models whose weights have nothing to compare."""


def open_source(model: ModelSource) -> Checkpoint:
    """The model's weights, at its revision if it is on the Hub."""
    return open_checkpoint(model.location, **({} if model.path else {"revision": model.revision}))


def stated_parents(models: Sequence[ModelSource]) -> dict[str, str]:
    """Child -> parent, model ids, of the models of zoos that were fine-tuned from another one of the models.

    A zoo names a parent by its id in another zoo, whose folder is in the settings; ids repeat from zoo to zoo.
    """
    by_path = {model.path: model.model_id for model in models if model.path is not None}
    parents = {}
    for model in models:
        stated = _properties(model).get("parent")
        settings = model.path.parents[2] / SETTINGS_FILE if stated else None
        if settings is not None and settings.is_file():
            zoo = Path(read_json(settings, SETTINGS_FILE).get("parents") or "").absolute()
            if (parent := by_path.get(zoo / ZOO_MODELS / stated)) is not None:
                parents[model.model_id] = parent
    return parents


def related_groups(models: Sequence[ModelSource]) -> list[int]:
    """Groups models of one owner, checkpoints of one zoo member, parents with children, and copies by weights: near
    ones, and those with permuted neurons.

    Returns:
        for each model the number of its group.

    Raises:
        CheckpointError: a model cannot be read.
    """
    parents = stated_parents(models)
    owners, hashes, items = [], [], []
    for model in models:
        owner = find_facts(model, {}, None, None, HubFacts()).owner
        owners.append(str(model.path.parent) if "member" in _properties(model) else owner or model.model_id)
        with open_source(model) as checkpoint:
            hashes.append(sorted_hash(checkpoint))
            items.append(NearCopyItem(model.model_id, fingerprint(checkpoint), parents.get(model.model_id)))
    first: dict[tuple[int, str], int] = {}
    edges = [
        (i, first.setdefault((kind, label), i))
        for kind, labels in enumerate((owners, hashes, near_copy_groups(items)))
        for i, label in enumerate(labels)
    ]
    i, j = np.array(edges).T
    _, group = connected_components(coo_array((np.ones(len(i)), (i, j)), shape=(len(models),) * 2), directed=False)
    return group.tolist()


def sorted_hash(checkpoint: Checkpoint) -> str:
    """Hash of the canonical names and sorted entries of all tensors: that of a copy whose neurons are permuted too."""
    view = canonical(checkpoint)
    digest = hashlib.sha256()
    for name in sorted(view.tensors):
        digest.update(name.encode())
        digest.update(view.read(name).reshape(-1).float().sort().values.numpy().tobytes())
    return digest.hexdigest()


def _properties(model: ModelSource) -> Mapping[str, Any]:
    path = model.path / PROPERTIES_FILE if model.path is not None and model.path.is_dir() else None
    return read_json(path, PROPERTIES_FILE) if path is not None and path.is_file() else {}


@dataclass(frozen=True)
class WeightComparison:
    """Of g models, over the floating-point tensors that the canonical views of all have, without running statistics.

    Attributes:
        distances: float64 `[g, g]`, Euclidean, of the weights.
        norms: float64 `[g]`, Euclidean, of the weights.
        kurtosis: float64 `[g]`, the mean over matrices of the kurtosis of their entries (3 for a normal distribution).
        tensors, entries: how many are compared.
    """

    distances: np.ndarray
    norms: np.ndarray
    kurtosis: np.ndarray
    tensors: int
    entries: int


def compare_weights(checkpoints: Sequence[Checkpoint]) -> WeightComparison:
    """Compares models pairwise by their canonical views, in the memory of some pieces of their tensors.

    Args:
        checkpoints: g open ones.

    Raises:
        NotComparableError: no tensor is of the same name and shape in all of them.
    """
    views = [canonical(checkpoint) for checkpoint in checkpoints]
    shared = _shared(views)
    if not shared:
        raise NotComparableError(
            f"{checkpoints[0].source} and the models beside it share no tensor. Compare fewer of them."
        )
    count = len(views)
    gram, norms = np.zeros((count, count)), np.zeros(count)
    kurtosis, entries = [], 0
    for names in shared:
        spec = views[0].tensors[names[0]]
        flat = [view.read(name).reshape(-1) for view, name in zip(views, names, strict=True)]
        moments = np.zeros((4, count))
        for start in range(0, spec.numel, max(1, PIECE_ENTRIES // count)):
            piece = torch.stack([t[start : start + max(1, PIECE_ENTRIES // count)].double() for t in flat]).numpy()
            norms += np.square(piece).sum(1)
            moments += [(piece**power).sum(1) for power in range(1, 5)]
            piece -= piece.mean(0)  # what all have in common would drown the differences in rounding
            gram += piece @ piece.T
        entries += spec.numel
        if len(spec.shape) > 1:
            kurtosis.append(_kurtosis(moments / spec.numel))
    square = np.diag(gram)
    distances = np.sqrt(np.maximum(square[:, None] + square - 2 * gram, 0))
    mean_kurtosis = np.mean(kurtosis, axis=0) if kurtosis else np.zeros(count)
    return WeightComparison(distances, np.sqrt(norms), mean_kurtosis, len(shared), entries)


def _shared(views: Sequence[Checkpoint]) -> list[tuple[str, ...]]:
    """The names of each tensor that all views have, one a view."""
    first = views[0].tensors
    statistics = batch_norm_names(first)
    others = [aligned_names(first, view.tensors) for view in views[1:]]
    return [
        (name, *(names[name] for names in others))
        for name, spec in first.items()
        if spec.torch_dtype.is_floating_point
        and spec.torch_dtype != torch.float4_e2m1fn_x2  # packed: not numbers one by one
        and spec.numel
        and name not in statistics
        and all(
            name in names and view.tensors[names[name]].torch_dtype.is_floating_point
            for names, view in zip(others, views[1:], strict=True)
        )
    ]


def aligned_names(first: Mapping[str, TensorSpec], other: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Name of a tensor in one canonical view -> its name in another, where shapes agree.

    Names are the same, but for one prefix where most of what is left over has it: a model beside its own backbone,
    which a head keeps from being the one that all tensors share (`vit.` and `classifier.`).
    """
    left, free = first.keys() - other.keys(), other.keys() - first.keys()
    votes: Counter[tuple[str, str]] = Counter()
    for names, there, at in ((left, free, 0), (free, left, 1)):
        for name in names:
            parts = name.split(".")
            for cut in range(1, min(len(parts), 4)):
                if ".".join(parts[cut:]) in there:
                    prefix = ".".join(parts[:cut]) + "."
                    votes[(prefix, "") if at == 0 else ("", prefix)] += 1
    names = {name: name for name in first if name in other}
    if votes:
        ours, theirs = min(votes, key=lambda pair: (-votes[pair], pair))
        moved = {name: theirs + name.removeprefix(ours) for name in left if name.startswith(ours)}
        names |= {name: moved_name for name, moved_name in moved.items() if moved_name in free}
    return {name: there for name, there in names.items() if first[name].shape == other[there].shape}


def _kurtosis(moments: np.ndarray) -> np.ndarray:
    """From the raw moments 1 to 4 `[4, g]`; 0 where all entries are equal."""
    first, second, third, fourth = moments
    variance = second - first**2
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    varies = variance > 1e-12 * second
    return np.divide(central, variance**2, out=np.zeros_like(central), where=varies)


class WeightVerdicts:
    """Compares models whose weights are at hand; what was read of a model is kept for the next comparison."""

    def __init__(self, models: Sequence[ModelSource]):
        self._models = {model.model_id: model for model in models}
        self._fingerprints: dict[str, NearCopyItem] = {}
        self._hashes: dict[str, str] = {}

    def __contains__(self, model_id: str) -> bool:
        return model_id in self._models

    def are_copies(self, a: str, b: str) -> bool:
        """Whether most sampled tensors of two models are nearly the same (`near_copy_groups`)."""
        return len(set(near_copy_groups([self._item(a), self._item(b)]))) == 1

    def are_reordered(self, a: str, b: str) -> bool:
        """Whether two models hold the same numbers, tensor by tensor, in whatever order: permuted neurons."""
        with open_source(self._models[a]) as first, open_source(self._models[b]) as second:
            if _shapes(canonical(first)) != _shapes(canonical(second)):
                return False
            return self._sorted_hash(a, first) == self._sorted_hash(b, second)

    def kind(self, a: str, b: str) -> str:
        """EXACT (the same network, all numbers equal), NEAR or FINE_TUNE, of two models that are copies.

        Raises:
            NotComparableError: they share no tensor.
        """
        with open_source(self._models[a]) as first, open_source(self._models[b]) as second:
            comparison = compare_weights([first, second])
            relative = comparison.distances[0, 1] / max(comparison.norms.max(), 1e-30)
            if relative == 0 and _counts_agree(first, second) and same_network(first, second):
                return EXACT
            return NEAR if relative <= NEAR_DISTANCE or _is_cast(first, second) else FINE_TUNE

    def relation(self, a: str, b: str, are_close: bool) -> str | None:
        """The relation of two models by their weights; None where they are no copies.

        Args:
            a, b: model ids.
            are_close: their embeddings are: reordered copies are looked for, and what hinders comparing them is told
                as NOT_COMPARABLE with the reason. Of other pairs, that is no copy.
        """
        try:
            if self.are_copies(a, b):
                return self.kind(a, b)
            if are_close and self.are_reordered(a, b):
                return EXACT if self.kind(a, b) == EXACT else REORDERED
        except (CheckpointError, NotComparableError) as error:
            reason = error.reason if isinstance(error, CheckpointError) else str(error)
            logger.warning("%s and %s are not comparable: %s", a, b, reason)
            return f"{NOT_COMPARABLE}: {reason}" if are_close else None
        return None

    def _item(self, name: str) -> NearCopyItem:
        if name not in self._fingerprints:
            with open_source(self._models[name]) as checkpoint:
                self._fingerprints[name] = NearCopyItem(name, fingerprint(checkpoint))
        return self._fingerprints[name]

    def _sorted_hash(self, name: str, checkpoint: Checkpoint) -> str:
        if name not in self._hashes:
            self._hashes[name] = sorted_hash(checkpoint)
        return self._hashes[name]


def _shapes(view: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for name, spec in view.tensors.items()}


def _counts_agree(first: Checkpoint, second: Checkpoint) -> bool:
    """Whether batch norms counted the same batches, where both models say it; the canonical view has no counters."""
    counts = [
        [
            checkpoint.read(name).reshape(-1).tolist()
            for name in sorted(checkpoint.tensors, key=natural_key)
            if name.endswith("num_batches_tracked")
        ]
        for checkpoint in (first, second)
    ]
    return counts[0] == counts[1] or not all(counts)


def _is_cast(first: Checkpoint, second: Checkpoint) -> bool:
    """Whether one model is the other, rounded to a narrower dtype: of tiny weights little may be left."""
    views = [canonical(checkpoint) for checkpoint in (first, second)]
    if _shapes(views[0]) != _shapes(views[1]):
        return False
    for name in views[0].tensors:
        one, other = sorted((view.read(name) for view in views), key=lambda tensor: tensor.dtype.itemsize)
        if not (equal_values(one, other) or (one.is_floating_point() and equal_values(one, other.to(one.dtype)))):
            return False
    return True
