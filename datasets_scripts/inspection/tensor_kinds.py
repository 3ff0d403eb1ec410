"""The kind of a tensor, from a manifest alone."""

import re

from modeling_wsl.tokens.manifest import LayerSpec, TensorSpec, WeightManifest, split_name


KINDS = ("kernel", "depthwise kernel", "matrix", "table", "norm scale", "bias", "other")
# Parameters: cls_token, pos_embed, pos_embed_window, rel_pos_h, relative_position_bias_table, cls_token1.
_TABLE = re.compile(r"(^|_)(tokens?|embed(dings?)?|pos(_emb)?|table)(_?\d+|_window|_[hw])?$", re.IGNORECASE)
# Modules with a weight: word_embeddings, embed_tokens, wte.
_EMBEDDING = re.compile(r"(^|_)(embed(dings?|_tokens|_positions)?|table)$|^(wte|wpe|shared)$", re.IGNORECASE)


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
