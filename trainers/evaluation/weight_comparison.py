"""The distance of a model from the one it stands for: in weights, over all and by kind of layer, and in outputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from scipy.stats import wasserstein_distance
from torch import Tensor, nn
from torch.nn.functional import kl_div
from torch.utils.data import DataLoader, Dataset, Subset
from transformers.pytorch_utils import Conv1D

from ..finetuning.tasks import Task


KINDS = ("conv", "linear", "norm", "bias and other")
BINS = 61
_MIN_STD = 1e-8


def relative_error(weights: Mapping[str, Tensor], reference: Mapping[str, Tensor], names: Sequence[str]) -> float:
    """`|weights - reference| / |reference|` in the Euclidean norm over all named tensors together."""
    error = sum(float((weights[name].double() - reference[name].double()).square().sum()) for name in names)
    norm = sum(float(reference[name].double().square().sum()) for name in names)
    return (error / max(norm, _MIN_STD)) ** 0.5


def layer_kinds(module: nn.Module) -> dict[str, str]:
    """Parameter name -> one of `KINDS`, by the module that owns it; "norm" is the scale and the shift of a norm."""
    kinds = {}
    for prefix, child in module.named_modules():
        for name, _ in child.named_parameters(recurse=False):
            if "Norm" in type(child).__name__:
                kind = "norm"
            elif name == "weight" and isinstance(child, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                kind = "conv"
            elif name == "weight" and isinstance(child, nn.Linear | Conv1D):
                kind = "linear"
            else:
                kind = "bias and other"
            kinds[f"{prefix}.{name}" if prefix else name] = kind
    return kinds


def compare_weights(
    module: nn.Module, weights: Mapping[str, Tensor], reference: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, Any]:
    """Compares weights with those of a reference model of the same architecture.

    Args:
        module: of the architecture; tells the kinds of layers, its weights do not count.
        weights, reference: state dicts.
        names: the tensors to compare.

    Returns:
        `relative_error` and `cosine` over all named tensors; `kinds`: kind -> `entries`, `relative_error`, `cosine`
        and `distance`, the 1-Wasserstein distance between the distributions of a tensor's entries in units of the
        reference tensor's standard deviation, weighted by entries (None where all reference tensors are constant);
        `layers`: tensor -> relative error, of the tensors that are not zero in the reference.
    """
    kind_of = layer_kinds(module)
    members: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for name in names:
        members[kind_of.get(name, KINDS[-1])].append(name)
    kinds = {}
    for kind, own in members.items():
        if own:
            kinds[kind] = {
                "entries": sum(reference[name].numel() for name in own),
                "relative_error": relative_error(weights, reference, own),
                "cosine": cosine(weights, reference, own),
                "distance": _distribution_distance(weights, reference, own),
            }
    return {
        "relative_error": relative_error(weights, reference, names),
        "cosine": cosine(weights, reference, names),
        "kinds": kinds,
        "layers": {name: relative_error(weights, reference, [name]) for name in names if reference[name].any()},
    }


def cosine(weights: Mapping[str, Tensor], reference: Mapping[str, Tensor], names: Sequence[str]) -> float:
    """Cosine of the angle between two models as vectors of the named tensors; 0 where one of them is zero."""
    products = [0.0, 0.0, 0.0]
    for name in names:
        own, other = weights[name].double().flatten(), reference[name].double().flatten()
        for index, pair in enumerate(((own, other), (own, own), (other, other))):
            products[index] += float(torch.dot(*pair))
    dot, *squares = products
    return dot / (squares[0] * squares[1]) ** 0.5 if min(squares) > 0 else 0.0


@torch.no_grad()
def function_agreement(
    module: nn.Module, reference: nn.Module, dataset: Dataset, task: Task, max_examples: int, batch_size: int = 64
) -> dict[str, float]:
    """Compares the answers of two models.

    Args:
        module, reference: in eval mode, on the same device.
        dataset: of the task; `max_examples` evenly spaced examples of it are asked.

    Returns:
        `same_answer`: the share of predictions with the same most probable class; `kl`: the mean Kullback-Leibler
        divergence of the module's predictive distribution from the reference's, in nats.
    """
    device = next(module.parameters()).device
    same = divergence = 0.0
    total = 0
    count = min(max_examples, len(dataset))
    chosen = [index * len(dataset) // count for index in range(count)]
    for batch in DataLoader(Subset(dataset, chosen), batch_size=batch_size):
        batch = send_to_device(batch, device)
        own, expected = (task.forward(model, batch)[0].float().log_softmax(-1) for model in (module, reference))
        same += int((own.argmax(-1) == expected.argmax(-1)).sum())
        divergence += float(kl_div(own, expected, reduction="sum", log_target=True))
        total += len(own)
    return {"same_answer": same / total, "kl": divergence / total}


def _distribution_distance(
    weights: Mapping[str, Tensor], reference: Mapping[str, Tensor], names: Sequence[str]
) -> float | None:
    total, entries = 0.0, 0
    for name in names:
        own, other = weights[name].double().flatten(), reference[name].double().flatten()
        std = float(other.std(correction=0))
        if std > _MIN_STD:
            total += len(other) * float(wasserstein_distance(own.numpy(), other.numpy())) / std
            entries += len(other)
    return total / entries if entries else None


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
    compared = {}
    for kind in KINDS:
        if not originals[kind]:
            continue
        before, after = torch.cat(originals[kind]), torch.cat(reconstructions[kind])
        low, high = _central_range(before)
        edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
        compared[kind] = {
            "entries": len(before),
            "relative_error": (distances[kind] / max(lengths[kind], _MIN_STD)) ** 0.5,
            "r2": 1 - errors[kind] / counts[kind] if counts[kind] else None,
            "std": {"original": float(before.std()), "reconstructed": float(after.std())},
            "edges": edges.tolist(),
            "original": _density(before, edges),
            "reconstructed": _density(after, edges),
        }
    return compared


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
