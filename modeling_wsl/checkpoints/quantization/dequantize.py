"""The stage that turns stored codes and scales into weights, and refuses what it cannot."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...tokens.manifest import TensorSpec
from ..containers.container import Contents
from ..errors import QuantizedError, shorten
from .packed import LOAD_IT, PackedReader, Stored
from .schemes import FLOAT8, SCHEMES
from .settings import Settings, settings_beside


# Tensors that only a scheme has which is not dequantized: all of one module -> the scheme.
REFUSED = (
    ({"W_q"}, "HQQ"),
    ({"codes", "codebooks"}, "AQLM"),
    ({"Qidxs"}, "QuIP#"),
    ({"dense_weights", "row_offsets"}, "SpQR"),
    ({"indices", "centroids"}, "VPTQ"),
    ({"weight", "weight_scales"}, "EETQ"),
    ({"q_weight", "q_scale"}, "EXL2"),
    ({"trellis", "suh"}, "EXL3"),
    ({"qweight", "lookup_table"}, "SqueezeLLM"),
    ({"B", "s"}, "Marlin"),
    ({"weight", "scales", "biases"}, "MLX"),
    ({"weight", "scales", "qbiases"}, "Metal"),
    ({"weight", "comfy_quant"}, "ComfyUI"),
    ({"_data"}, "quanto"),
    ({"_weight_qdata"}, "torchao"),
    ({"encoded_exponent", "sign_mantissa"}, "DFloat11"),
    ({"qweight"}, "GPTQ or AWQ in another packing"),
    ({"weight_packed"}, "compressed-tensors"),
    ({"weight", "SCB"}, "bitsandbytes int8"),
)
# Endings that stand beside codes; what one of them lies beside is no plain integer tensor.
COMPANIONS = ("_scale", "_scale_inv", "_scales", "_zero_point", ".absmax", ".quant_map", ".scale", "_global_scale")
# Scales of activations and of key-value caches: no weights, and of no use without the quantized arithmetic.
ACTIVATIONS = ("input_scale", "output_scale", "k_scale", "v_scale", "q_scale", "prob_output_scale", "input_zero_point")
ACTIVATIONS += ("input_global_scale", "input_scale_ub", "scale_input", "act_scale", "output_zero_point")
ACTIVATIONS += (
    "activation_scaling_factor",
    "act_quant_scale",
    "_weight_act_quant_scale",
    "_weight_act_quant_zero_point",
)
MARKS = ("scaled_fp8",)  # an empty tensor by which ComfyUI knows the file
MAX_CODES = 1 << 14  # bytes of integers beside weights that are never taken for codes
CODES = ("uint8", "int8", "int16", "uint16", "int32", "uint32", "float4_e2m1fn_x2")


def dequantized(
    source: str, contents: Contents, path: Path | None = None, config: dict[str, Any] | None = None
) -> Contents:
    """Contents whose quantized weights are dequantized when they are read; others are returned as they are.

    Weights have their original names and shapes (`fc.qweight` is `fc.weight`); codes, scales, zeros and orders of
    groups are no longer listed. Rows are made as they are asked for.

    Args:
        source: for messages.
        contents: of all files of the model.
        path: the weight file, beside which configs are looked for.
        config: the model's parsed config.json.

    Raises:
        QuantizedError: a scheme that is not dequantized, which is named, or tensors that do not fit each other.
    """
    if not any(spec.dtype in (*CODES, *FLOAT8) for spec in contents.specs.values()):
        return contents
    owners = contents.owners
    settings = settings_beside(path, config or {})
    stored = Stored(source, contents.specs, lambda name: contents.read(owners.get(name, name)))
    weights = {}
    for scheme in SCHEMES:
        for weight in (scheme(stored, settings, name) for name in contents.specs):
            if weight is not None:
                weights.setdefault(weight.parts[0], weight)
    taken = {part for weight in weights.values() for part in weight.parts}
    refuse_codes(stored, taken, settings)
    if not weights:
        return contents
    clash = next(
        (w.spec.name for w in weights.values() if w.spec.name in contents.specs and w.spec.name not in taken), None
    )
    if clash is not None:
        raise stored.misfit(clash, "is there both quantized and plain")
    aside = [n for n in contents.specs if n not in taken and n.rpartition(".")[2] in (*ACTIVATIONS, *MARKS)]
    specs: dict[str, TensorSpec] = {}
    new_owners, stored_as, first = {}, {}, {}
    place = {part: weight for weight in weights.values() for part in weight.parts}
    for name, spec in contents.specs.items():
        if name in place:
            weight = place[name]
            if weight.spec.name in specs:
                continue
            specs[weight.spec.name] = weight.spec
            # One weight under two names: all its parts are shared.
            owner = first.setdefault(tuple(owners.get(part, part) for part in weight.parts), weight.spec.name)
            if owner != weight.spec.name:
                new_owners[weight.spec.name] = owner
            else:
                stored_as[weight.spec.name] = weight.stored_as
        elif name not in aside:
            specs[name] = spec
            if name in owners:
                new_owners[name] = owners[name]
    reader = PackedReader(weights.values())
    ignored = [*contents.ignored]
    if aside:
        ignored.append(f"{len(aside)} scales of activations, such as {shorten(aside[0])}")

    def read(name: str) -> torch.Tensor:
        return reader.read(name) if name in reader.weights else contents.read(name)

    return replace(
        contents,
        specs=specs,
        read=read,
        owners=new_owners,
        stored_as={**contents.stored_as, **stored_as},
        entries={**contents.entries, **dict.fromkeys(stored_as, reader.entries)},
        ignored=ignored,
    )


def refuse_codes(stored: Stored, taken: set[str], settings: Settings) -> None:
    """Refuses codes that no scheme took, naming theirs; plain integers pass, and float8 without a scale."""
    method = settings.method if taken or settings.method else None
    modules: dict[str, set[str]] = {}
    for name in stored.specs:
        if name not in taken:
            module, _, leaf = name.rpartition(".")
            modules.setdefault(module, set()).add(leaf)
    codes = floats = 0
    largest: TensorSpec | None = None
    for name, spec in stored.specs.items():
        if name in taken or spec.dtype not in (*CODES, *FLOAT8):
            floats += spec.numel * (spec.torch_dtype.is_floating_point or name in taken)
            continue
        module, _, leaf = name.rpartition(".")
        leaves = modules[module]
        if spec.dtype in FLOAT8:
            refuse_float8(stored, spec, leaves, method if taken else None)
            floats += spec.numel
            continue
        named = next((scheme for needed, scheme in REFUSED if leaf in needed and needed <= leaves), None)
        if named is None and any(name + end in stored.specs for end in COMPANIONS):
            named = method or "a scheme that is not known here"
        if named is None and method and len(spec.shape) > 1 and spec.numel >= 1024 and leaf not in ("position_ids",):
            named = method
        if named is None and len(spec.shape) > 1 and leaf == "weight" and spec.dtype in ("int8", "uint8"):
            scale = next((other for other in leaves if "scal" in other or "absmax" in other), None)
            named = f"{spec.dtype} with {shorten(scale)}" if scale else "codes whose scales are missing"
        if named is not None:
            raise not_dequantized(stored, name, named)
        codes += spec.numel * spec.torch_dtype.itemsize
        largest = spec if largest is None or spec.numel > largest.numel else largest
    if largest is not None and floats and codes > MAX_CODES + 4 * floats:
        raise not_dequantized(stored, largest.name, method or "most of it is integers, of a scheme not known here")


def refuse_float8(stored: Stored, spec: TensorSpec, leaves: set[str], method: str | None) -> None:
    """Refuses float8 that has a scale which no scheme knows, or lacks the one that its config promises."""
    module, _, leaf = spec.name.rpartition(".")
    if leaf.startswith("_") and leaf.endswith("_qdata"):
        raise not_dequantized(stored, spec.name, "torchao")
    for other in leaves - {leaf}:
        name = f"{module}.{other}" if module else other
        is_scale = "scal" in other.lower() and other not in (*ACTIVATIONS, *MARKS)
        if is_scale and leaf == "weight" and stored.specs[name].dtype not in FLOAT8:
            raise not_dequantized(stored, spec.name, f"float8 with the scale {shorten(other)}")
    if method in ("fp8", "fbgemm_fp8", "compressed-tensors") and leaf == "weight" and len(spec.shape) > 1:
        reason = f"lacks the scale of the quantized tensor {shorten(spec.name)}"
        raise QuantizedError(stored.source, reason, "Fetch all files of the model")


def not_dequantized(stored: Stored, name: str, scheme: str) -> QuantizedError:
    reason = f"its weights are quantized ({scheme}; tensor {shorten(name)}), which is not dequantized here"
    return QuantizedError(stored.source, reason, LOAD_IT)
