"""The embedding of a model by its weights: what changes its sections, and what does not."""

import numpy as np
import pytest
import torch
from torch import nn

from modeling_wsl import CheckpointError, NonFiniteWeightsError, embed_model
from modeling_wsl.embedding.model_embedding import SECTIONS
from modeling_wsl.embedding.network_layers import MAX_ENTRIES
from modeling_wsl.embedding.profile import profile_names


COPY_COSINE = 0.45


def mlp(seed: int, width: int = 48) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(20, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 6)
    ).state_dict()


def cnn(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 9, 10),
    )
    for tensor in model[1].parameters():
        nn.init.uniform_(tensor, 0.5, 1.5)
    return model.state_dict()


def permuted(state: dict[str, torch.Tensor], layer: str, following: str, norm: str = "") -> dict[str, torch.Tensor]:
    """The same function with the neurons between two layers in another order."""
    state = dict(state)
    order = torch.randperm(len(state[f"{layer}.weight"]), generator=torch.Generator().manual_seed(1))
    for name in (f"{layer}.weight", f"{layer}.bias"):
        state[name] = state[name][order]
    if norm:
        state |= {n: t[order] for n, t in state.items() if n.startswith(f"{norm}.") and t.dim()}
    weight = state[f"{following}.weight"]
    state[f"{following}.weight"] = weight.reshape(len(weight), len(order), -1)[:, order].reshape(weight.shape)
    return state


@pytest.mark.parametrize(
    ("state", "copy"),
    [(mlp(0), permuted(mlp(0), "0", "2")), (cnn(0), permuted(cnn(0), "0", "3", norm="1"))],
    ids=["mlp", "cnn with batch norm"],
)
def test_the_order_of_neurons_moves_the_position_alone(state, copy):
    first, second = embed_model(state), embed_model(copy)
    np.testing.assert_allclose(first.profile, second.profile, rtol=1e-3, atol=1e-3)
    assert first.probe @ second.probe > 0.999
    assert first.position @ second.position < 0.95


def test_a_permuted_convolution_that_is_flattened_keeps_its_profile():
    first, second = embed_model(cnn(0)), embed_model(permuted(cnn(0), "3", "6"))
    np.testing.assert_allclose(first.profile, second.profile, rtol=1e-3, atol=1e-3)


def test_scaling_neurons_up_and_the_next_layer_down_keeps_the_probe():
    state = mlp(0)
    scale = torch.linspace(0.5, 4, 48)
    state = {name: tensor for name, tensor in state.items() if "bias" not in name}
    copy = state | {"0.weight": state["0.weight"] * scale[:, None], "2.weight": state["2.weight"] / scale}
    assert embed_model(state).probe @ embed_model(copy).probe > 0.999


@pytest.mark.parametrize("size", [0.1, 0.3, 1.0])
def test_noise_on_the_weights_leaves_a_copy_near(size):
    state = mlp(0)
    generator = torch.Generator().manual_seed(0)
    copy = {n: t + size * t.std() * torch.randn(t.shape, generator=generator) for n, t in state.items()}
    assert embed_model(state).position @ embed_model(copy).position > COPY_COSINE


def test_networks_of_other_seeds_are_no_copies():
    positions = np.stack([embed_model(mlp(seed)).position for seed in range(12)])
    cosines = positions @ positions.T - np.eye(12)
    assert np.abs(cosines).max() < COPY_COSINE


def test_the_same_map_in_another_layout_has_the_same_embedding():
    state = cnn(0)
    keras = {
        "conv/kernel": state["0.weight"].permute(2, 3, 1, 0),
        "conv/bias": state["0.bias"],
        "dense/kernel": state["6.weight"].T,
        "dense/bias": state["6.bias"],
    }
    torch_like = {
        "conv.weight": state["0.weight"],
        "conv.bias": state["0.bias"],
        "dense.weight": state["6.weight"],
        "dense.bias": state["6.bias"],
    }
    first, second = embed_model(keras), embed_model(torch_like)
    for section in SECTIONS:
        np.testing.assert_allclose(getattr(first, section), getattr(second, section), rtol=1e-4, atol=1e-5)


def test_a_matrix_goes_before_its_bias_in_a_file_that_is_sorted_by_name():
    state = mlp(0)
    first, second = embed_model(state), embed_model(dict(sorted(state.items())))
    for section in SECTIONS:
        np.testing.assert_array_equal(getattr(first, section), getattr(second, section))


def test_packed_query_key_and_value_are_three_layers():
    torch.manual_seed(0)
    q, k, v, bias = torch.randn(3, 16, 16).unbind() + (torch.randn(48),)
    packed = {"attn.qkv.weight": torch.cat([q, k, v]), "attn.qkv.bias": bias}
    split = {}
    for name, weight, part in zip("qkv", (q, k, v), bias.chunk(3), strict=True):
        split |= {f"attn.{name}.weight": weight, f"attn.{name}.bias": part}
    np.testing.assert_allclose(embed_model(packed).profile, embed_model(split).profile, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e20, 1e37])
def test_weights_of_any_size_have_a_finite_embedding(scale):
    embedding = embed_model({name: tensor * scale for name, tensor in mlp(0).items()})
    assert all(np.isfinite(getattr(embedding, section)).all() for section in SECTIONS)
    assert embedding.position @ embed_model(mlp(0)).position > 0.999


def test_a_layer_of_more_entries_than_are_looked_at_is_sampled(monkeypatch):
    monkeypatch.setattr("modeling_wsl.embedding.network_layers.MAX_ENTRIES", 4096)
    torch.manual_seed(0)
    state = {"a.weight": torch.randn(300, 64), "a.bias": torch.randn(300), "b.weight": torch.randn(8, 300)}
    sampled, noisy = embed_model(state), embed_model({n: t + 0.1 * torch.randn_like(t) for n, t in state.items()})
    assert MAX_ENTRIES > 4096
    assert sampled.position @ noisy.position > 0.9
    assert sampled.probe @ noisy.probe > 0.8


def test_zeros_and_single_entries_are_embedded():
    embedding = embed_model({"a.weight": torch.zeros(4, 4), "b.weight": torch.ones(1, 1), "c": torch.tensor(2.0)})
    assert all(np.isfinite(getattr(embedding, section)).all() for section in SECTIONS)


def test_the_profile_has_a_name_for_each_number_and_the_repr_is_one_line():
    embedding = embed_model(mlp(0))
    assert embedding.profile.shape == (len(profile_names()),) == (273,)
    assert repr(embedding) == "ModelEmbedding(3 layers, profile=273, position=128, probe=128)"
    assert embedding.layers == ("0.weight", "2.weight", "4.weight")


def test_weights_that_are_not_finite_and_models_without_a_matrix_are_refused():
    with pytest.raises(NonFiniteWeightsError, match="2.weight"):
        embed_model(mlp(0) | {"2.weight": torch.full((48, 48), torch.nan)})
    with pytest.raises(CheckpointError, match="no matrix"):
        embed_model({"norm.weight": torch.ones(8)})
    assert np.isfinite(
        embed_model(mlp(0) | {"2.weight": torch.full((48, 48), torch.nan)}, allow_nonfinite=True).profile
    ).all()
