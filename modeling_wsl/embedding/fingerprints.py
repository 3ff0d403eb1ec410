"""Two fingerprints of a network, unit vectors that are compared by their cosine: copies stand close, strangers do not.

`Position` sketches weights where they stand. `Probe` sketches responses to fixed random inputs; neither the order nor
(without an activation between) the scale of neurons changes it. Sketches are random signs and sums (Charikar et al.
2002): cosines of sketches are those of what was sketched, but for noise of about 1 / sqrt(size).
"""

import hashlib
from collections import Counter, deque

import numpy as np
import torch
from torch import Tensor

from .network_layers import LayerPlan, NetworkLayer


SIZE = 128
PROBES = 24
REACH = 6  # a layer's inputs are the responses of one of so many layers before it
CLAMP = 8.0  # deviations; single outliers must not decide
EPS = 1e-12


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _sketch(values: Tensor, size: int, *key: object) -> Tensor:
    """Float32 `[n]` to `[size]`: random signs, then sums of every `size`-th entry."""
    signs = torch.randint(0, 2, (len(values),), generator=_generator(*key), dtype=torch.int8)
    signed = torch.where(signs.bool(), values, -values)
    signed = torch.nn.functional.pad(signed, (0, -len(values) % size))
    return signed.view(-1, size).sum(0)


class _Fingerprint:
    def __init__(self, size: int = SIZE):
        self.size = size
        self.total = torch.zeros(size)
        self.seen: Counter = Counter()

    def _number(self, *key: object) -> tuple[object, ...]:
        """The key and how often it came: layers of one shape are told apart by their order."""
        self.seen[key] += 1
        return (*key, self.seen[key])

    def vector(self) -> np.ndarray:
        """Float32 `[size]` of norm 1; zeros where there was nothing to sketch."""
        return (self.total / (self.total.norm() + EPS)).numpy()


class Position(_Fingerprint):
    """Collects layers in any order of modules; see the module."""

    def add(self, layer: NetworkLayer) -> None:
        """Takes in a layer: its weight and its vectors, each standardized."""
        for role, values in (("weight", layer.weight), *layer.vectors.items()):
            shape = layer.plan.shape if role == "weight" else tuple(values.shape)
            key = self._number("position", role, shape)
            flat = values.reshape(-1)
            peak = flat.abs().max()
            flat = flat / (peak + EPS * (peak == 0))
            variance, mean = torch.var_mean(flat, correction=0)
            if len(flat) <= 3 or variance < 1e-12:
                continue
            standard = ((flat - mean) / variance.sqrt()).clamp(-CLAMP, CLAMP)
            self.total += _sketch(standard, self.size, *key) * len(flat) ** -0.25


class Probe(_Fingerprint):
    """Collects layers in order; see the module."""

    def __init__(self, size: int = SIZE):
        super().__init__(size)
        self._latest: deque[tuple[LayerPlan, Tensor]] = deque(maxlen=REACH)  # responses have mean square 1
        self._upper = torch.triu_indices(PROBES, PROBES)

    def add(self, layer: NetworkLayer) -> None:
        """Takes in the next layer: its responses to those of the layers before, or to random inputs."""
        plan, vectors = layer.plan, layer.vectors
        out, into, k = plan.shape
        responses = self._respond(layer)
        peak = responses.abs().max()
        if out < 2 or peak < 1e-20:
            return
        responses = responses / peak  # squares of large responses would overflow
        norm = responses.square().mean().sqrt() + EPS
        gamma = vectors.get("gamma")
        if gamma is not None and len(gamma) == out:
            deviation = responses.square().mean(1, keepdim=True).sqrt() + 1e-3 * norm
            responses, peak = responses / deviation * gamma[:, None], 1.0
            norm = responses.square().mean().sqrt() + EPS
        shift = vectors.get("beta" if gamma is not None else "bias")
        if shift is not None and len(shift) == out:
            responses = responses + shift[:, None] / peak
        unit = responses / (responses.norm(dim=1, keepdim=True) + 1e-4 * norm)
        gram = unit.T @ unit / out - torch.eye(PROBES) / PROBES
        features = torch.cat([gram[self._upper[0], self._upper[1]], unit.mean(0)])
        sketch = _sketch(features, self.size, *self._number("probe", plan.shape))
        self.total += sketch / (features.norm() + EPS) * plan.numel**0.125
        self._latest.append((plan, responses / (responses.square().mean().sqrt() + EPS)))

    def _respond(self, layer: NetworkLayer) -> Tensor:
        out, into, k = layer.plan.shape
        taps = torch.ones(1, PROBES) if k == 1 else torch.randn(k, PROBES, generator=_generator("taps", k))
        inputs = self._inputs(layer.plan)  # [into, PROBES], of mean square 1
        if layer.plan.is_depthwise:
            responses = layer.respond(taps) if into == 1 else layer.respond(taps.repeat(into, 1))
            return responses * inputs if len(inputs) == out else responses
        return layer.respond((inputs[:, None] * taps).reshape(into * k, PROBES))

    def _inputs(self, plan: LayerPlan) -> Tensor:
        out, into, k = plan.shape
        wanted = out if plan.is_depthwise else into
        for before, responses in reversed(self._latest):
            if len(responses) == wanted:
                return responses
            if k == 1 and before.shape[2] > 1 and len(responses) > 1 and wanted % len(responses) == 0:  # flattened
                places = wanted // len(responses)
                weights = torch.randn(places, PROBES, generator=_generator("places", places))
                return (responses[:, None] * weights).reshape(wanted, PROBES)
        return torch.randn(wanted, PROBES, generator=_generator("inputs", wanted))
