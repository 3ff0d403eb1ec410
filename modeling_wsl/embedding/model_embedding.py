"""The embedding of a model from its weights alone, in three sections: profile, position, probe."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..checkpoints.canonical import embedding_view
from ..checkpoints.checkpoint import Checkpoint, open_checkpoint
from ..checkpoints.errors import NotTokenizableError
from .fingerprints import SIZE, Position, Probe
from .network_layers import NetworkLayer, plan_layers, read_layers
from .profile import Profile


SECTIONS = ("profile", "position", "probe")


@dataclass(frozen=True, repr=False)
class ModelEmbedding:
    """The sections of an embedding.

    Attributes:
        profile: float32 `[273]`; what kind of network it is and how it was trained: neighbors, properties. It does not
            depend on the order of neurons. Columns are of unlike scale: standardize them over a table.
        position: float32 `[128]` of norm 1; the weights where they stand. Cosines of copies are near 1.
        probe: float32 `[128]` of norm 1; responses to fixed inputs. Copies whose neurons are permuted or rescaled
            stay near; compare after the mean of a table is taken off.
        layers: the layers that were looked at, in order.
    """

    profile: np.ndarray
    position: np.ndarray
    probe: np.ndarray
    layers: tuple[str, ...]

    def __repr__(self) -> str:
        sections = ", ".join(f"{name}={getattr(self, name).shape[0]}" for name in SECTIONS)
        return f"ModelEmbedding({len(self.layers)} layers, {sections})"


def embed_model(source: Any, *, size: int = SIZE, **open_options: Any) -> ModelEmbedding:
    """Embeds a model by its weights alone: no backbone is needed.

    ```python
    embed_model("org/some-model").position @ embed_model("copy.pt").position  # near 1 for copies
    ```

    Args:
        source: what `open_checkpoint` reads: state dict, module, file, folder, Hub id.
        size: numbers of position and of probe.
        open_options: of `open_checkpoint`.

    Raises:
        CheckpointError: the source cannot be read safely, or holds no matrix.
    """
    with embedding_view(open_checkpoint(source, **open_options)) as checkpoint:
        return embed_checkpoint(checkpoint, size=size)


def embed_checkpoint(
    checkpoint: Checkpoint, *, size: int = SIZE, advance: Callable[[int], object] | None = None
) -> ModelEmbedding:
    """Embeds an open checkpoint; layers are read one at a time.

    Args:
        checkpoint: weights of any network, in whatever spelling (see `embedding_view`). Constants are passed over.
        size: numbers of position and of probe.
        advance: called with the number of entries of each layer that is done.

    Raises:
        NotTokenizableError: it has no matrix.
        NonFiniteWeightsError: a weight is NaN or infinite, and the checkpoint does not allow it.
    """
    profile, position, probe = Profile(), Position(size), Probe(size)
    names = []
    for layer in _layers(checkpoint):
        for section in (profile, position, probe):
            section.add(layer)
        names.append(layer.plan.name)
        if advance is not None:
            advance(layer.plan.numel)
    return ModelEmbedding(profile.vector(), position.vector(), probe.vector(), tuple(dict.fromkeys(names)))


def position_of(checkpoint: Checkpoint) -> np.ndarray:
    """The section `position` alone, float32 `[128]`, in a quarter of the time of `embed_checkpoint`.

    Raises:
        NotTokenizableError, NonFiniteWeightsError: see `embed_checkpoint`.
    """
    position = Position()
    for layer in _layers(checkpoint):
        position.add(layer)
    return position.vector()


def _layers(checkpoint: Checkpoint) -> Iterator[NetworkLayer]:
    """The layers of a network in order, one at a time in memory."""
    view = embedding_view(checkpoint)
    plans = plan_layers(spec for name, spec in view.tensors.items() if name not in view.constants)
    if not plans:
        advice = "Pass a model with a tensor of two dimensions or more"
        raise NotTokenizableError(checkpoint.source, "holds no matrix to embed", advice)

    def read(name: str) -> Tensor:
        tensor = view.read(name)
        view.check_finite(name, tensor)
        return tensor

    yield from read_layers(plans, read)
