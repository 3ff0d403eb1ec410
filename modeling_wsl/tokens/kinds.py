"""The kind of tensor that a token belongs to and its place in the model, from a manifest alone."""

import re
from dataclasses import dataclass
from math import log2, prod

import torch
from torch import Tensor

from .manifest import LayerSpec, TensorSpec, WeightManifest, split_name


KINDS = ("kernel", "depthwise kernel", "matrix", "table", "norm scale", "norm scale and shift", "bias", "other")
FEATURES = (
    "constant",
    "depth",
    "depth squared",
    "log2 fan-in / 10",
    "log2 fan-out / 10",
    "share of weights",
    "batch norm",
    "share of the first tensor",
    "log spread of the share",
)
# Parameters: cls_token, pos_embed, pos_embed_window, rel_pos_h, relative_position_bias_table, cls_token1.
_TABLE = re.compile(r"(^|_)(tokens?|embed(dings?)?|pos(_emb)?|table)(_?\d+|_window|_[hw])?$", re.IGNORECASE)
# Modules with a weight: word_embeddings, embed_tokens, wte.
_EMBEDDING = re.compile(r"(^|_)(embed(dings?|_tokens|_positions)?|table)$|^(wte|wpe|shared)$", re.IGNORECASE)
MIN_SPREAD = 1e-3  # of a token of one tensor alone
_BATCH_NORM_LEAVES = ("running_mean", "moving_mean")


def kind_of(spec: TensorSpec, layer: LayerSpec, stem: str | None = None) -> str:
    """One of `KINDS`, by the tensor's name and shape, by what else its layer holds, and by `stem_name`."""
    prefix, leaf = split_name(spec.name)
    if len(spec.shape) >= 3 and spec.shape[0] > 1:
        return "depthwise kernel" if spec.shape[1] == 1 and spec.name != stem else "kernel"
    if _TABLE.search(leaf) or (leaf == "weight" and _EMBEDDING.search(split_name(prefix)[1])):
        return "table" if len(spec.shape) >= 2 else "other"
    if len(spec.shape) == 2:
        return "matrix"
    if leaf.endswith(("bias", "beta")):
        return "bias"
    if len(spec.shape) == 1 and all(len(other.shape) == 1 for other in layer.tensors):
        return "norm scale"
    return "other"


def stem_name(manifest: WeightManifest) -> str | None:
    """The kernel that sees the images, be they of one channel; None where the stem is not among the tokens.

    It is the first tensor but for tables (a class token): a later kernel of one input is a depthwise one.
    """
    for layer in manifest.layers:
        for spec in layer.tensors:
            if (kind := kind_of(spec, layer)) != "table":
                return spec.name if kind in ("kernel", "depthwise kernel") else None
    return None


@dataclass(frozen=True)
class TokenKinds:
    """Consecutive tokens.

    Attributes:
        kinds: int64 `[n]`, index into `KINDS`: that of the tensor which the middle of a token's weights belongs to;
            a norm's scale and shift are near 1 and near 0, so that a token of both is a kind of its own.
        groups: int64 `[n]`, the same number for the tokens of one layer and kind; it grows with the layer.
        features: float64 `[n, len(FEATURES)]`: depth from 0 (first layer) to 1 (last), shape, and share of the token
            that holds weights; whether the model keeps batch-norm statistics; share p of these weights that belong to
            the first of the token's tensors, and log(p (1 - p) + 0.001) / 2: the scale of ones beside zeros.
    """

    kinds: Tensor
    groups: Tensor
    features: Tensor


def token_kinds(manifest: WeightManifest, start: int = 0, stop: int | None = None) -> TokenKinds:
    """Describes tokens `[start, stop)` of a manifest."""
    stop = manifest.num_tokens if stop is None else stop
    valid = manifest.valid_entries(start, stop)
    kinds, features = torch.empty(stop - start, dtype=torch.int64), torch.ones(stop - start, len(FEATURES)).double()
    layers = torch.empty(stop - start, dtype=torch.int64)
    stem = stem_name(manifest)
    batch_norm = any(split_name(spec.name)[1] in _BATCH_NORM_LEAVES for spec in manifest.carried)
    for block in manifest.blocks_between(start, stop):
        first, last = max(start, block.first_token), min(stop, block.end_token)
        here = slice(first - start, last - start)
        layer = manifest.layers[block.layer]
        within = (torch.arange(first, last) - block.first_token) % block.row_tokens
        begin = within * manifest.token_size  # entry of the block's row
        end = begin + valid[here]
        ends = torch.tensor([0, *(spec.numel // block.rows for spec in block.tensors)]).cumsum(0)
        tensor = torch.searchsorted(ends[1:], (begin + end - 1) // 2, right=True)
        first_end = ends[1:][torch.searchsorted(ends[1:], begin, right=True)]
        share = torch.minimum(end, first_end).sub(begin) / valid[here]
        features[here, 7], features[here, 8] = share, (share * (1 - share) + MIN_SPREAD).log() / 2
        own = [kind_of(spec, layer, stem) for spec in block.tensors]
        kinds[here] = torch.tensor([KINDS.index(kind) for kind in own])[tensor]
        if "norm scale" in own:
            kinds[here] = torch.where(share < 1, KINDS.index("norm scale and shift"), kinds[here])
        layers[here] = block.layer
        depth = block.layer / max(len(manifest.layers) - 1, 1)
        fans = torch.tensor([_fans(spec.shape) for spec in block.tensors], dtype=torch.float64)
        features[here, 1], features[here, 2] = depth, depth**2
        features[here, 3:5] = fans[tensor]
    features[:, 5] = valid / manifest.token_size
    features[:, 6] = float(batch_norm)
    return TokenKinds(kinds, layers * len(KINDS) + kinds, features)


def _fans(shape: tuple[int, ...]) -> tuple[float, float]:
    """Fan-in and fan-out, as logarithms of a size near 1."""
    return log2(prod(shape[1:])) / 10, log2(shape[0] if shape else 1) / 10
