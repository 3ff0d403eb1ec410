"""Schemes that are dequantized: how each stores a weight, and the rows of the weight from that.

Results have the dtype of the scales if it has 16 bits, else the model's own (`Settings.result`); each entry is made in
float32 and rounded once.
"""

import json
from collections.abc import Callable

import torch

from ...tokens.manifest import TensorSpec
from ..errors import CheckpointError, parse_json
from .packed import Packed, Stored, unpack_bits, widened
from .settings import Settings


Tensor = torch.Tensor
FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
BYTES = ("uint8", "int8", "float4_e2m1fn_x2")
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where the eight numbers of a word lie
V2 = ("gptq_v2", "auto_round", "auto_round:gptqmodel")  # formats that store a zero as it is, not less one


def blocks(
    stored: Stored, name: str, shape: tuple[int, ...], scale: str, settings: Settings
) -> Callable[[int, int], Tensor]:
    """Gives the scales of rows `[start, stop)` of a weight, one an entry (or to be broadcast).

    Scales are one a tensor, a row, a group or a block, blocks at the edges being smaller.
    """
    given = stored.specs[scale].shape
    grid = given if len(given) else (1,)
    if len(grid) < len(shape) and grid == shape[: len(grid)]:
        grid += (1,) * (len(shape) - len(grid))
    elif all(n == 1 for n in grid):
        grid = (1,) * len(shape)
    size = settings.values.get("weight_block_size")
    stated = [n for n in size if type(n) is int and n > 0] if isinstance(size, list) else []
    stated = [1] * (len(shape) - len(stated)) + stated if stated else [1] * len(shape)
    sizes = []
    if len(grid) != len(shape):
        raise stored.misfit(scale, f"of shape {list(given)} does not fit the weight's {list(shape)}")
    for n, count, wanted in zip(shape, grid, stated, strict=True):
        fitting = (
            [n] if count == 1 else [1] if count == n else [b for b in (wanted, 128) if b > 1 and -(-n // b) == count]
        )
        fitting = fitting or ([n // count] if count and n % count == 0 else [])
        if not fitting:
            raise stored.misfit(scale, f"of shape {list(given)} does not fit the weight's {list(shape)}")
        sizes.append(max(1, fitting[0]))

    def rows(start: int, stop: int) -> Tensor:
        values = widened(stored.read(scale)).reshape(grid)[torch.arange(start, stop) // sizes[0]]
        for dim in range(1, len(shape)):
            if grid[dim] > 1 and sizes[dim] > 1:
                values = values.repeat_interleave(sizes[dim], dim).narrow(dim, 0, shape[dim])
        return values

    return rows


def group_text(shape: tuple[int, ...], grid: tuple[int, ...]) -> str:
    """The granularity of scales in words."""
    if all(n == 1 for n in grid):
        return "one scale"
    if len(grid) == len(shape) == 2 and grid[1] > 1:
        sizes = [-(-n // max(1, count)) for n, count in zip(shape, grid, strict=True)]
        return f"groups of {sizes[1]}" if sizes[0] == 1 else f"blocks of about {sizes[0]} x {sizes[1]}"
    return "a scale a channel"


def scaled(stored: Stored, settings: Settings, name: str) -> Packed | None:
    """Codes of 8 bits, or two of 4 bits a byte, times scales: fp8, int8, LLM.int8, mxfp8, nvfp4, BitNet, torchao."""
    spec = stored.specs[name]
    if spec.dtype not in (*FLOAT8, *BYTES) or len(spec.shape) < 1 or not spec.numel:
        return None
    module, _, leaf = name.rpartition(".")
    dot = module + "." if module else ""
    if leaf == "weight_packed" or leaf.endswith(("_blocks", "_scales", "_scale", "_scale_inv")):
        return None
    if settings.method == "chatglm" and settings.number("bits") == 4:
        return None  # two codes a byte, under names that else stand for one
    if spec.dtype == "int8" and dot + "SCB" in stored.specs and leaf == "weight":
        return llm_int8(stored, settings, name, dot)
    weight = stem = name
    if leaf == "_data":  # quanto: `fc.weight._data` and `fc.weight._scale`
        weight, stem = module, dot
    elif leaf.startswith("_") and leaf.endswith("_qdata"):  # torchao: `fc._weight_qdata` and `fc._weight_scale`
        weight, stem = dot + leaf[1 : -len("_qdata")], name.removesuffix("_qdata")
        if stem + "_act_pre_scale" in stored.specs:
            return None
    scale = stored.first(
        f"{stem}_scale_inv",
        f"{stem}_scale",
        f"{dot}scale_{leaf}",
        *((f"{dot}weights_scaling_factor",) if leaf == "weight" else ()),  # TensorRT-LLM
        *((f"{dot}scale",) if leaf == "weight" and (settings.method or spec.dtype in FLOAT8) else ()),
    )
    if scale is None or scale == name or (scale == dot + "scale" and stored.specs[scale].dtype in FLOAT8):
        return None
    tiny = stored.specs[scale].dtype in ("uint8", "float8_e8m0fnu", "float8_e4m3fn")
    if spec.dtype in BYTES and (spec.dtype != "int8" or tiny):
        if not tiny or spec.dtype == "uint8" and len(stored.specs[scale].shape) < 2:
            is_bitnet = settings.method == "bitnet" and spec.dtype == "uint8"
            return bitnet(stored, settings, name, scale) if is_bitnet else None  # else the guard names it
        return float4(stored, settings, name, name, scale, stored.first(f"{name}_scale_2"), False)
    zero = stored.first(f"{stem}_zero_point")
    factor = blocks(stored, name, spec.shape, scale, settings)
    offset = None
    if zero and stored.specs[zero].dtype not in FLOAT8:
        if stored.specs[zero].dtype == "uint8":
            return None
        offset = blocks(stored, name, spec.shape, zero, settings)

    def rows(start: int, stop: int) -> Tensor:
        values = stored.read(name)[start:stop].float()
        return (values - offset(start, stop) if offset else values) * factor(start, stop)

    dtype = settings.result(stored.specs[scale].dtype)
    codes = "fp8" if spec.dtype in FLOAT8 else "int8"
    text = f"{codes}, {group_text(spec.shape, stored.specs[scale].shape)}"
    return Packed(TensorSpec(weight, spec.shape, dtype), (name, scale, *((zero,) if zero else ())), text, rows)


def llm_int8(stored: Stored, settings: Settings, name: str, dot: str) -> Packed:
    """bitsandbytes' LLM.int8: rows of int8 times their largest entry over 127."""
    shape, scale, layout = stored.specs[name].shape, dot + "SCB", stored.first(dot + "weight_format")
    if layout and int(stored.small(layout).reshape(-1)[0]) != 0:
        raise stored.misfit(layout, "says that int8 rows are tiled for one kind of GPU")
    if len(shape) != 2 or stored.specs[scale].numel != shape[0]:
        raise stored.misfit(scale, f"of shape {list(stored.specs[scale].shape)} does not fit {list(shape)}")

    def rows(start: int, stop: int) -> Tensor:
        return stored.read(name)[start:stop].float() * (stored.read(scale).float().view(-1, 1)[start:stop] / 127)

    spec = TensorSpec(name, shape, settings.dtype or "float16")
    return Packed(spec, (name, scale, *((layout,) if layout else ())), "bitsandbytes int8, a scale a row", rows)


def bitnet(stored: Stored, settings: Settings, name: str, scale: str) -> Packed:
    """BitNet: -1, 0 and 1 in 2 bits, quarters of the rows above each other, over one scale (or times it)."""
    quarter, *rest = stored.specs[name].shape
    times = settings.text("linear_class") == "autobitlinear"

    def rows(start: int, stop: int) -> Tensor:
        at = torch.arange(start, stop)
        shifts = (2 * (at // quarter)).to(torch.uint8).view(-1, *[1] * len(rest))
        codes = ((stored.read(name)[at % quarter] >> shifts) & 3).float() - 1
        factor = stored.read(scale).float().reshape(-1)[0]
        return codes * factor if times else codes / factor

    spec = TensorSpec(name, (4 * quarter, *rest), settings.result(stored.specs[scale].dtype))
    return Packed(spec, (name, scale), "bitnet, ternary, one scale", rows)


def float4(
    stored: Stored, settings: Settings, weight: str, codes: str, scale: str, second: str | None, divide: bool
) -> Packed:
    """Pairs of fp4 in bytes, the first in the low bits, with scales of 8 bits: nvfp4 and mxfp4."""
    *lead, width = stored.specs[codes].shape
    shape = (*lead, 2 * width)
    factor = blocks(stored, codes, shape, scale, Settings())

    def rows(start: int, stop: int) -> Tensor:
        data = stored.read(codes)[start:stop].view(torch.uint8)
        values = FP4[torch.stack((data & 15, data >> 4), -1).flatten(-2).int()]
        factors = factor(start, stop)
        if second:
            last = widened(stored.read(second)).reshape(-1)
            last = last if len(last) == 1 else last[start:stop].view(-1, *[1] * len(lead))
            factors = factors / last if divide else factors * last
        return values * factors

    kind = "mxfp4" if stored.specs[scale].dtype in ("uint8", "float8_e8m0fnu") else "nvfp4"
    size = 2 * width // max(1, stored.specs[scale].shape[-1])
    spec = TensorSpec(weight, shape, settings.dtype or "bfloat16")
    return Packed(spec, (codes, scale, *((second,) if second else ())), f"{kind}, groups of {size}", rows)


def mxfp4(stored: Stored, settings: Settings, name: str) -> Packed | None:
    """gpt-oss: `_blocks [.., groups, 16]` and `_scales`; transformers' stacks of experts are `[experts, in, out]`."""
    spec = stored.specs[name]
    weight, scale = name[: -len("_blocks")], name[: -len("blocks")] + "scales"
    if not name.endswith(("_blocks", ".blocks")) or spec.dtype != "uint8" or len(spec.shape) < 3:
        return None
    if scale not in stored.specs:
        return None
    if stored.specs[scale].shape != spec.shape[:-1] or stored.specs[scale].dtype != "uint8":
        raise stored.misfit(scale, f"of shape {list(stored.specs[scale].shape)} does not fit {list(spec.shape)}")
    *lead, groups, size = spec.shape
    turned = name.endswith("_blocks") and len(spec.shape) == 4
    shape = (*lead, groups * size * 2)
    shape = (shape[0], shape[2], shape[1]) if turned else shape

    def rows(start: int, stop: int) -> Tensor:
        data = stored.read(name)[start:stop]
        values = FP4[torch.stack((data & 15, data >> 4), -1).flatten(-2).int()]
        values = (values * widened(stored.read(scale)[start:stop])[..., None]).flatten(-2)
        return values.transpose(1, 2) if turned else values

    spec = TensorSpec(weight, shape, settings.dtype or "bfloat16")
    return Packed(spec, (name, scale), f"mxfp4, groups of {2 * size}", rows)


def affine(codes: Tensor, zeros: Tensor | None, scales: Tensor, groups: Tensor) -> Tensor:
    """(codes - zeros) * scales: codes `[rows, in]`, the others `[rows, groups]`, `groups [in]` names one an input."""
    values = codes.float()
    if zeros is not None:
        values -= zeros.float()[:, groups]
    return values * scales.float()[:, groups]


def gptq_awq(stored: Stored, settings: Settings, name: str) -> Packed | None:
    """GPTQ (numbers packed along the inputs), AWQ's GEMM (along the outputs, interleaved) and GEMV (as it is).

    GEMV stores the rows of the weight, and pads its scales to a whole word of zero points.
    """
    spec, dot = stored.specs[name], name[: -len("qweight")]
    if not (name.endswith(".qweight") or name == "qweight") or spec.dtype not in ("int32", "uint32"):
        return None
    zeros, scales, order = dot + "qzeros", dot + "scales", stored.first(dot + "g_idx")
    if any(len(stored.specs[n].shape) != 2 if n in stored.specs else True for n in (name, zeros, scales)):
        return None
    if settings.text("version") == "gemv":
        return awq_gemv(stored, settings, dot)
    count, outputs = stored.specs[scales].shape
    num_zeros, width = stored.specs[zeros].shape
    # GPTQModel gives some modules bits of their own
    stated = settings.number("bits", "w_bit") or 4
    bits = next((b for b in (stated, 4, 8, 2, 3) if width == -(-outputs * b // 32)), 0)
    fits = num_zeros == count > 0 and bits in (2, 3, 4, 8)
    awq = fits and bits == 4 and spec.shape[1] * 8 == outputs and spec.shape[1] != outputs
    if not fits or settings.text("checkpoint_format") == "marlin" or not (awq or spec.shape[1] == outputs):
        return None  # another packing: the guard refuses it
    inputs = spec.shape[0] if awq else spec.shape[0] * 32 // bits
    if order and (stored.specs[order].shape != (inputs,) or awq):
        raise stored.misfit(order, f"of shape {list(stored.specs[order].shape)} does not fit {inputs} inputs")
    size = -(-inputs // count)
    offset = 0 if {settings.text("checkpoint_format"), settings.text("packing_format")} & set(V2) else 1

    def rows(start: int, stop: int) -> Tensor:
        groups = stored.read(order).long() if order else torch.arange(inputs) // size
        if order and not 0 <= int(groups.min()) <= int(groups.max()) < count:
            raise stored.misfit(order, f"names a group outside of {count}")
        factor = stored.read(scales)[:, start:stop].t()
        if awq:
            first, last = start // 8, -(-stop // 8)

            def numbers(tensor: Tensor) -> Tensor:
                values = unpack_bits(tensor[:, first:last], 4, 8 * (last - first)).unflatten(-1, (-1, 8))
                return values[..., AWQ_ORDER].flatten(-2)[:, start - 8 * first : stop - 8 * first].t()

            return affine(numbers(stored.read(name)), numbers(stored.read(zeros)), factor, groups)
        codes = unpack_bits(stored.read(name)[:, start:stop].t(), bits, inputs)
        zero = unpack_bits(stored.read(zeros), bits, outputs)[:, start:stop].t()
        return affine(codes, (zero + offset) & ((1 << bits) - 1), factor, groups)

    dtype = settings.result(stored.specs[scales].dtype)
    parts = (name, zeros, scales, *((order,) if order else ()))
    text = f"{'awq' if awq else 'gptq'}, {bits} bits, groups of {size}"
    return Packed(TensorSpec(dot + "weight", (outputs, inputs), dtype), parts, text, rows)


def awq_gemv(stored: Stored, settings: Settings, dot: str) -> Packed | None:
    """AWQ's GEMV: codes `[out, in / 8]`, scales `[out, groups]` padded to eight for each word of zero points."""
    codes, zeros, scales = (dot + leaf for leaf in ("qweight", "qzeros", "scales"))
    (outputs, words), (count, width) = stored.specs[codes].shape, stored.specs[zeros].shape
    size, inputs = settings.number("group_size", "q_group_size") or 128, 8 * words
    groups = -(-inputs // size)
    if count != outputs or stored.specs[scales].shape != (outputs, 8 * width) or not 0 < groups <= 8 * width:
        return None

    def rows(start: int, stop: int) -> Tensor:
        zero = unpack_bits(stored.read(zeros)[start:stop], 4, groups)
        numbers = unpack_bits(stored.read(codes)[start:stop], 4, inputs)
        return affine(numbers, zero, stored.read(scales)[start:stop], torch.arange(inputs) // size)

    spec = TensorSpec(dot + "weight", (outputs, inputs), settings.result(stored.specs[scales].dtype))
    return Packed(spec, (codes, zeros, scales), f"awq, 4 bits, groups of {size}", rows)


def mlx(stored: Stored, settings: Settings, name: str) -> Packed | None:
    """MLX: a stream of 2 to 8 bits in uint32 words, times `scales` plus `biases`, by groups of inputs."""
    spec, (module, _, leaf) = stored.specs[name], name.rpartition(".")
    scales, biases = (f"{module}.{end}" if module else end for end in ("scales", "biases"))
    if leaf != "weight" or spec.dtype != "uint32" or not {scales, biases} <= set(stored.specs) or len(spec.shape) < 2:
        return None
    own = settings.values.get(module)  # of this module alone, in models of mixed bits
    size = Settings(values=own).number("group_size") if isinstance(own, dict) else None
    size = size or settings.number("group_size")
    *lead, words = spec.shape
    *_, count = stored.specs[scales].shape or (0,)
    bits = 32 * words // (count * size) if size and count else 0
    if not size or bits not in (2, 3, 4, 5, 6, 8) or bits * count * size != 32 * words:
        return None  # without a config nothing tells bits from groups
    if any(stored.specs[n].shape != (*lead, count) for n in (scales, biases)):
        raise stored.misfit(scales, f"of shape {list(stored.specs[scales].shape)} does not fit {list(spec.shape)}")
    inputs = count * size

    def rows(start: int, stop: int) -> Tensor:
        codes = unpack_bits(stored.read(name)[start:stop].reshape(-1, words), bits, inputs).float()
        factor, offset = (stored.read(n)[start:stop].reshape(-1, count, 1).float() for n in (scales, biases))
        return codes.unflatten(-1, (count, size)).mul_(factor).add_(offset).reshape(-1, *lead[1:], inputs)

    spec = TensorSpec(name, (*lead, inputs), settings.result(stored.specs[scales].dtype))
    return Packed(spec, (name, scales, biases), f"mlx, {bits} bits, groups of {size}", rows)


def compressed_tensors(stored: Stored, settings: Settings, name: str) -> Packed | None:
    """compressed-tensors: integers of 1 to 8 bits in words, or pairs of fp4 in bytes (`weight_packed`)."""
    spec, weight = stored.specs[name], name.removesuffix("_packed")
    scale, zero, order = weight + "_scale", stored.first(weight + "_zero_point"), stored.first(weight + "_g_idx")
    if not name.endswith("weight_packed") or len(spec.shape) != 2 or scale not in stored.specs:
        return None
    if spec.dtype == "uint8":
        return float4(stored, settings, weight, name, scale, stored.first(weight + "_global_scale"), True)
    if spec.dtype != "int32" or weight + "_shape" not in stored.specs:
        return None
    shape = tuple(int(n) for n in stored.small(weight + "_shape").reshape(-1)[:8])
    scales = stored.specs[scale].shape
    if len(shape) != 2 or shape[0] != spec.shape[0] or not 0 < shape[1] <= spec.shape[1] * 32 or len(scales) != 2:
        raise stored.misfit(weight + "_shape", f"says {list(shape)} of codes {list(spec.shape)}")
    bits = next((b for b in (4, 8, 2, 3, 5, 6, 7, 1) if spec.shape[1] == -(-shape[1] * b // 32)), 0)
    loose = not bits and next((b for b in (3, 5, 6, 7) if spec.shape[1] == -(-shape[1] // (32 // b))), 0)
    count = scales[1]
    if not bits or loose or scales[0] not in (1, shape[0]) or not count:
        raise stored.misfit(
            name, f"of shape {list(spec.shape)} does not fit {list(shape)} and its scales {list(scales)}"
        )
    if zero and stored.specs[zero].shape != (-(-shape[0] * bits // 32), count):
        raise stored.misfit(zero, f"of shape {list(stored.specs[zero].shape)} does not fit {list(shape)}")
    size = -(-shape[1] // count)

    def rows(start: int, stop: int) -> Tensor:
        groups = torch.arange(shape[1]) // size
        if order and int((indices := stored.read(order).long()).min()) >= 0:
            groups = indices
            if len(groups) != shape[1] or int(groups.max()) >= count:
                raise stored.misfit(order, f"does not name one of {count} groups for each of {shape[1]} inputs")
        codes = unpack_bits(stored.read(name)[start:stop], bits, shape[1])
        zeros = torch.full((stop - start, count), 1 << (bits - 1))
        if zero:
            zeros = unpack_bits(stored.read(zero).t(), bits, shape[0])[:, start:stop].t()
        return affine(codes, zeros, stored.read(scale).expand(shape[0], count)[start:stop], groups)

    parts = (name, scale, weight + "_shape", *filter(None, (zero, order)))
    spec = TensorSpec(weight, shape, settings.result(stored.specs[scale].dtype))
    return Packed(spec, parts, f"compressed-tensors, {bits} bits, groups of {size}", rows)


def bitsandbytes(stored: Stored, settings: Settings, name: str) -> Packed | None:
    """bitsandbytes' nf4 and fp4: pairs of codes in bytes, the first in the high bits; absmax may be quantized too."""
    weight, mark, kind = name.partition(".quant_state.bitsandbytes__")
    if not mark:
        return None
    parts = {leaf: f"{weight}.{leaf}" for leaf in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")}
    if any(n not in stored.specs for n in (weight, parts["absmax"], parts["quant_map"])):
        raise stored.misfit(name, "describes a weight whose codes or scales are not there")
    try:
        state = parse_json(stored.source, bytes(stored.small(name).tolist()), f"the state of {weight}")
        shape, block = tuple(state["shape"]), state["blocksize"]
        inner, offset = state.get("nested_blocksize"), float(state.get("nested_offset") or 0)
        spec = TensorSpec(weight, shape, str(state["dtype"]))
        good = all(type(n) is int and n >= 0 for n in (*shape, block)) and block > 0 and len(shape) > 0
        if not good or spec.dtype not in ("float16", "bfloat16", "float32"):
            raise ValueError
    except (CheckpointError, ValueError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise stored.misfit(name, f"does not describe how {weight} is stored (bitsandbytes {kind})") from error
    numel, codes = spec.numel, stored.specs[weight]
    nested = parts["nested_absmax"] in stored.specs
    num_blocks = -(-numel // block)
    count = {leaf: stored.specs[n].numel for leaf, n in parts.items() if n in stored.specs}
    fits = codes.numel * codes.torch_dtype.itemsize == -(-numel // 2)
    fits = fits and count["absmax"] == num_blocks and count["quant_map"] == 16
    if nested:
        fits = fits and type(inner) is int and inner > 0 and count.get("nested_quant_map") == 256
        fits = fits and count["nested_absmax"] == -(-num_blocks // inner)
    if not fits or not (nested or stored.specs[parts["absmax"]].dtype == "float32"):
        raise stored.misfit(weight, f"and its scales do not fit the shape {list(shape)} that its state says")
    row_size = numel // shape[0] if shape[0] else 0

    def rows(start: int, stop: int) -> Tensor:
        first, last = start * row_size // block, -(-stop * row_size // block)
        scales = stored.read(parts["absmax"]).reshape(-1)[first:last]
        if nested:
            outer = stored.read(parts["nested_absmax"]).float()[torch.arange(first, last) // inner]
            scales = stored.read(parts["nested_quant_map"]).float()[scales.int()] * outer + offset
        a, b = start * row_size, stop * row_size
        data = stored.read(weight).reshape(-1).view(torch.uint8)[a // 2 : -(-b // 2)]
        values = torch.stack((data >> 4, data & 15), -1).reshape(-1)[a % 2 :][: b - a]
        factors = scales.float()[torch.arange(a, b) // block - first]
        return (stored.read(parts["quant_map"]).float()[values.int()] * factors).view(-1, *shape[1:])

    used = (weight, name, *(n for n in parts.values() if n in stored.specs))
    return Packed(spec, used, f"bitsandbytes {kind}, groups of {block}" + ", nested" * nested, rows)


SCHEMES = (bitsandbytes, gptq_awq, compressed_tensors, mxfp4, mlx, scaled)
