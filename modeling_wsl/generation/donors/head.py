"""A classifier in closed form: ridge regression from the features of labeled images to their classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..batch_norm import model_inputs
from .fit import HELD_OUT, num_examples, select_examples
from .trace import Event, EventMode, Map, Trace, operation_name, plain_operations


RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # by the mean variance of the features
SCALES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # of the logits; regression to 0 and 1 gives small ones
BATCH = 128


class MapInputs(EventMode):
    """What enters one map."""

    def __init__(self, event: Event) -> None:
        super().__init__()
        self.wanted, self.found = event, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = operation_name(function)
        if self.event(name, args) == self.wanted:
            self.found.append((args[1] if name == "addmm" else args[0]).clone())
        return function(*args, **(kwargs or {}))


def classifier_of(trace: Trace) -> Map | None:
    """The map that gives the network's outputs, where it is one plain matrix."""
    outputs = torch.cat(trace.outputs) if trace.outputs else torch.empty(0)
    for one in reversed(trace.maps):
        rows = trace.axes[one.weight][1 if one.transposed else 0]
        if one.simple and one.event[0] in ("addmm", "mm") and bool(torch.isin(rows, outputs).all()):
            return one
    return None


@torch.no_grad()
def fit_head(module: nn.Module, trace: Trace, inputs: Any, labels: Tensor) -> dict[str, float]:
    """Sets the classifier of a network by ridge regression; its strength is chosen on a held-out part.

    Args:
        module: changed in place, in eval mode.
        trace: of the module.
        inputs: images `[N, C, H, W]` or a mapping of token batches.
        labels: int64 `[N]`.

    Returns:
        "images", "ridge", "held_out_accuracy".

    Raises:
        ValueError: the network ends in no plain linear classifier, or labels and classifier do not fit.
    """
    one = classifier_of(trace)
    if one is None:
        raise ValueError(
            "labels: the target does not end in one linear classifier, so none can be fitted. Leave them out."
        )
    tensors = module.state_dict(keep_vars=True)
    classes = tensors[one.weight].shape[1 if one.transposed else 0]
    if len(labels) != num_examples(inputs) or int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(
            f"labels: {len(labels)} of them, from {int(labels.min())} to {int(labels.max())}, do not fit "
            f"{num_examples(inputs)} images and a classifier of {classes} classes. Pass num_classes= for the target."
        )
    mode = MapInputs(one.event)
    module.eval()
    for first in range(0, len(labels), BATCH):
        arguments, keywords = model_inputs(select_examples(inputs, slice(first, first + BATCH)), torch.device("cpu"))
        mode.counts.clear()
        with plain_operations(), mode:
            module(*arguments, **keywords)
    features = torch.cat(mode.found).double()  # [N, F]
    if len(features) != len(labels):
        raise ValueError("labels: the target classifies more than one position of an example. Leave them out.")
    wanted = functional.one_hot(labels, classes).double()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[len(labels) - int(len(labels) * HELD_OUT) :] = True
    offset = one.bias is not None
    scores = {}
    for strength in RIDGES:
        weight, bias = _regression(features[~held_out], wanted[~held_out], strength, offset)
        guesses = features[held_out] @ weight + bias
        error = float((guesses - wanted[held_out]).square().mean())
        scores[strength] = error, float((guesses.argmax(1) == labels[held_out]).double().mean())
    best = min(scores, key=lambda strength: scores[strength][0])
    weight, bias = _regression(features[~held_out], wanted[~held_out], best, offset)
    guesses = (features @ weight + bias)[held_out]
    scale = min(SCALES, key=lambda scale: float(functional.cross_entropy(guesses * scale, labels[held_out])))
    weight, bias = _regression(features, wanted, best, offset)
    weight, bias = (weight * scale).float(), (bias * scale).float()
    tensors[one.weight].copy_(weight if one.transposed else weight.T)
    if offset:
        tensors[one.bias].copy_(bias)
    return {"images": len(labels), "ridge": best, "held_out_accuracy": scores[best][1]}


def _regression(features: Tensor, wanted: Tensor, strength: float, offset: bool) -> tuple[Tensor, Tensor]:
    """(weight `[F, classes]`, bias `[classes]`)."""
    mean = features.mean(0) if offset else torch.zeros_like(features[0])
    base = wanted.mean(0) if offset else torch.zeros_like(wanted[0])
    x = features - mean
    gram = x.T @ x
    gram.diagonal().add_(strength * float(gram.diagonal().mean()) + 1e-12)
    weight = torch.linalg.solve(gram, x.T @ (wanted - base))
    return weight, base - mean @ weight
