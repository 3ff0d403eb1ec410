"""How far weights are from the ones they stand for: over a model, and by kind of layer."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


KINDS = ("conv", "linear", "norm", "bias and other")
BINS = 61
_MIN_STD = 1e-8


def relative_error(weights: Mapping[str, Tensor], reference: Mapping[str, Tensor], names: Sequence[str]) -> float:
    """`|weights - reference| / |reference|` in the Euclidean norm over all named tensors together."""
    error = sum(float((weights[name].double() - reference[name].double()).square().sum()) for name in names)
    norm = sum(float(reference[name].double().square().sum()) for name in names)
    return (error / norm) ** 0.5


def layer_kinds(module: nn.Module) -> dict[str, str]:
    """Parameter name -> one of `KINDS`, by the module that owns it; "norm" is the scale and the shift of a norm."""
    kinds = {}
    for prefix, child in module.named_modules():
        for name, _ in child.named_parameters(recurse=False):
            if "Norm" in type(child).__name__:
                kind = "norm"
            elif name == "weight" and isinstance(child, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                kind = "conv"
            elif name == "weight" and isinstance(child, nn.Linear):
                kind = "linear"
            else:
                kind = "bias and other"
            kinds[f"{prefix}.{name}" if prefix else name] = kind
    return kinds


def compare_kinds(pairs: Sequence[tuple[nn.Module, Mapping[str, Tensor], Mapping[str, str]]]) -> dict[str, dict]:
    """Distributions and errors of reconstructed weights by kind of layer.

    Args:
        pairs: of each model the module with the reconstructed weights, the original state dict, and where each tensor
            came from; only those that were "sampled" count.

    Returns:
        kind -> `entries`; `r2`, 1 - sum of squared errors over sum of squared deviations, each tensor divided by its
        standard deviation so that every weight counts alike; `relative_error`, in the Euclidean norm;
        `edges` `[BINS + 1]`, `original` and `reconstructed` `[BINS]`: histograms of the weights as densities over the
        central 99.5 % of the original ones; `std` of both.
    """
    originals: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    reconstructions: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    errors, counts = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0)
    lengths, distances = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0)
    for module, original, origins in pairs:
        state = module.state_dict()
        for name, kind in layer_kinds(module).items():
            if origins[name] != "sampled":
                continue
            before, after = original[name].double().flatten(), state[name].double().flatten()
            originals[kind].append(before)
            reconstructions[kind].append(after)
            std = before.std(correction=0)
            if len(before) > 1 and std > _MIN_STD:
                errors[kind] += float(((after - before) / std).square().sum())
                counts[kind] += len(before)
            lengths[kind] += float(before.square().sum())
            distances[kind] += float((after - before).square().sum())
    found = {}
    for kind in KINDS:
        if not originals[kind]:
            continue
        before, after = torch.cat(originals[kind]), torch.cat(reconstructions[kind])
        low, high = _central_range(before)
        edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
        found[kind] = {
            "entries": len(before),
            "relative_error": (distances[kind] / max(lengths[kind], _MIN_STD)) ** 0.5,
            "r2": 1 - errors[kind] / counts[kind] if counts[kind] else None,
            "std": {"original": float(before.std()), "reconstructed": float(after.std())},
            "edges": edges.tolist(),
            "original": _density(before, edges),
            "reconstructed": _density(after, edges),
        }
    return found


def _central_range(values: Tensor) -> tuple[float, float]:
    ordered = values.sort().values
    cut = int(0.0025 * (len(values) - 1))
    low, high = float(ordered[cut]), float(ordered[-1 - cut])
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def _density(values: Tensor, edges: Tensor) -> list[float]:
    """Share of all values per unit, so that what lies outside of the edges is not counted as if it lay inside."""
    counts = torch.histogram(values, bins=edges).hist
    return (counts / len(values) / (edges[1] - edges[0])).tolist()
