"""Weights stored as codes: each scheme, packed here as its library packs, gives back what the codes stand for."""

import json

import pytest
import torch
from safetensors.torch import save_file

from modeling_wsl import WeightManifest, WSLFeatureExtractor, open_checkpoint
from modeling_wsl.checkpoints.errors import CheckpointError


def open_folder(folder, tensors, **config):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return open_checkpoint(folder)


def pack_stream(codes, bits):
    """Numbers `[count, columns]` as a stream of bits along the first dimension, in int32 words."""
    streams = []
    for column in codes.t().tolist():
        total = sum(value << (bits * i) for i, value in enumerate(column))
        words = [(total >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(column) * bits // 32))]
        streams.append([word - (1 << 32) if word >= 1 << 31 else word for word in words])
    return torch.tensor(streams, dtype=torch.int32).t()


def gptq_tensors(weight, bits, size, order=None, offset=1):
    """A round-to-nearest quantizer of `[out, in]`; returns its tensors and the weight they stand for."""
    outputs, inputs = weight.shape
    groups = torch.arange(inputs) // size if order is None else order
    count = int(groups.max()) + 1
    scales, zeros = torch.empty(count, outputs), torch.empty(count, outputs, dtype=torch.int64)
    for group in range(count):
        part = weight[:, groups == group]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scales[group] = ((high - low) / (2**bits - 1)).half().float()
        zeros[group] = (-low / scales[group]).round().clamp(1, 2**bits - 1)
    codes = (weight.t() / scales[groups] + zeros[groups]).round().clamp(0, 2**bits - 1).long()
    truth = ((codes - zeros[groups]) * scales[groups]).t().half()
    tensors = {"qweight": pack_stream(codes, bits), "qzeros": pack_stream((zeros - offset).t(), bits).t()}
    return tensors | {"scales": scales.half(), "g_idx": groups.int()}, truth


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_gptq_is_dequantized_in_every_width_and_format_with_groups_in_any_order(tmp_path, bits, form):
    torch.manual_seed(0)
    order = torch.randperm(64) // 32  # act-order
    tensors, truth = gptq_tensors(torch.randn(32, 64), bits, 32, order, offset=int(form == "gptq"))
    named = {f"model.fc.{name}": tensor for name, tensor in tensors.items()} | {"model.norm.weight": torch.ones(8)}
    settings = {"quant_method": "gptq", "bits": bits, "checkpoint_format": form}
    with open_folder(tmp_path, named, quantization_config=settings) as checkpoint:
        assert set(checkpoint.tensors) == {"model.fc.weight", "model.norm.weight"}
        assert torch.equal(checkpoint.read("model.fc.weight"), truth)
        assert checkpoint.stored_as == {"model.fc.weight": f"gptq, {bits} bits, groups of 32"}


def test_awq_is_dequantized_from_its_interleaved_order(tmp_path):
    torch.manual_seed(0)
    codes, zeros = torch.randint(0, 16, (64, 32)), torch.randint(0, 16, (2, 32))
    scales = torch.rand(2, 32).half()
    place = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(values):
        return pack_stream(values.unflatten(1, (-1, 8))[..., place].flatten(1).t(), 4).t()

    groups = torch.arange(64) // 32
    truth = ((codes - zeros[groups]) * scales.float()[groups]).t().half()
    tensors = {"fc.qweight": pack(codes), "fc.qzeros": pack(zeros), "fc.scales": scales}
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    with open_folder(tmp_path, tensors, quantization_config=settings) as checkpoint:
        assert torch.equal(checkpoint.read("fc.weight"), truth)
        assert torch.equal(checkpoint.read_entries("fc.weight", 5 * 64 + 3, 9 * 64), truth.reshape(-1)[323:576])


@pytest.mark.parametrize("shape", [(), (1,), (200,), (200, 1), (2, 3)])
def test_fp8_takes_one_scale_a_scale_a_row_and_blocks_with_smaller_edges(tmp_path, shape):
    torch.manual_seed(0)
    weight, scale = torch.randn(200, 300).to(torch.float8_e4m3fn), torch.rand(shape) + 0.5
    full = scale.reshape(-1, 1) if scale.numel() in (1, 200) else scale.repeat_interleave(128, 0)[:200]
    full = full if full.shape[1] == 1 else full.repeat_interleave(128, 1)[:, :300]
    tensors = {"fc.weight": weight, "fc.weight_scale_inv": scale, "fc.input_scale": torch.ones(())}
    with open_folder(tmp_path, tensors, torch_dtype="bfloat16") as checkpoint:
        assert list(checkpoint.tensors) == ["fc.weight"] and "activations" in checkpoint.ignored[0]
        assert torch.equal(checkpoint.read("fc.weight"), (weight.float() * full).bfloat16())


def test_int8_and_llm_int8_are_dequantized(tmp_path):
    codes, scale = torch.randint(-127, 128, (16, 32), dtype=torch.int8), torch.rand(16) + 0.1
    tensors = {"a.weight": codes, "a.weight_scale": scale[:, None].bfloat16()}
    tensors |= {"b.weight": codes.clone(), "b.SCB": scale, "b.weight_format": torch.zeros((), dtype=torch.uint8)}
    with open_folder(tmp_path, tensors, torch_dtype="float16") as checkpoint:
        assert set(checkpoint.tensors) == {"a.weight", "b.weight"}
        expected = (codes.float() * scale[:, None].bfloat16().float()).bfloat16()
        assert torch.equal(checkpoint.read("a.weight"), expected)
        assert torch.allclose(checkpoint.read("b.weight").float(), codes * scale[:, None] / 127, atol=1e-3)


def test_mxfp4_experts_are_those_that_transformers_makes(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (2, 8, 3, 16), dtype=torch.uint8)
    scales = torch.randint(120, 130, (2, 8, 3), dtype=torch.uint8)
    tensors = {"mlp.gate_up_proj_blocks": blocks, "mlp.gate_up_proj_scales": scales}
    with open_folder(tmp_path, tensors, quantization_config={"quant_method": "mxfp4"}) as checkpoint:
        assert torch.equal(checkpoint.read("mlp.gate_up_proj"), convert_moe_packed_tensors(blocks, scales))


def test_codes_of_a_scheme_that_is_not_dequantized_are_refused_by_its_name(tmp_path):
    tensors = {"fc.W_q": torch.zeros(64, 64, dtype=torch.uint8), "fc.scale": torch.ones(64, 1)}
    with pytest.raises(CheckpointError, match="quantized \\(HQQ.*dequantize"):
        open_folder(tmp_path, tensors)


def test_a_state_of_bitsandbytes_that_says_nothing_is_refused(tmp_path):
    tensors = {"fc.weight": torch.zeros(64, 1, dtype=torch.uint8), "fc.weight.absmax": torch.ones(2)}
    tensors |= {"fc.weight.quant_map": torch.ones(16)}
    tensors |= {"fc.weight.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match="bitsandbytes nf4"):
        open_folder(tmp_path, tensors)


def test_plain_integers_and_float8_weights_without_scales_stay_what_they_are(tmp_path):
    tensors = {"ids": torch.arange(4096).view(64, 64), "fc.weight": torch.randn(8, 8).to(torch.float8_e4m3fn)}
    with open_folder(tmp_path, tensors) as checkpoint:
        assert checkpoint.tensors["fc.weight"].dtype == "float8_e4m3fn" and not checkpoint.stored_as


def test_a_manifest_says_how_weights_were_stored_and_windows_hold_the_dequantized_ones(tmp_path):
    tensors, truth = gptq_tensors(torch.randn(64, 128), 4, 32)
    open_folder(tmp_path, {f"fc.{name}": tensor for name, tensor in tensors.items()}).close()
    fx = WSLFeatureExtractor()
    batch = fx(tmp_path)
    assert torch.equal(fx.decode(batch["tokens"], batch["manifest"])["fc.weight"], truth)
    again = WeightManifest.from_json(batch["manifest"].to_json())
    assert again.stored_as == {"fc.weight": "gptq, 4 bits, groups of 32"}
    windows = torch.cat([window["tokens"] for window in fx.stream(tmp_path, window_size=3)])
    assert torch.equal(windows, batch["tokens"])
    assert "stored_as" not in fx({"fc.weight": truth})["manifest"].to_json()
