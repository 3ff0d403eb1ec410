"""The profile of a network: statistics of its layers that do not depend on the order of neurons, pooled over depth.

Per layer: mean, deviation and quantiles of the weights, the bias and the scale (as Unterthiner et al. 2020), spectral
measures of the matrix (as Martin and Mahoney 2021) and of the map that it and the next layer make together, its shape.
Over layers: mean, deviation, and means in five overlapping bins of relative depth.
"""

from collections import deque
from dataclasses import dataclass
from math import log, sqrt

import numpy as np
import torch
from torch import Tensor

from .network_layers import ROLES, LayerPlan, NetworkLayer


ENTRY_STATISTICS = ("mean", "std", "min", "q25", "median", "q75", "max")
SPECTRAL = (
    "log spectral norm",
    "log Frobenius norm",
    "log stable rank",
    "log top over edge",
    "entropy",
    "alignment with the next layer",
    "log stable rank of the product with the next layer",
    *(f"log {role}" for role in ROLES),
)
SHAPE = ("log out", "log in", "log k", "log entries", "log aspect", "depthwise", "spatial", "pointwise")
DEPTH_BINS = 5
MAX_GRAM = 1024  # larger Gram matrices: the spectrum of a Gaussian sketch of this size
LINK_REACH = 4  # the next layer is among so many: a shortcut or a depthwise layer may stand between
MAX_EXACT = 256  # neurons up to which the largest eigenvalue of a product is not iterated for
POWER_STEPS = 60
EPS = 1e-12


def profile_names() -> tuple[str, ...]:
    """Names of the 273 numbers, in order."""
    pooled = ("mean", "std", *(f"depth {i}/{DEPTH_BINS - 1}" for i in range(DEPTH_BINS)))
    entries = [f"{part} {name}" for part in ("weight", "bias", "scale") for name in ENTRY_STATISTICS]
    counts = ("log layers", "log all entries", *(f"share {n}" for n in (*SHAPE[5:], *ROLES)))
    return tuple(
        [f"{pool}: {name}" for pool in pooled for name in entries]
        + [f"{pool}: {name}" for pool in pooled for name in SPECTRAL]
        + [f"{pool}: {name}" for pool in ("mean", "std", "max", "min") for name in SHAPE]
        + [f"count: {name}" for name in counts]
    )


@dataclass
class _Pending:
    """A layer that waits for the next one."""

    plan: LayerPlan
    gram: Tensor  # [out, out]
    row: int


class Profile:
    """Collects layers in order; `vector` is the profile of those added so far. Memory grows by a row a layer."""

    def __init__(self) -> None:
        self.entries: list[np.ndarray] = []
        self.spectral: list[np.ndarray] = []
        self.shapes: list[list[float]] = []
        self.roles: list[list[bool]] = []
        self._pending: deque[_Pending] = deque(maxlen=LINK_REACH)

    def add(self, layer: NetworkLayer) -> None:
        """Takes in the next layer."""
        plan, vectors = layer.plan, layer.vectors
        out, into, k = plan.shape
        shift = vectors.get("beta", vectors.get("bias")) if "gamma" in vectors else vectors.get("bias")
        shift = vectors.get("beta") if shift is None else shift
        parts = (layer.weight, shift, vectors.get("gamma"))
        absent = np.full(len(ENTRY_STATISTICS), np.nan)
        self.entries.append(np.concatenate([absent if p is None else _entry_statistics(p) for p in parts]))
        self.shapes.append(
            [log(out), log(into), log(k), log(plan.numel), log(out / (into * k)), plan.is_depthwise, k > 1, k == 1]
        )
        self.roles.append([role in vectors for role in ROLES])
        row = np.full(len(SPECTRAL), np.nan)
        self.spectral.append(row)
        peak = layer.weight.abs().max()
        unit = layer.weight.flatten(1) / (peak + EPS * (peak == 0))  # squares of large weights would overflow
        size = unit.square().mean().sqrt()
        rms = float(size * peak)
        if rms > 0:
            row[:5] = _spectrum(unit / size, log(rms), plan)
        for at, role in enumerate(ROLES, start=7):
            if role in vectors:
                scale = float(vectors[role].double().square().mean().sqrt())
                row[at] = log(scale / (rms * sqrt(into * k) + EPS) + 1e-4) if role == "bias" else log(max(scale, 1e-6))
        for before in list(self._pending):
            if feeds(before.plan, plan):
                if rms > 0 and layer.is_complete:
                    self.spectral[before.row][5:7] = _link(before.gram, unit / size, before.plan.shape[0])
                self._pending.remove(before)
        if rms > 0 and layer.is_complete and 1 < out <= MAX_GRAM:
            rows = unit / size
            self._pending.append(_Pending(plan, rows @ rows.T, len(self.spectral) - 1))

    def vector(self) -> np.ndarray:
        """Float32 `[273]`; see `profile_names`."""
        if not self.shapes:
            return np.zeros(len(profile_names()), np.float32)
        shapes = np.array(self.shapes, dtype=np.float64)
        shares = np.concatenate([shapes[:, 5:].mean(0), np.array(self.roles, dtype=np.float64).mean(0)])
        counts = [log(len(shapes) + 1), log(np.exp(shapes[:, 3]).sum() + 1)]
        pooled = [shapes.mean(0), shapes.std(0), shapes.max(0), shapes.min(0), counts, shares]
        pooled = [_pool(np.array(self.entries)), _pool(np.array(self.spectral)), *pooled]
        return np.concatenate(pooled).astype(np.float32)


def _entry_statistics(values: Tensor) -> np.ndarray:
    """Signed logarithms of mean, deviation and quartiles of all entries."""
    flat = values.reshape(-1)
    variance, mean = torch.var_mean(flat.double() if flat.numel() < 4096 else flat, correction=0)
    quartiles = np.quantile(flat.numpy(), (0, 0.25, 0.5, 0.75, 1))
    numbers = np.array([float(mean), sqrt(max(float(variance), 0)), *quartiles])
    return np.sign(numbers) * np.log1p(np.abs(numbers) * 1e3)


def _spectrum(unit: Tensor, log_rms: float, plan: LayerPlan) -> list[float]:
    """The first five of `SPECTRAL`.

    Args:
        unit: `[rows, in * k]` of mean square 1.
        log_rms: of the weights themselves.
    """
    wide = unit if unit.shape[0] <= unit.shape[1] else unit.T
    small, large = wide.shape
    if small > MAX_GRAM:
        generator = torch.Generator().manual_seed(small)
        wide = torch.randn(MAX_GRAM, small, generator=generator) @ wide / sqrt(MAX_GRAM)
    gram = wide @ wide.T
    values = torch.linalg.eigvalsh(gram.double() if len(gram) <= 512 else gram).double().clamp_min(0)
    share = values / (values.sum() + EPS)
    top = float(share[-1])
    edge = (sqrt(small) + sqrt(large)) ** 2  # of Marchenko and Pastur: of independent entries of mean square 1
    entropy = -float((share * (share + EPS).log()).sum()) - log(len(values))
    frobenius = log_rms + log(plan.numel) / 2
    return [
        frobenius + log(max(top, 1e-6)) / 2,
        frobenius,
        -log(max(top, EPS)),
        log(float(values[-1]) / edge + 1e-4),
        entropy,
    ]


def feeds(before: LayerPlan, after: LayerPlan) -> bool:
    """Whether a layer's outputs may be the inputs of another, by its shapes; flattened maps count."""
    out, into = before.shape[0], after.shape[1]
    if after.is_depthwise:
        return False
    return into == out or (before.shape[2] > 1 and after.shape[2] == 1 and into % out == 0)


def _link(gram: Tensor, after: Tensor, hidden: int) -> list[float]:
    """Alignment and stable rank of two maps in a row; unchanged by order and scale of the neurons between.

    Args:
        gram: `[hidden, hidden]` of the first layer's rows.
        after: `[out, in * k]` of the second layer.
        hidden: neurons between; each has `in / hidden` places where maps were flattened.
    """
    columns = after.reshape(len(after), hidden, -1).transpose(0, 1).flatten(1)
    following = columns @ columns.T
    aligned = (gram * following).sum() * hidden / (gram.trace() * following.trace() + EPS)
    scale = gram.diagonal().clamp_min(0).sqrt() + 1e-6
    first, second = (gram / scale / scale[:, None]).double(), (following * scale * scale[:, None]).double()
    total = float((first * second).sum())
    return [log(float(aligned) + 1e-3), log(max(total, EPS) / max(_largest_eigenvalue(first, second), EPS))]


def _largest_eigenvalue(first: Tensor, second: Tensor) -> float:
    """Of the product of two symmetric matrices `[n, n]` without negative eigenvalues; of large ones by iteration."""
    if len(first) <= MAX_EXACT:
        ridge = 1e-9 * first.diagonal().mean() * torch.eye(len(first), dtype=first.dtype)
        factor, failed = torch.linalg.cholesky_ex(first + ridge)
        if not failed:
            return float(torch.linalg.eigvalsh(factor.T @ second @ factor)[-1])
    vector, norm = second.diagonal().sqrt() + EPS, torch.zeros(())
    for _ in range(POWER_STEPS):
        vector = first @ (second @ (vector / (vector.norm() + EPS)))
        norm = vector.norm()
    return float(norm)


def _pool(rows: np.ndarray) -> np.ndarray:
    """Mean, deviation and means by depth of `[layers, n]`, NaN where there is no number: `[(2 + DEPTH_BINS) * n]`."""
    mask = np.isfinite(rows)
    values = np.where(mask, rows, 0.0)

    def mean(of: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        total = (mask * weights[:, None]).sum(0)
        return (of * mask * weights[:, None]).sum(0) / np.maximum(total, 1e-9), total > 1e-6

    overall, _ = mean(values, np.ones(len(rows)))
    pooled = [overall, np.sqrt(mean((values - overall) ** 2, np.ones(len(rows)))[0])]
    depth = np.linspace(0, 1, len(rows)) if len(rows) > 1 else np.array([0.5])
    for index in range(DEPTH_BINS):
        weights = np.maximum(0, 1 - np.abs(depth * (DEPTH_BINS - 1) - index))
        local, is_there = mean(values, weights)
        pooled.append(np.where(is_there, local, overall))
    return np.concatenate(pooled)
