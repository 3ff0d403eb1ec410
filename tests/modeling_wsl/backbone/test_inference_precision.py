"""`precision` decides the arithmetic of a backbone where nobody asks for a dtype."""

import logging

import pytest
import torch

from modeling_wsl import WSLConfig, WSLModel
from modeling_wsl.backbone import inference
from modeling_wsl.backbone.inference import inference_backbone


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "token_size": 8, "latent_size": 4}


def model_in(dtype: torch.dtype) -> WSLModel:
    torch.manual_seed(0)
    return WSLModel(WSLConfig(window_size=16, **SMALL)).to(dtype).eval()


@pytest.fixture
def timed(monkeypatch):
    """Sets what the machine is said to be faster in, and holds the widths that were timed."""
    widths = []

    def choose(faster):
        def choose_precision(device, width):
            widths.append(width)
            return faster, {"float32": 0.002, "bfloat16": 0.001}

        monkeypatch.setattr(inference, "choose_precision", choose_precision)
        return widths

    return choose


@pytest.mark.parametrize("faster", ["float32", "bfloat16"])
def test_auto_runs_a_backbone_stored_in_bfloat16_in_what_is_faster(timed, faster):
    widths = timed(faster)
    model = model_in(torch.bfloat16)
    fast, autocast = inference_backbone(model, precision="auto")
    assert (str(fast.dtype), autocast) == (f"torch.{faster}", None)
    assert model.dtype == torch.bfloat16 and widths == [384]
    again, _ = inference_backbone(fast)  # as encode_stream asks, without a precision
    assert again is fast


def test_float32_computes_what_widened_weights_do(timed):
    model = model_in(torch.bfloat16)
    fast, _ = inference_backbone(model, precision="float32")
    tokens = torch.randn(1, 16, 8)
    with torch.no_grad():
        assert torch.equal(fast.encode(tokens), model.float().encode(tokens))


def test_auto_rounds_no_weights_that_are_stored_in_float32(timed):
    timed("bfloat16")
    model = model_in(torch.float32)
    assert inference_backbone(model, precision="auto") == (model, None)
    assert inference_backbone(model, precision="bfloat16")[0].dtype == torch.bfloat16


def test_a_dtype_that_is_asked_for_outranks_precision(timed):
    timed("float32")
    fast, _ = inference_backbone(model_in(torch.bfloat16), "bfloat16", precision="auto")
    assert fast.dtype == torch.bfloat16


def test_the_choice_is_logged_once(timed, caplog):
    timed("float32")
    inference.logger.info_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=inference.logger.name):
        for _ in range(2):
            inference_backbone(model_in(torch.bfloat16), precision="auto")
    assert [line.split(" (")[0] for line in caplog.messages] == ["precision: float32"]


def test_an_unknown_precision_is_named():
    with pytest.raises(ValueError, match="precision='bf16'"):
        inference_backbone(model_in(torch.float32), precision="bf16")
