"""Fine-tunes and other near copies: models whose weights are those of another model, slightly changed.

A split that parts them validates on what was trained on. Exact copies are told by their hash (`splits.py`); near ones
by a few kilobytes of sampled weights per model, or by what they state as their base model.
"""

import base64
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hf_wsl.files import sha256
from modeling_wsl.checkpoints.canonical import canonical
from modeling_wsl.checkpoints.checkpoint import Checkpoint
from modeling_wsl.checkpoints.order import natural_key
from modeling_wsl.tokens.manifest import TensorSpec


SAMPLED_TENSORS = 40
SAMPLED_ENTRIES = 64
CODE_SCALE = 32  # steps a standard deviation: codes of one byte reach four of them
TINY = 1e-30
# Measured on whole tensors: the weights of independently trained models of one architecture correlate, in the median
# tensor, by 0.00 and at most by 0.06 (261 pairs: digits zoo of five families, CIFAR-10 nets of 16 people); those of a
# base and its fine-tune by 0.62 (trained again as hard and long as the base) to 1.00. Sampling adds +-0.125.
CLOSE_CORRELATION = 0.5
# Single tensors mislead: a new head is unlike the old one; tables of positions, and kernels that peak in the middle,
# are alike in strangers. Both are a minority.
CLOSE_SHARE = 0.5
MIN_CLOSE_TENSORS = 2


@dataclass(frozen=True)
class NearCopyItem:
    """The facts of a model that tell its near copies.

    Attributes:
        model_id: names the group if the model is its first.
        fingerprint: as `fingerprint` makes it; None leaves the model to what is stated of its base.
        base_model: id of what it was fine-tuned from, if that is stated.
        repository: id by which others may name it as their base, where `model_id` is another.
    """

    model_id: str
    fingerprint: Mapping[str, str] | None
    base_model: str | None = None
    repository: str | None = None


def fingerprint(checkpoint: Checkpoint) -> dict[str, str]:
    """Samples the weights of a model: at most 5 kB of JSON, whatever the model's size.

    Of the tensors of two dimensions or more in the canonical view, those with the smallest hashes of their keys are
    taken: models that share most tensors share most of these. Another head does not change the other keys.

    Args:
        checkpoint: an open one. Only the sampled entries are read: of a mapped file, their pages.

    Returns:
        key of a tensor -> base64 of `SAMPLED_ENTRIES` int8, its entries in units of their own spread.
    """
    samples, view = {}, canonical(checkpoint)
    for key, name in sorted(_keys(view.tensors))[:SAMPLED_TENSORS]:
        tensor = view.read(name)
        places = torch.tensor(random.Random(key).sample(range(tensor.numel()), SAMPLED_ENTRIES))
        entries = tensor[torch.unravel_index(places, tensor.shape)].to(torch.float32).numpy()
        samples[key] = base64.b64encode(_codes(entries).tobytes()).decode()
    return samples


def _keys(tensors: Mapping[str, TensorSpec]) -> Iterator[tuple[str, str]]:
    """(key, name) of the tensors that can be sampled. The key is a hash of the name's last parts, the shape, and the
    tensor's number among those that are alike in both.
    """
    seen: dict[str, int] = {}
    for name in sorted(tensors, key=natural_key):
        spec = tensors[name]
        samplable = spec.torch_dtype.is_floating_point and spec.torch_dtype != torch.float4_e2m1fn_x2
        if len(spec.shape) < 2 or spec.numel < SAMPLED_ENTRIES or not samplable:
            continue
        parts = name.split(".")
        # What follows the last number, or the last two parts: `encoder.layer.3.attn.qkv.weight` is `attn.qkv.weight`.
        numbered = max((i for i, part in enumerate(parts) if part.isdigit()), default=len(parts) - 3)
        kind = f"{'.'.join(parts[max(0, numbered + 1) :])} {tuple(spec.shape)}"
        seen[kind] = seen.get(kind, 0) + 1
        yield sha256(f"{kind} {seen[kind]}")[:12], name


def _codes(entries: np.ndarray) -> np.ndarray:
    """Entries `[n]` float32 as int8 `[n]`: their distance from the median in 1/32 of a standard deviation.

    Medians, for a few outliers are common and would correlate by themselves. Constant entries give zeros.
    """
    if np.abs(entries).max(initial=0) < TINY:
        entries = entries.astype(np.float64)  # nothing can be divided by a denormal spread in float32
    distance = entries - np.median(entries)
    spread = 1.4826 * np.median(np.abs(distance)) or distance.std()  # of a normal distribution, both are the deviation
    scaled = distance * (CODE_SCALE / spread) if spread > 0 else np.zeros_like(distance)
    return np.clip(np.rint(scaled), -127, 127).astype(np.int8)


def near_copy_groups(items: Sequence[NearCopyItem]) -> list[str]:
    """Groups models that are near copies of each other, directly or by way of others.

    Two models are linked if in at least half of the sampled tensors of either (the one with fewer) their entries
    correlate by more than 0.5; if one states the other as its base; or if both state the same base. Copies with
    permuted neurons are not found, nor are models of which less than half is shared, such as a detector that was
    trained on a classifier's backbone, unless they state it.

    Args:
        items: the models. Time and memory grow with the square of their number: 3,000 take about 50 MB.

    Returns:
        for each model the `model_id` of the first model of its group; its own if it is alone.
    """
    linked = _alike(items)
    for i, j in _stated(items):
        linked[i, j] = linked[j, i] = True
    first = np.full(len(items), -1)
    for start in range(len(items)):
        if first[start] >= 0:
            continue
        frontier = [start]
        first[start] = start
        while frontier:
            new = np.flatnonzero(linked[frontier.pop()] & (first < 0))
            first[new] = start
            frontier.extend(new.tolist())
    return [items[i].model_id for i in first]


def _alike(items: Sequence[NearCopyItem]) -> np.ndarray:
    """Bool `[models, models]`: whether most sampled tensors are nearly the same."""
    holders: dict[str, list[tuple[int, str]]] = {}
    for i, item in enumerate(items):
        for key, codes in (item.fingerprint or {}).items():
            holders.setdefault(key, []).append((i, codes))
    close = np.zeros((len(items), len(items)), np.int16)  # number of tensors that are nearly the same
    for models in holders.values():
        if len(models) < 2:
            continue
        at = np.array([i for i, _ in models])
        codes = np.stack([np.frombuffer(base64.b64decode(c), np.int8) for _, c in models]).astype(np.float32)
        codes -= codes.mean(axis=1, keepdims=True)
        norm = np.linalg.norm(codes, axis=1, keepdims=True)
        codes = np.divide(codes, norm, out=np.zeros_like(codes), where=norm > 0)
        close[np.ix_(at, at)] += codes @ codes.T > CLOSE_CORRELATION
    sizes = np.array([len(item.fingerprint or {}) for item in items])
    needed = np.maximum(MIN_CLOSE_TENSORS, np.ceil(CLOSE_SHARE * np.minimum.outer(sizes, sizes)))
    return close >= needed


def _stated(items: Sequence[NearCopyItem]) -> Iterator[tuple[int, int]]:
    """Pairs of models of which one is the other's base, or that have one base. Ids of the Hub ignore case."""
    ids: dict[str, int] = {}
    for i, item in enumerate(items):
        for name in (item.model_id, item.repository):
            if name is not None:
                ids.setdefault(name.lower(), i)
    first: dict[str, int] = {}
    for i, item in enumerate(items):
        if item.base_model is not None:
            base = item.base_model.lower()
            yield i, first.setdefault(base, ids.get(base, i))
