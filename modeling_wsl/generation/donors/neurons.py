"""The neurons of a network: classes of the numbers that a trace united, and the spaces that they form."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from .trace import Trace


@dataclass(frozen=True)
class Space:
    """Neurons that the same axes of the same tensors hold: a residual stream, hidden units, the channels of a layer.

    Attributes:
        root: (tensor, axis) that holds them first in the order of the forward pass.
        neurons: their numbers in the order of the root axis, int64 `[n]`.
        parts: for each level of grouping (heads, groups) the part of every neuron, int64 `[n]`, numbered from zero.
        labels: for each level the numbers that the trace has for its parts, where tensors hold an entry a head.
        queries: a product of two activations sums over them.
        output: they are the network's outputs, such as classes.
    """

    root: tuple[str, int]
    neurons: np.ndarray = field(repr=False)
    parts: tuple[np.ndarray, ...] = field(default=(), repr=False)
    labels: tuple[tuple[int, ...], ...] = field(default=(), repr=False)
    queries: bool = False
    output: bool = False

    def __len__(self) -> int:
        return len(self.neurons)


@dataclass(frozen=True)
class Neurons:
    """All spaces of a network.

    Attributes:
        axes: tensor -> for each axis the neuron of every entry, int64 `[size]`.
        spaces: in the order of the forward pass.
        label: number of the trace -> its neuron.
        space_of: neuron -> index of its space; -1: it is of no space (kernel entries, positions, inputs).
        least: neuron -> how often each axis that holds it holds it at least.
    """

    axes: dict[str, list[np.ndarray]]
    spaces: list[Space]
    label: np.ndarray
    space_of: np.ndarray
    least: dict[int, int]


def find_neurons(trace: Trace) -> Neurons:
    """Classes of united numbers, sorted into spaces by where they occur."""
    label = connected(trace.count, torch.cat(trace.edges).numpy() if trace.edges else np.zeros((0, 2), np.int64))
    axes = {name: [label[axis.numpy()] for axis in own] for name, own in trace.axes.items()}
    occurrences: dict[int, list[int]] = {}  # neuron -> the axes that hold it
    keys: list[tuple[str, int]] = []
    first: dict[int, tuple[int, int]] = {}
    least: dict[int, int] = {}
    for name in trace.order:
        for axis, own in enumerate(axes[name]):
            if axis > 1:
                continue  # kernel entries
            keys.append((name, axis))
            counts: dict[int, int] = {}
            for place, neuron in enumerate(own.tolist()):
                counts[neuron] = counts.get(neuron, 0) + 1
                held = occurrences.setdefault(neuron, [])
                if not held or held[-1] != len(keys) - 1:
                    held.append(len(keys) - 1)
                first.setdefault(neuron, (len(keys) - 1, place))
            for neuron, count in counts.items():
                least[neuron] = min(count, least.get(neuron, count))
    writing = dict(_writing(trace))
    groups: dict[tuple[int, ...], list[int]] = {}
    outputs = set(label[torch.cat(trace.outputs).numpy()].tolist()) if trace.outputs else set()
    for neuron, held in occurrences.items():
        alone = len(held) == 1 and neuron not in outputs and keys[held[0]] not in writing.items()
        if not alone:  # an axis of its own that nothing writes: inputs, positions, a vocabulary
            groups.setdefault(tuple(held), []).append(neuron)
    queries = set(label[torch.cat(trace.queries).clamp_min(0).numpy()].tolist()) if trace.queries else set()
    members = _members(trace, label)
    space_of = np.full(trace.count, -1, np.int64)
    spaces = []
    ordered = sorted(groups.items(), key=lambda item: first[item[1][0]])
    for held, neurons in ordered:
        neurons = np.array(sorted(neurons, key=lambda neuron: first[neuron]), np.int64)
        root = next((key for key in map(keys.__getitem__, held) if writing.get(key[0]) == key[1]), keys[held[0]])
        space_of[neurons] = len(spaces)
        levels = [part for level in members if (part := _part(level, neurons)) is not None]
        levels.sort(key=lambda level: len(level[1]))
        parts, labels = tuple(part for part, _ in levels), tuple(label for _, label in levels)
        chosen = set(neurons.tolist())
        spaces.append(Space(root, neurons, parts, labels, bool(queries & chosen), bool(outputs & chosen)))
    return Neurons(axes, spaces, label, space_of, least)


def _writing(trace: Trace) -> list[tuple[str, int]]:
    """(weight, the axis of its outputs) of every map."""
    return [(one.weight, 1 if one.transposed else 0) for one in trace.maps]


def connected(count: int, edges: np.ndarray) -> np.ndarray:
    """The smallest number of every connected component, int64 `[count]`."""
    label = np.arange(count)
    while len(edges):
        smallest = label[edges].min(1)
        before = label.copy()
        np.minimum.at(label, edges[:, 0], smallest)
        np.minimum.at(label, edges[:, 1], smallest)
        np.minimum.at(label, before[edges[:, 0]], smallest)
        np.minimum.at(label, before[edges[:, 1]], smallest)
        while not np.array_equal(label, label[label]):
            label = label[label]
        if np.array_equal(label, before):
            break
    return label


def _members(trace: Trace, label: np.ndarray) -> list[dict[int, int]]:
    """For each grouping: neuron -> its head or group; heads that the trace united are one."""
    levels = []
    for pairs in trace.members:
        pairs = label[pairs.numpy()]
        own: dict[int, int] = {}
        for part, neuron in pairs.tolist():
            own.setdefault(neuron, part)
        levels.append(own)
    return levels


def _part(level: dict[int, int], neurons: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]] | None:
    """(the part of each neuron, numbered in their order; what the trace calls them); None: some belong to none."""
    found = [level.get(neuron) for neuron in neurons.tolist()]
    if any(part is None for part in found) or len(set(found)) < 2:
        return None
    number: dict[int, int] = {}
    return np.array([number.setdefault(part, len(number)) for part in found], np.int64), tuple(number)
