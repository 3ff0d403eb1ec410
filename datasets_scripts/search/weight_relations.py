"""Relations between models by their weights and by what they state: distances, copies, families of models."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_wsl.run_folder import SETTINGS_FILE
from modeling_wsl import open_checkpoint
from modeling_wsl.checkpoints.canonical import canonical
from modeling_wsl.checkpoints.checkpoint import Checkpoint
from modeling_wsl.checkpoints.errors import read_json
from modeling_wsl.tokens.manifest import TensorSpec, batch_norm_names

from ..sources import PROPERTIES_FILE, ZOO_MODELS, ModelSource


logger = logging.getLogger(__name__)
PIECE_ENTRIES = 1 << 22  # of all compared models together


class NotComparableError(ValueError):
    """Models whose weights have nothing to compare."""


def open_source(model: ModelSource, allow_nonfinite: bool = False) -> Checkpoint:
    """The model's weights, at its revision if it is on the Hub."""
    options = {} if model.path else {"revision": model.revision}
    return open_checkpoint(model.location, allow_nonfinite=allow_nonfinite, **options)


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
