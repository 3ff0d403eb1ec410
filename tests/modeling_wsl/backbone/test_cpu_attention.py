"""Attention in bfloat16 on a CPU beside the textbook's in float64, and where a model takes it."""

import pytest
import torch

from modeling_wsl import WSLConfig, WSLForPreTraining
from modeling_wsl.backbone import cpu_attention
from modeling_wsl.backbone.cpu_attention import key_lengths


TOKENS, SCALING = 7, 0.3


def states(batch=5, heads=3, head_dim=4, seed=0):
    """Query, key and value [batch, heads, tokens, head_dim] as three views of one tensor, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(batch, TOKENS, 3, heads, head_dim, generator=generator).bfloat16()
    gradient = torch.randn(batch, TOKENS, heads, head_dim, generator=generator).bfloat16()
    return [part.transpose(1, 2).requires_grad_() for part in whole.unbind(2)], gradient


def naive(query, key, value, lengths):
    """Window by window, float64 -> [batch, tokens, heads, head_dim]."""
    rows = []
    for row in range(len(query)):
        keys = TOKENS if lengths is None else lengths[row]
        scores = query[row].double() @ key[row, :, :keys].double().transpose(1, 2) * SCALING
        rows.append((scores.softmax(-1) @ value[row, :, :keys].double()).transpose(0, 1))
    return torch.stack(rows)


@pytest.mark.parametrize("scores_at_once", [1, 2 * 3 * TOKENS**2, 10**6])
@pytest.mark.parametrize("lengths", [None, [7, 7, 3, 0, 3]])
def test_it_is_the_textbooks_attention_in_value_and_gradient(monkeypatch, lengths, scores_at_once):
    monkeypatch.setattr(cpu_attention, "_SCORES", scores_at_once)
    (query, key, value), gradient = states()
    output = cpu_attention.cpu_attention(query, key, value, lengths, SCALING)
    expected = naive(query, key, value, lengths)
    assert output.dtype == torch.bfloat16 and output.is_contiguous()
    torch.testing.assert_close(output.double(), expected, rtol=2e-2, atol=2e-2)
    found = torch.autograd.grad(output, (query, key, value), gradient)
    true = torch.autograd.grad(expected, (query, key, value), gradient.double())
    for of_kernel, of_textbook in zip(found, true, strict=True):
        torch.testing.assert_close(of_kernel, of_textbook, rtol=2e-2, atol=3e-2)


def test_a_window_without_a_key_gives_zeros_and_no_gradient():
    (query, key, value), gradient = states(batch=2)
    output = cpu_attention.cpu_attention(query, key, value, [0, TOKENS], SCALING)
    assert not output[0].any() and output[1].any()
    for part in torch.autograd.grad(output, (query, key, value), gradient):
        assert not part[0].any() and part[1].any()


def test_padding_that_is_not_at_the_end_alone_is_left_to_torch():
    at_the_end = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    assert key_lengths(at_the_end[:, None, None]) == [2, 3, 0]
    assert key_lengths(torch.tensor([[True, False, True]])[:, None, None]) is None
    assert key_lengths(at_the_end[:, None, None].expand(3, 1, 3, 3)) == [2, 3, 0]  # the same row for every query
    assert key_lengths(torch.ones(3, 3).tril().bool()[None, None]) is None
    assert key_lengths(torch.zeros(3, 1, 1, 3)) is None  # added to the scores


@pytest.mark.parametrize("padding", ["none", "end", "hole"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_trains_with_it_as_with_textbook_attention(monkeypatch, padding, checkpointing):
    calls = []
    monkeypatch.setattr(cpu_attention, "multiplies_bfloat16", lambda: True)  # also where torch's is as fast
    real = cpu_attention.cpu_attention
    monkeypatch.setattr(cpu_attention, "cpu_attention", lambda *args: calls.append(args[3]) or real(*args))
    config = WSLConfig(token_size=11, window_size=8, hidden_size=16, num_attention_heads=2, latent_size=8, noise_std=0)
    tokens = torch.randn(3, 8, 11, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 8, 11, dtype=torch.bool)
    mask[1, 2, 4:] = False
    if padding == "end":
        mask[2, 5:] = False
    elif padding == "hole":
        mask[2, 3] = False
    gradients = {}
    for kind in ("sdpa", "eager"):
        torch.manual_seed(0)
        model = WSLForPreTraining._from_config(config, attn_implementation=kind).train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(tokens, token_mask=mask)
        output.loss.backward()
        gradients[kind] = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert bool(calls) == (padding != "hole")
    assert all(lengths == ([8, 8, 5] * 2 if padding == "end" else None) for lengths in calls)
    difference = gradients["sdpa"] - gradients["eager"]
    assert difference.norm() < 0.02 * gradients["eager"].norm()


def test_float32_and_compiled_graphs_keep_torchs_kernels(monkeypatch):
    monkeypatch.setattr(cpu_attention, "multiplies_bfloat16", lambda: True)
    assert cpu_attention.serves(torch.zeros(1, dtype=torch.bfloat16))
    assert not cpu_attention.serves(torch.zeros(1))
    assert not cpu_attention.serves(torch.zeros(1, dtype=torch.bfloat16, device="meta"))
    compiled = torch.compile(lambda x: x + 1 if cpu_attention.serves(x) else x, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1, dtype=torch.bfloat16)) == 0
