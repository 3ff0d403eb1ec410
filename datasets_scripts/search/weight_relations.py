"""Relations between models by their weights and by what they state: distances, copies, families of models."""

import hashlib
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
from modeling_wsl.checkpoints.checkpoint import Checkpoint
from modeling_wsl.checkpoints.errors import read_json
from modeling_wsl.tokens.manifest import batch_norm_names

from ..model_facts import HubFacts, find_facts
from ..near_copies import NearCopyItem, fingerprint, near_copy_groups
from ..sources import PROPERTIES_FILE, ZOO_MODELS, ModelSource


PIECE_ENTRIES = 1 << 22  # of all compared models together
EXACT, NEAR, FINE_TUNE, REORDERED = "exact", "near", "fine-tune-like", "reordered"
# Noise of 1 % of a tensor's deviation, and casts to sixteen or eight bits, stay below; fine-tunes seldom do.
NEAR_DISTANCE = 0.02


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
    """Hash of the names and sorted entries of all tensors: the same for a copy whose neurons are permuted."""
    digest = hashlib.sha256()
    for name in sorted(checkpoint.tensors):
        digest.update(name.encode())
        digest.update(checkpoint.read(name).reshape(-1).float().sort().values.numpy().tobytes())
    return digest.hexdigest()


def _properties(model: ModelSource) -> Mapping[str, Any]:
    path = model.path / PROPERTIES_FILE if model.path is not None and model.path.is_dir() else None
    return read_json(path, PROPERTIES_FILE) if path is not None and path.is_file() else {}


@dataclass(frozen=True)
class WeightComparison:
    """Of g models, over the floating-point tensors that all of them have, batch-norm statistics left out.

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
    """Compares models pairwise in the memory of some pieces of their tensors.

    Args:
        checkpoints: g open ones.

    Raises:
        ValueError: no tensor is of the same name and shape in all of them.
    """
    names = _shared(checkpoints)
    if not names:
        raise ValueError(f"{checkpoints[0].source} and the models beside it share no tensor. Compare fewer of them.")
    count = len(checkpoints)
    gram, norms = np.zeros((count, count)), np.zeros(count)
    kurtosis, entries = [], 0
    for name in names:
        spec = checkpoints[0].tensors[name]
        flat = [checkpoint.read(name).reshape(-1) for checkpoint in checkpoints]
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
    return WeightComparison(distances, np.sqrt(norms), mean_kurtosis, len(names), entries)


def _shared(checkpoints: Sequence[Checkpoint]) -> list[str]:
    first = checkpoints[0]
    statistics = batch_norm_names(first.tensors)
    return [
        name
        for name, spec in first.tensors.items()
        if spec.torch_dtype.is_floating_point
        and spec.torch_dtype != torch.float4_e2m1fn_x2  # packed: not numbers one by one
        and spec.numel
        and name not in statistics
        and all(
            name in other.tensors
            and other.tensors[name].shape == spec.shape
            and other.tensors[name].torch_dtype.is_floating_point
            for other in checkpoints[1:]
        )
    ]


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
            if first.tensors != second.tensors:
                return False
            return self._sorted_hash(a, first) == self._sorted_hash(b, second)

    def kind(self, a: str, b: str) -> str:
        """EXACT (all tensors are the same bit for bit), NEAR or FINE_TUNE, of two models that are copies."""
        with open_source(self._models[a]) as first, open_source(self._models[b]) as second:
            comparison = compare_weights([first, second])
            relative = comparison.distances[0, 1] / max(comparison.norms.max(), 1e-30)
            if relative == 0 and _are_identical(first, second):
                return EXACT
        return NEAR if relative <= NEAR_DISTANCE else FINE_TUNE

    def _item(self, name: str) -> NearCopyItem:
        if name not in self._fingerprints:
            with open_source(self._models[name]) as checkpoint:
                self._fingerprints[name] = NearCopyItem(name, fingerprint(checkpoint))
        return self._fingerprints[name]

    def _sorted_hash(self, name: str, checkpoint: Checkpoint) -> str:
        if name not in self._hashes:
            self._hashes[name] = sorted_hash(checkpoint)
        return self._hashes[name]


def _are_identical(first: Checkpoint, second: Checkpoint) -> bool:
    """Bytes are compared: `compare_weights` leaves out batch-norm statistics and integers."""
    return first.tensors == second.tensors and all(
        torch.equal(*(model.read(name).reshape(-1).view(torch.uint8) for model in (first, second)))
        for name in first.tensors
    )
