"""The order of neurons in which one network is another: layer by layer, from the inputs on."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from modeling_wsl.embedding.network_layers import LayerPlan, read_layers
from modeling_wsl.embedding.profile import feeds


MAX_NEURONS = 2048  # of a layer whose neurons are matched: the cost grows with the third power
MIN_INPUTS = 16  # rows of fewer entries are alike by chance
REACH = 6
MATCHED_COSINE = 0.6  # mean over the matched rows of a copy; strangers stay below
EPS = 1e-12


@dataclass(frozen=True)
class MatchedLayer:
    """A layer of two networks, the neurons of the first put into the order of the second.

    Attributes:
        name: of the matrix in the second network.
        cosine: mean cosine of matched rows.
        moved: share of neurons that stand elsewhere.
        rescaled: spread of the rows' relative lengths (deviation of their logarithms).
        entries: of the matrix.
    """

    name: str
    cosine: float
    moved: float
    rescaled: float
    entries: int


@dataclass(frozen=True)
class Order:
    """Neurons of a layer: `order[j]` of the first network is j of the second, which is `scale[j]` times it."""

    order: np.ndarray
    scale: Tensor


def match_neurons(
    plans: Sequence[tuple[LayerPlan, LayerPlan]],
    reads: tuple[Callable[[str], Tensor], Callable[[str], Tensor]],
) -> list[MatchedLayer]:
    """Matches the neurons of two networks of the same shapes.

    Each layer's inputs are those of the layer before in its new order; its neurons are then assigned so that the
    cosines of their rows are largest. The last layer's outputs have a meaning and stay in place.

    Args:
        plans: the layers of both, of equal shapes, in order.
        reads: name -> tensor, of each.
    """
    matched = []
    before: deque[tuple[LayerPlan, Order]] = deque(maxlen=REACH)
    layers = zip(*(read_layers([pair[side] for pair in plans], reads[side]) for side in (0, 1)), strict=True)
    for index, (first, second) in enumerate(layers):
        plan = first.plan
        if not (first.is_complete and second.is_complete) or plan.shape[0] > MAX_NEURONS:
            continue
        known = next((order for layer, order in reversed(before) if feeds(layer, plan)), None)
        rows, targets = _reorder_inputs(first.weight, known).flatten(1), second.weight.flatten(1)
        lengths = [matrix.norm(dim=1) + EPS for matrix in (rows, targets)]
        cosines = (rows / lengths[0][:, None]) @ (targets / lengths[1][:, None]).T
        order = np.arange(len(rows))
        if index < len(plans) - 1 and rows.shape[1] >= MIN_INPUTS:
            assigned, places = linear_sum_assignment(cosines.numpy(), maximize=True)
            order[places] = assigned
        scale = lengths[1] / lengths[0][order]
        cosine = float(cosines[order, np.arange(len(order))].mean())
        moved = float((order != np.arange(len(order))).mean())
        spread = float(scale.clamp(1e-6, 1e6).log().std(correction=0))
        if rows.shape[1] >= MIN_INPUTS:
            matched.append(MatchedLayer(second.plan.name, cosine, moved, spread, plan.numel))
        before.append((plan, Order(order, scale)))
    return matched


def _reorder_inputs(weight: Tensor, known: Order | None) -> Tensor:
    """A weight `[out, in, k]` with its inputs as the second network has them: in its order, without its scale."""
    if known is None:
        return weight
    places = weight.shape[1] // len(known.order)  # of a map that was flattened
    grouped = weight.reshape(len(weight), len(known.order), places, -1)
    grouped = grouped[:, torch.from_numpy(known.order)] / known.scale[None, :, None, None].clamp(1e-6, 1e6)
    return grouped.reshape(weight.shape)


def mean_cosine(layers: Sequence[MatchedLayer]) -> float:
    """The mean over layers by their entries; 0 where none was matched."""
    entries = sum(layer.entries for layer in layers)
    return sum(layer.cosine * layer.entries for layer in layers) / entries if entries else 0.0
