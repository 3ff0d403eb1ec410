"""What two models with similar embeddings are to each other, by their weights."""

from collections.abc import Sequence

import torch

from modeling_wsl.checkpoints.checkpoint import Checkpoint

from ..near_copies import NearCopyItem, fingerprint, near_copy_groups
from ..sources import ModelSource
from .related_models import open_source, sorted_hash
from .weight_distances import compare_weights


EXACT, NEAR, FINE_TUNE, REORDERED = "exact", "near", "fine-tune-like", "reordered"
# Noise of 1 % of a tensor's deviation, and casts to sixteen or eight bits, stay below; fine-tunes seldom do.
NEAR_DISTANCE = 0.02


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
