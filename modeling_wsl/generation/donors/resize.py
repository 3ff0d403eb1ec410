"""A donor's tensors brought to a target's sizes: one evenly spaced map for every space of neurons.

Fewer neurons: evenly spaced ones are kept. More: neighbors are repeated, and whatever reads them is divided by how
often; the function stays the same. Heads and groups are mapped whole, then the neurons within them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .neurons import Neurons, Space
from .pairing import Pairing
from .trace import Trace


@dataclass(frozen=True)
class Network:
    """A network as `fit` and `resize` see it: its trace and its neurons."""

    trace: Trace
    neurons: Neurons


@dataclass(frozen=True)
class NeuronMap:
    """Of a target's space: for every neuron the donor's, int64 `[n]` (-1: it has none), and how often that is used."""

    neurons: np.ndarray
    multiplicity: np.ndarray


def evenly_spaced(count: int, donors: int) -> np.ndarray:
    """int64 `[count]`: evenly spaced ones of `donors`; neighbors are repeated where there are fewer."""
    return np.arange(count) * donors // count


class Transfer:
    """Carries tensors of a donor over to a target of other sizes.

    Args:
        target, donor: what was traced of them.
        pairing: of their tensors.

    Attributes:
        maps: target space -> its map.
        tied: weights that are an embedding and a map at once.
        growing: no space is smaller than the donor's and no block is left out: the function can stay the same.
    """

    def __init__(self, target: Network, donor: Network, pairing: Pairing) -> None:
        self.target, self.donor, self.pairing = target, donor, pairing
        self.maps: dict[int, NeuronMap] = {}
        self.neuron = np.full(target.trace.count, -1, np.int64)  # target's neuron -> donor's neuron
        self.head_ratio: dict[int, float] = {}  # the size of a head by the donor's, of spaces of queries and keys
        self.growing = not pairing.unused
        self.tied = set(target.trace.embeddings) & {one.weight for one in target.trace.maps}
        self.before_tied = {name for one in target.trace.maps if one.weight in self.tied for name in one.before}
        for index, space in enumerate(target.neurons.spaces):
            if (partner := self._partner(space)) is not None:
                self._map(index, space, partner)

    def _partner(self, space: Space) -> Space | None:
        name, axis = space.root
        own = self.target.neurons.axes[name][axis]
        if (other := self.pairing.tensors.get(name)) not in self.donor.neurons.axes:
            return None
        theirs = self.donor.neurons.axes[other]
        if axis >= len(theirs):
            return None
        # The same segment of the axis, where it holds several spaces (queries, keys and values in one matrix).
        mine = _segments(own, self.target.neurons.space_of)
        others = _segments(theirs[axis], self.donor.neurons.space_of)
        place = next(place for place, index in enumerate(mine) if self.target.neurons.spaces[index] is space)
        if place >= len(others):
            return None
        return self.donor.neurons.spaces[others[place]]

    def _map(self, index: int, space: Space, partner: Space) -> None:
        if space.output and len(space) != len(partner):
            return  # other classes: nothing of the donor's stands for them
        chosen = map_neurons(space, partner)
        counts = np.bincount(chosen, minlength=len(partner))
        self.growing &= bool((counts > 0).all())
        self.maps[index] = NeuronMap(partner.neurons[chosen], counts[chosen])
        self.neuron[space.neurons] = partner.neurons[chosen]
        for mine, theirs in zip(space.labels, partner.labels, strict=False):
            for part in range(len(mine)):
                of = chosen[np.flatnonzero(space.parts[space.labels.index(mine)] == part)[0]]
                self.neuron[mine[part]] = theirs[partner.parts[partner.labels.index(theirs)][of]]
        if space.queries and space.parts and partner.parts:
            sizes = [len(one) / (one.parts[-1].max() + 1) for one in (space, partner)]
            self.head_ratio[index] = sizes[0] / sizes[1]

    def entries(self, name: str, axis: int) -> np.ndarray | None:
        """For every entry of a target tensor's axis the entry of the donor's tensor, -1 where there is none.

        None: neither axis holds neurons (kernels, positions, inputs, classes).
        """
        own = self.target.neurons.axes[name][axis]
        theirs = self.donor.neurons.axes[self.pairing.tensors[name]][axis]
        mapped = self.neuron[own]
        if (mapped < 0).all():
            return None
        places: dict[int, list[int]] = {}
        for place, neuron in enumerate(theirs.tolist()):
            places.setdefault(neuron, []).append(place)
        counts = dict(zip(*(part.tolist() for part in np.unique(own, return_counts=True)), strict=True))
        seen: dict[int, int] = {}
        entries = np.full(len(own), -1, np.int64)
        for place, (neuron, other) in enumerate(zip(own.tolist(), mapped.tolist(), strict=True)):
            turn = seen.get(neuron, 0)
            seen[neuron] = turn + 1
            if held := places.get(other):
                inner = self.target.neurons.least[neuron], self.donor.neurons.least[other]
                entries[place] = held[_occurrence(turn, counts[neuron], len(held), *inner)]
        return entries

    def reads_inputs(self, name: str) -> bool:
        """Whether the second axis of a target's tensor is over what the network is given, not over neurons."""
        known = name in {one.weight for one in self.target.trace.maps}
        known &= self.pairing.tensors[name] in self.donor.neurons.axes
        return known and name not in self.target.trace.groups and self.entries(name, 1) is None

    def tensor(self, name: str, value: Tensor, shape: torch.Size, divide: bool = True) -> Tensor | None:
        """The donor's value for a target's tensor, float32 of `shape`; None: its axes cannot be brought to it.

        Args:
            name: of the target.
            value: of the donor's partner.
            divide: whatever reads repeated neurons is divided by how often they are repeated.
        """
        value, trace = value.float(), self.target.trace
        grouped = trace.groups.get(name, (None, 1))[1] > 1
        if grouped and (value := self._grouped(name, value, shape)) is None:
            return None
        for axis in range(value.dim()):
            if grouped and axis < 2:
                continue
            entries = self.entries(name, axis)
            if entries is None:
                continue
            picked = value.index_select(axis, torch.from_numpy(np.maximum(entries, 0)))
            factor = torch.from_numpy((entries >= 0).astype(np.float32))
            own = self.target.neurons.axes[name][axis]
            if (name, axis) in trace.reading and divide and name not in self.tied:
                repeated = np.bincount(np.maximum(entries, 0), entries >= 0)[np.maximum(entries, 0)]
                factor /= torch.from_numpy(np.maximum(repeated, 1).astype(np.float32))
            elif divide:
                factor *= self._query_factor(own)
                if name in self.before_tied:  # the tied weight that reads it cannot be divided, for it writes too
                    counts = np.bincount(entries[entries >= 0])
                    factor /= torch.from_numpy(counts[np.maximum(entries, 0)].astype(np.float32))
            value = picked * factor.view([-1 if one == axis else 1 for one in range(value.dim())])
        return resample(value, shape, self.by_position(name))

    def by_position(self, name: str) -> bool:
        """Whether a target's tensor holds a vector for every position (and not for a class or a word)."""
        trace = self.target.trace
        if name in trace.embeddings:
            return name in trace.positions
        return name not in {one.weight for one in trace.maps}

    def _query_factor(self, own: np.ndarray) -> Tensor:
        """Scores sum over repeated (or missing) neurons of a head and are scaled by the root of its size.

        The factor's root is on both sides, for the trace sees queries and keys as one space.
        """
        factor = np.ones(len(own), np.float32)
        for place, index in enumerate(self.target.neurons.space_of[own].tolist()):
            if ratio := self.head_ratio.get(index):
                repeated = self._within_head(index)[own[place]] if ratio > 1 else ratio
                factor[place] = (ratio**0.5 / repeated) ** 0.5
        return torch.from_numpy(factor)

    def outputs(self, name: str, axis: int, rows: Tensor) -> Tensor | None:
        """What a map of the target should give, of the outputs `[n, out]` of the donor's map; None: not all has a
        partner.

        Args:
            name: of the target's weight.
            axis: of the weight, which its outputs are on.
            rows: float32.
        """
        entries = self.entries(name, axis)
        if entries is None or (entries < 0).any() or entries.max() >= rows.shape[1]:
            return None
        factor = self._query_factor(self.target.neurons.axes[name][axis])
        return rows[:, torch.from_numpy(entries)] * factor

    @functools.cache  # noqa: B019 - a transfer lives as long as one generation
    def _within_head(self, index: int) -> dict[int, int]:
        """How often a neuron is repeated within its own head; repeated heads are no sum."""
        space, chosen = self.target.neurons.spaces[index], self.maps[index].neurons
        pairs = list(zip(space.parts[-1].tolist(), chosen.tolist(), strict=True))
        counts: dict[tuple[int, int], int] = {}
        for pair in pairs:
            counts[pair] = counts.get(pair, 0) + 1
        return {neuron: counts[pair] for neuron, pair in zip(space.neurons.tolist(), pairs, strict=True)}

    def _grouped(self, name: str, value: Tensor, shape: torch.Size) -> Tensor | None:
        """Both channel axes of a grouped convolution: the second one means other channels in every group."""
        other = self.pairing.tensors[name]
        rows = self.entries(name, 0)
        if other not in self.donor.trace.groups or rows is None:
            return None
        (mine, groups), (theirs, their_groups) = self.target.trace.groups[name], self.donor.trace.groups[other]
        mine = self.neuron[self.target.neurons.label[mine.numpy()]].reshape(groups, -1)  # [groups, width]
        theirs = self.donor.neurons.label[theirs.numpy()].reshape(their_groups, -1)
        wanted = mine[np.arange(len(rows)) * groups // len(rows)]  # [rows, width]
        held = theirs[rows * their_groups // value.shape[0]]  # [rows, their width]
        match = wanted[:, :, None] == held[:, None, :]
        share = match.any(2) / np.maximum((wanted[:, :, None] == wanted[:, None, :]).sum(2), 1) * (rows >= 0)[:, None]
        entries = torch.from_numpy(match.argmax(2)).view(*wanted.shape, *[1] * (value.dim() - 2))
        picked = value[torch.from_numpy(np.maximum(rows, 0))].gather(1, entries.expand(-1, -1, *value.shape[2:]))
        return picked * torch.from_numpy(share.astype(np.float32)).view(entries.shape)


def _occurrence(turn: int, count: int, donors: int, inner: int, their_inner: int) -> int:
    """The donor's occurrence of a neuron for the target's.

    Rotary halves lie within a head, query heads of one key head around them: `inner` is how often every tensor holds
    the neuron at least, the rest goes around that.
    """
    outer, their_outer = max(count // inner, 1), max(donors // their_inner, 1)
    around, within = (turn // inner) * their_outer // outer, (turn % inner) * their_inner // inner
    return min(around * their_inner + within, donors - 1)


def _segments(axis: np.ndarray, space_of: np.ndarray) -> list[int]:
    """The spaces along an axis in their order; one that comes again later is a segment of its own."""
    spaces = space_of[axis]
    spaces = spaces[spaces >= 0]
    return [int(space) for place, space in enumerate(spaces) if place == 0 or spaces[place - 1] != space]


def map_neurons(space: Space, partner: Space) -> np.ndarray:
    """For every neuron of a space the place of its partner in the donor's space, int64 `[n]`.

    Parts (heads, groups) are mapped whole by `evenly_spaced`, the neurons within them likewise.
    """
    if not space.parts or not partner.parts:
        return evenly_spaced(len(space), len(partner))
    mine, theirs = space.parts[-1], partner.parts[-1]
    heads = evenly_spaced(mine.max() + 1, theirs.max() + 1)
    chosen = np.zeros(len(space), np.int64)
    for part, other in enumerate(heads):
        members, candidates = np.flatnonzero(mine == part), np.flatnonzero(theirs == other)
        chosen[members] = candidates[evenly_spaced(len(members), len(candidates))]
    return chosen


def resample(value: Tensor, shape: torch.Size, positions: bool) -> Tensor | None:
    """Kernels and positions by interpolation; None: another kind of axis differs.

    A kernel keeps its norm for white inputs: the values are scaled by the root of the ratio of their numbers.
    """
    if value.shape == shape:
        return value
    if value.dim() == 4 and value.shape[:2] == shape[:2]:
        kernel = functional.interpolate(value, tuple(shape[2:]), mode="bicubic", align_corners=False)
        if shape[0] == 1:
            return kernel  # a grid of positions
        return kernel * (value[0, 0].numel() / kernel[0, 0].numel()) ** 0.5
    if value.dim() == 3 and value.shape[0] == shape[0] == 1 and value.shape[2] == shape[2]:
        return _positions(value[0], shape[1])[None]
    if positions and value.dim() == 2 and value.shape[1] == shape[1]:
        return _positions(value, shape[0])
    return None


def _positions(value: Tensor, count: int) -> Tensor:
    """Position vectors `[n, d]` for another number of positions: a square grid (class token first), or a line."""
    for extra in (0, 1, 2):
        sides = [round((number - extra) ** 0.5) for number in (len(value), count)]
        if all(
            side > 1 and side * side + extra == number for side, number in zip(sides, (len(value), count), strict=True)
        ):
            grid = value[extra:].T.reshape(1, -1, sides[0], sides[0])
            grid = functional.interpolate(grid, (sides[1], sides[1]), mode="bicubic", align_corners=False)
            return torch.cat([value[:extra], grid[0].flatten(1).T])
    return functional.interpolate(value.T[None], count, mode="linear", align_corners=False)[0].T


def silent_tensors(target: Trace, extra: set[str]) -> set[str]:
    """The tensors to set to zero, so that the extra blocks add nothing to their stream."""
    weights = {one.event: one.weight for one in target.maps}
    return {name for add in target.adds if weights.get(add.map) in extra for name in add.last[:2] if name in extra}


def resized(
    transfer: Transfer, tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor], divide: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(values of the target's tensors, the reasons of those that nothing of the donor's fits).

    Args:
        transfer: of the two networks.
        tensors: of the donor.
        initial: of the target, for shapes, and for what is not floating-point or not used by a forward pass.
        divide: see `Transfer.tensor`.
    """
    values, left = {}, {}
    silent = silent_tensors(transfer.target.trace, transfer.pairing.extra)
    for name, value in initial.items():
        partner = transfer.pairing.tensors.get(name)
        if not value.is_floating_point():
            values[name] = value.clone()
        elif partner is None or partner not in transfer.donor.neurons.axes or name not in transfer.target.neurons.axes:
            if partner in tensors and tensors[partner].shape == value.shape:
                values[name] = tensors[partner].clone().to(value.dtype)
            else:
                left[name] = "the donor has no tensor for it"
        elif name in silent:
            values[name] = torch.zeros_like(value)
        elif (moved := transfer.tensor(name, tensors[partner], value.shape, divide)) is None:
            left[name] = f"{partner} {list(tensors[partner].shape)} cannot be brought to {list(value.shape)}"
        else:
            values[name] = moved.to(value.dtype)
    return values, left
