"""Weights that files store as codes: each scheme with a quantizer of its own, by its published format."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from case import Case, Made, State
from safetensors.torch import save_file
from torch import Tensor


KIND = "Quantized weights"
NAMES = [f"model.layers.{i}.mlp.{kind}_proj" for i in range(2) for kind in ("up", "down")]


def weights() -> State:
    generator = torch.Generator().manual_seed(0)
    shapes = [(256, 128), (128, 256)] * 2
    state = {f"{n}.weight": 0.02 * torch.randn(s, generator=generator) for n, s in zip(NAMES, shapes, strict=True)}
    return state | {
        "model.norm.weight": torch.ones(128),
        "model.embed_tokens.weight": torch.randn(16, 128, generator=generator),
    }


def folder(
    place: Path, quantize: Callable[[str, Tensor], State], config: dict, dtype: torch.dtype = torch.bfloat16
) -> Made:
    """A transformers folder in which the projections are quantized, and the state dict it stands for."""
    stored: State = {}
    for name, tensor in weights().items():
        is_matrix = name.endswith("proj.weight")
        stored |= quantize(name.removesuffix(".weight"), tensor) if is_matrix else {name: tensor.to(dtype)}
    save_file({name: tensor.clone().contiguous() for name, tensor in stored.items()}, place / "model.safetensors")
    settings = {"quantization_config": config} if config else {}
    told = {"model_type": "llama", "torch_dtype": str(dtype).removeprefix("torch."), **settings}
    (place / "config.json").write_text(json.dumps(told))
    return place, {name: tensor.to(dtype) for name, tensor in weights().items()}


def fp8(prefix: str, w: Tensor, *, block: int = 0, rows: bool = False, suffix: str = "weight_scale") -> State:
    if block:
        blocks = w.reshape(w.shape[0] // block, block, w.shape[1] // block, block)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).reshape(w.shape)
    else:
        scale = w.abs().amax(1, keepdim=True) / 448 if rows else w.abs().max() / 448
        codes = w / scale
    return {f"{prefix}.weight": codes.to(torch.float8_e4m3fn), f"{prefix}.{suffix}": scale}


def int8(prefix: str, w: Tensor) -> State:
    scale = w.abs().amax(1, keepdim=True) / 127
    return {f"{prefix}.weight": (w / scale).round().to(torch.int8), f"{prefix}.weight_scale": scale.bfloat16()}


def pack(codes: Tensor, bits: int) -> Tensor:
    """Numbers `[rows, n]` as int32 words, a stream of bits, the lowest first."""
    stream = (codes.long()[..., None] >> torch.arange(bits)) & 1
    words = stream.flatten(1).unflatten(1, (-1, 32)).long() << torch.arange(32)
    total = words.sum(-1)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def grouped(w: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[out, in]`, scales and zero points `[out, groups]` of asymmetric rounding."""
    parts = w.unflatten(1, (-1, group))
    low, high = parts.amin(-1), parts.amax(-1)
    scale = ((high - low) / ((1 << bits) - 1)).half().float()
    zero = (-low / scale).round().clamp(1, (1 << bits) - 1)
    codes = (parts / scale[..., None] + zero[..., None]).round().clamp(0, (1 << bits) - 1)
    return codes.flatten(1), scale, zero


def gptq(prefix: str, w: Tensor, *, bits: int = 4, group: int = 64, reorder: bool = False, version: int = 1) -> State:
    order = (
        torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(1)) if reorder else torch.arange(w.shape[1])
    )
    codes, scale, zero = grouped(w[:, order], bits, group)
    stored, of_group = torch.empty_like(codes), torch.empty(w.shape[1], dtype=torch.int32)
    stored[:, order] = codes
    of_group[order] = (torch.arange(w.shape[1]) // group).int()
    return {
        f"{prefix}.qweight": pack(stored, bits).T,
        f"{prefix}.qzeros": pack(zero.T - int(version == 1), bits),
        f"{prefix}.scales": scale.T.half(),
        f"{prefix}.g_idx": of_group,
    }


def awq(prefix: str, w: Tensor) -> State:
    codes, scale, zero = grouped(w, 4, 64)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def packed(numbers: Tensor) -> Tensor:
        return pack(numbers.unflatten(1, (-1, 8))[..., order].flatten(1), 4)

    return {
        f"{prefix}.qweight": packed(codes.T),
        f"{prefix}.qzeros": packed(zero.T),
        f"{prefix}.scales": scale.T.half(),
    }


def compressed(prefix: str, w: Tensor, *, bits: int = 4, zeros: bool = False) -> State:
    codes, scale, zero = grouped(w, bits, 32)
    if not zeros:
        scale = w.unflatten(1, (-1, 32)).abs().amax(-1) / ((1 << bits - 1) - 1)
        zero = torch.full_like(scale, 1 << bits - 1)
        codes = ((w.unflatten(1, (-1, 32)) / scale[..., None]).round() + zero[..., None]).flatten(1)
    state = {f"{prefix}.weight_packed": pack(codes, bits), f"{prefix}.weight_scale": scale.bfloat16()}
    state[f"{prefix}.weight_shape"] = torch.tensor(w.shape)
    return state | ({f"{prefix}.weight_zero_point": pack(zero.T, bits).T} if zeros else {})


def awq_gemv(prefix: str, w: Tensor) -> State:
    """Scales and zero points are padded to eight groups: a word of zero points."""
    codes, scale, zero = grouped(w, 4, 64)
    pad = partial(torch.nn.functional.pad, pad=(0, -scale.shape[1] % 8))
    names = ("qweight", "qzeros", "scales")
    return {
        f"{prefix}.{n}": t for n, t in zip(names, (pack(codes, 4), pack(pad(zero), 4), pad(scale).half()), strict=True)
    }


def mlx(prefix: str, w: Tensor, *, bits: int = 4) -> State:
    codes, scale, zero = grouped(w, bits, 64)
    packed = pack(codes, bits).view(torch.uint32)
    return {f"{prefix}.weight": packed, f"{prefix}.scales": scale.half(), f"{prefix}.biases": (-zero * scale).half()}


def torchao(place: Path, *, pickled: bool, kind: str) -> Made:
    """A model that torchao quantized; the truth is what its tensors give by `dequantize`."""
    from torchao import quantization
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.LayerNorm(32)).bfloat16()
    quantization.quantize_(model, getattr(quantization, kind)())
    state = model.state_dict()
    (place / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    if pickled:
        torch.save(state, place / "pytorch_model.bin")
    else:
        save_file(*flatten_tensor_state_dict(state)[:1], place / "model.safetensors")
    return place, {n: t.dequantize() if hasattr(t, "qdata") else t.detach() for n, t in state.items()}


def modelopt_fp8(prefix: str, w: Tensor) -> State:
    """One scale, and that of the activations beside it."""
    return fp8(prefix, w) | {f"{prefix}.input_scale": torch.tensor(1.0)}


NF4 = torch.tensor(
    [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
    + [0.0795803, 0.1609302, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0]
)


def bitsandbytes(prefix: str, w: Tensor) -> State:
    blocks = w.reshape(-1, 64)
    absmax = blocks.abs().amax(1)
    codes = (blocks[..., None] / absmax[:, None, None] - NF4).abs().argmin(-1).reshape(-1, 2)
    told = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(w.shape)}
    name = f"{prefix}.weight"
    return {
        name: (codes[:, :1] * 16 + codes[:, 1:]).to(torch.uint8),
        f"{name}.absmax": absmax,
        f"{name}.quant_map": NF4,
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8),
    }


def bitsandbytes_int8(prefix: str, w: Tensor) -> State:
    scale = w.abs().amax(1)
    codes = (w / scale[:, None] * 127).round().to(torch.int8)
    return {
        f"{prefix}.weight": codes,
        f"{prefix}.SCB": scale,
        f"{prefix}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def four_bits(values: Tensor) -> Tensor:
    codes = (values.abs()[..., None] - FP4).abs().argmin(-1) + 8 * (values < 0)
    return (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)


def nvfp4(prefix: str, w: Tensor, *, maker: str) -> State:
    blocks = w.unflatten(1, (-1, 16))
    whole = w.abs().max() / (448 * 6)
    scale = (blocks.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
    packed = four_bits((blocks / (scale.float() * whole)[..., None]).flatten(1))
    if maker == "modelopt":
        return {f"{prefix}.weight": packed, f"{prefix}.weight_scale": scale, f"{prefix}.weight_scale_2": whole}
    return {
        f"{prefix}.weight_packed": packed,
        f"{prefix}.weight_scale": scale,
        f"{prefix}.weight_global_scale": (1 / whole).reshape(1),
    }


def mxfp4(place: Path) -> Made:
    """Experts of gpt-oss: `[experts, out, in]` in blocks; transformers holds them `[experts, in, out]`."""
    experts = 0.02 * torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(0))
    blocks = experts.unflatten(-1, (-1, 32))
    exponent = (blocks.abs().amax(-1) / 6).log2().ceil()
    packed = four_bits(blocks / 2.0 ** exponent[..., None])
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stored = {f"{name}_blocks": packed, f"{name}_scales": (exponent + 127).to(torch.uint8)}
    beside = {f"{name}_bias": torch.zeros(4, 64).bfloat16(), "model.norm.weight": torch.ones(64).bfloat16()}
    save_file(stored | beside, place / "model.safetensors")
    told = {"model_type": "gpt_oss", "torch_dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}
    (place / "config.json").write_text(json.dumps(told))
    return place, {name: experts.transpose(1, 2).bfloat16(), **beside}


def gguf_file(place: Path, kind: str) -> Made:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(place / "model.gguf", "llama")
    state: State = {}
    generator = torch.Generator().manual_seed(0)
    quantization = gguf.GGMLQuantizationType[kind]
    for name in ("blk.0.attn_q.weight", "blk.0.ffn_up.weight"):
        tensor = 0.02 * torch.randn(64, 256, generator=generator)
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
        data = tensor.numpy() if kind == "F32" else gguf.quants.quantize(tensor.numpy(), quantization)
        writer.add_tensor(name, data, raw_dtype=quantization)
        exact = torch.from_numpy(np.array(gguf.quants.dequantize(data, quantization), dtype=np.float32))
        state[name] = exact.reshape(tensor.shape).to(dtype)
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    state["output_norm.weight"] = torch.ones(64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return place / "model.gguf", state


def gguf_split(place: Path, *, parts: int = 2) -> Made:
    """A file in two parts, as `llama-gguf-split` writes them."""
    import gguf

    state: State = {}
    for number in range(2):
        path = place / f"model-Q8_0-{number + 1:05d}-of-00002.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in (("split.no", number), ("split.count", 2)):
            writer.add_uint16(key, value)
        tensor = 0.02 * torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(number))
        kind = gguf.GGMLQuantizationType.Q8_0
        data = gguf.quants.quantize(tensor.numpy(), kind)
        writer.add_tensor(f"blk.{number}.ffn_up_exps.weight", data, raw_dtype=kind)
        exact = torch.from_numpy(gguf.quants.dequantize(data, kind).copy())
        state[f"blk.{number}.ffn_up_exps.weight"] = exact.reshape(tensor.shape)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        if number >= parts:
            path.unlink()
    return place, state


def unknown(place: Path, parts: State, config: dict) -> Made:
    save_file(parts | {"norm.weight": torch.ones(8)}, place / "model.safetensors")
    if config:
        (place / "config.json").write_text(json.dumps(config))
    return place, None


def row(name: str, layout: str, maker: str, make: Callable, bound: float, says: str) -> Case:
    return Case(name, KIND, layout, maker, make, outcome="dequantized", bound=bound, says=(says,))


def in_folder(quantize: Callable[..., State], config: dict | None = None, **options: object) -> Callable[[Path], Made]:
    dtype = torch.float16 if quantize in (gptq, awq, awq_gemv, mlx) else torch.bfloat16
    return partial(folder, quantize=partial(quantize, **options), config=config or {}, dtype=dtype)


def refused(name: str, layout: str, parts: State, says: str, config: dict | None = None) -> Case:
    make = partial(unknown, parts=parts, config=config or {})
    return Case(name, KIND, layout, "by hand", make, outcome="refused", says=(says,))


def codes(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.arange(math.prod(shape)).remainder(100).reshape(shape).to(dtype)


FP8 = {"quant_method": "fp8"}
GPTQ = {"quant_method": "gptq", "bits": 4}
CASES = [
    row(
        "fp8-blocks",
        "float8 with `weight_scale_inv` of 128 x 128 blocks",
        "DeepSeek's format",
        in_folder(fp8, FP8 | {"weight_block_size": [128, 128]}, block=128, suffix="weight_scale_inv"),
        0.04,
        "blocks of about 128 x 128",
    ),
    row(
        "fp8-tensor",
        "float8 with one `weight_scale`",
        "compressed-tensors' format",
        in_folder(fp8, FP8),
        0.04,
        "one scale",
    ),
    row(
        "fp8-rows",
        "float8 with a scale a row",
        "FBGEMM's format",
        in_folder(fp8, FP8, rows=True),
        0.04,
        "a scale a channel",
    ),
    row(
        "fp8-no-config",
        "float8 with scales, no config",
        "by hand",
        in_folder(fp8, rows=True),
        0.04,
        "a scale a channel",
    ),
    row(
        "int8-rows",
        "int8 with `weight_scale`",
        "compressed-tensors' format",
        in_folder(int8, {"quant_method": "compressed-tensors"}),
        0.01,
        "int8, a scale a channel",
    ),
    row("gptq-4", "GPTQ, 4 bits", "AutoGPTQ's format", in_folder(gptq, GPTQ), 0.1, "gptq, 4 bits"),
    row(
        "gptq-8",
        "GPTQ, 8 bits",
        "AutoGPTQ's format",
        in_folder(gptq, GPTQ | {"bits": 8}, bits=8),
        0.01,
        "gptq, 8 bits",
    ),
    row(
        "gptq-3",
        "GPTQ, 3 bits across words",
        "AutoGPTQ's format",
        in_folder(gptq, GPTQ | {"bits": 3}, bits=3),
        0.2,
        "gptq, 3 bits",
    ),
    row(
        "gptq-2", "GPTQ, 2 bits", "AutoGPTQ's format", in_folder(gptq, GPTQ | {"bits": 2}, bits=2), 0.5, "gptq, 2 bits"
    ),
    row(
        "gptq-act-order",
        "GPTQ with the order of activations",
        "AutoGPTQ's format",
        in_folder(gptq, GPTQ, reorder=True),
        0.1,
        "gptq, 4 bits",
    ),
    row(
        "gptq-v2",
        "GPTQ, zero points of version 2",
        "GPTQModel's format",
        in_folder(gptq, GPTQ | {"checkpoint_format": "gptq_v2"}, version=2),
        0.1,
        "gptq, 4 bits",
    ),
    row(
        "awq",
        "AWQ, 4 bits, interleaved",
        "AutoAWQ's format",
        in_folder(awq, {"quant_method": "awq"}),
        0.1,
        "awq, 4 bits",
    ),
    row(
        "compressed-4",
        "packed integers, symmetric",
        "compressed-tensors' format",
        in_folder(compressed),
        0.12,
        "4 bits",
    ),
    row(
        "compressed-8",
        "packed integers, 8 bits",
        "compressed-tensors' format",
        in_folder(compressed, bits=8),
        0.01,
        "8 bits",
    ),
    row(
        "compressed-zeros",
        "packed integers with zero points",
        "compressed-tensors' format",
        in_folder(compressed, zeros=True),
        0.1,
        "4 bits",
    ),
    row("bnb-nf4", "nf4 with `quant_state`", "bitsandbytes' format", in_folder(bitsandbytes), 0.2, "bitsandbytes nf4"),
    row(
        "bnb-int8", "int8 with `SCB`", "bitsandbytes' format", in_folder(bitsandbytes_int8), 0.01, "bitsandbytes int8"
    ),
    row("nvfp4", "four-bit floats", "compressed-tensors' format", in_folder(nvfp4, maker="ct"), 0.2, "nvfp4"),
    row("nvfp4-modelopt", "four-bit floats", "modelopt's format", in_folder(nvfp4, maker="modelopt"), 0.2, "nvfp4"),
    row("mxfp4", "`_blocks` and `_scales` of experts", "gpt-oss' format", mxfp4, 0.2, "mxfp4"),
    *(
        Case(
            f"gguf-{kind.lower()}",
            KIND,
            f"GGUF, {kind}",
            "gguf",
            partial(gguf_file, kind=kind),
            outcome=outcome,
            says=(f"gguf {kind}",) if outcome == "dequantized" else (),
            needs=("gguf",),
            reads_with=("gguf",),
        )
        for kind, outcome in [
            *((k, "read") for k in ("F32", "F16", "BF16")),
            *((k, "dequantized") for k in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")),
        ]
    ),
    Case(
        "gguf-split",
        KIND,
        "GGUF in two parts, experts of three dimensions",
        "gguf",
        gguf_split,
        outcome="dequantized",
        says=("gguf Q8_0",),
        needs=("gguf",),
        reads_with=("gguf",),
    ),
    Case(
        "gguf-split-cut",
        KIND,
        "the first of two parts of GGUF",
        "gguf",
        partial(gguf_split, parts=1),
        outcome="refused",
        says=("is part 1 of 2 of a model, and model-Q8_0-00002-of-00002.gguf is not there",),
        needs=("gguf",),
        reads_with=("gguf",),
    ),
    row(
        "awq-gemv",
        "AWQ, 4 bits, for GEMV",
        "AutoAWQ's format",
        in_folder(awq_gemv, {"quant_method": "awq", "version": "gemv", "group_size": 64}),
        0.1,
        "awq, 4 bits",
    ),
    *(
        row(
            f"mlx-{bits}",
            f"affine, {bits} bits, uint32",
            "MLX's format",
            in_folder(mlx, {"group_size": 64, "bits": bits}, bits=bits),
            bound,
            f"mlx, {bits} bits",
        )
        for bits, bound in ((3, 0.2), (4, 0.1), (6, 0.04), (8, 0.01))
    ),
    *(
        Case(
            f"torchao-{name}-{'pickled' if pickled else 'safetensors'}",
            KIND,
            f"{kind}, {'a pickled tensor' if pickled else 'as safetensors'}",
            "torchao",
            partial(torchao, pickled=pickled, kind=kind),
            outcome="dequantized",
            says=(says,),
            needs=("torchao",),
        )
        for name, kind, says in (
            ("int8", "Int8WeightOnlyConfig", "int8, a scale a channel"),
            ("fp8", "Float8WeightOnlyConfig", "fp8, a scale a channel"),
        )
        for pickled in (True, False)
    ),
    row(
        "fp8-modelopt",
        "float8 with one scale, and one of activations",
        "modelopt's format",
        in_folder(modelopt_fp8, {"quant_method": "modelopt", "quant_algo": "FP8"}),
        0.04,
        "one scale",
    ),
    row(
        "fp8-plain-scale",
        "float8 beside `scale`, no config",
        "DeepSeek's own format",
        in_folder(fp8, suffix="scale"),
        0.04,
        "one scale",
    ),
    row(
        "quanto-int8",
        "int8 as `weight._data` and `weight._scale`",
        "quanto's format",
        in_folder(
            lambda p, w: {
                f"{p}.weight._data": (t := int8(p, w))[f"{p}.weight"],
                f"{p}.weight._scale": t[f"{p}.weight_scale"],
            }
        ),
        0.01,
        "int8, a scale a channel",
    ),
    refused(
        "fp8-unknown-scale",
        "float8 beside a scale of another name",
        {"a.weight": torch.ones(8, 8).to(torch.float8_e4m3fn), "a.weight_qscale": torch.ones(8)},
        "float8 with the scale",
    ),
    refused(
        "quanto-int4",
        "quanto's packed int4",
        {
            "a.weight._data._data": codes(8, 8),
            "a.weight._scale": torch.ones(8, 1),
            "a.weight._shift": torch.ones(8, 1),
        },
        "quanto",
    ),
    refused(
        "chatglm-int4",
        "int8 that holds two codes",
        {"a.weight": codes(64, 32, dtype=torch.int8), "a.weight_scale": torch.ones(64)},
        "chatglm",
        config={"model_type": "chatglm", "quantization_bit": 4},
    ),
    refused(
        "dfloat11",
        "DFloat11's codes",
        {"a.encoded_exponent": codes(300), "a.sign_mantissa": codes(400), "a.luts": codes(2, 256)},
        "DFloat11",
    ),
    refused(
        "codes-alone",
        "bytes that nothing explains, and few floats",
        {"a.weight": codes(40_000)},
        "most of it is integers",
    ),
    refused("hqq", "HQQ's `W_q` with scales", {"a.W_q": codes(8, 8), "a.scale": torch.ones(8)}, "HQQ"),
    refused(
        "aqlm",
        "AQLM's codes and codebooks",
        {"a.codes": codes(8, 2, dtype=torch.int8), "a.codebooks": torch.ones(1, 8, 1, 8)},
        "AQLM",
        {"model_type": "llama", "quantization_config": {"quant_method": "aqlm"}},
    ),
    refused(
        "bitnet",
        "two-bit codes with one scale",
        {"a.weight": codes(8, 8), "a.weight_scale": torch.ones(1)},
        "is not known here",
    ),
    refused(
        "int8-alone", "int8 weights without scales", {"a.weight": codes(8, 8, dtype=torch.int8)}, "scales are missing"
    ),
    refused("gptq-cut", "GPTQ without its scales", {"a.qweight": codes(8, 8, dtype=torch.int32)}, "another packing"),
    refused(
        "gptq-misfit",
        "GPTQ whose parts do not fit",
        {
            "a.qweight": codes(8, 8, dtype=torch.int32),
            "a.qzeros": codes(1, 3, dtype=torch.int32),
            "a.scales": torch.ones(1, 8),
        },
        "another packing",
    ),
    refused(
        "bnb-zeros",
        "nf4 whose `quant_state` is no text",
        {
            "a.weight": codes(32, 1),
            "a.weight.absmax": torch.ones(1),
            "a.weight.quant_map": torch.ones(16),
            "a.weight.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
        },
        "does not describe how",
    ),
]
