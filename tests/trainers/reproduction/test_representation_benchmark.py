"""The yardstick of representations counts what it says, and its codes give back what they can."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from datasets_scripts.embedding.linear_projection import random_projection
from modeling_wsl import WSLConfig, WSLFeatureExtractor, WSLForPreTraining, WSLModel
from modeling_wsl.backbone.losses import reconstruction_r2
from modeling_wsl.tokens.manifest import LayerSpec, TensorSpec


sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
codes, representation = map(importlib.import_module, ("weight_codes", "representation"))
TOKEN_SIZE, WINDOW_SIZE = 24, 16


def drawn_model(owner: str = "someone", seed: int = 0) -> "codes.HeldOutModel":
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    state = {
        "conv.weight": draw(16, 8, 3, 3),
        "conv.bias": draw(16),
        "norm.weight": 1 + draw(16),
        "norm.bias": draw(16),
        "low.weight": draw(30, 4) @ draw(4, 40),
        "low.bias": draw(30),
        "rnn.weight_ih_l0": draw(20, 12),
        "rnn.weight_hh_l0": draw(20, 5),
        "head.weight": draw(1, 20),
    }
    batch = WSLFeatureExtractor(token_size=TOKEN_SIZE)(state)
    parts = batch["tokens"], batch["token_mask"], batch["positions"], batch["manifest"]
    return codes.HeldOutModel(f"{owner}-{seed}", owner, *parts, outputs_last=False)


def all_codes(model: "codes.HeldOutModel", budget: int) -> dict[str, "codes.Encoded"]:
    projection = random_projection(budget - 2, TOKEN_SIZE, seed=0)
    untrained = representation.untrained_matrix_code(TOKEN_SIZE, budget, WINDOW_SIZE)
    trained = WSLConfig(token_size=TOKEN_SIZE, latent_size=budget, hidden_size=16, num_attention_heads=1)
    return {
        "projection": codes.projection_code(model, projection),
        "largest entries": codes.largest_entries(model, budget),
        "window SVD": codes.window_svd(model, budget, WINDOW_SIZE),
        "matrix SVD": codes.matrix_svd(model, budget, projection),
        "matrix code": codes.backbone_code(model, untrained),
        "backbone": codes.backbone_code(model, WSLModel(trained).eval()),
    }


@pytest.mark.parametrize("budget", [8, 14, 20])
def test_no_code_uses_more_numbers_than_its_budget(budget):
    model = drawn_model()
    for name, encoded in all_codes(model, budget).items():
        assert 0.5 * budget * len(model.tokens) < encoded.numbers <= budget * len(model.tokens), name
        assert encoded.decode(encoded.parts).shape == model.tokens.shape, name


def test_numbers_are_those_that_the_parts_hold():
    model = drawn_model()
    for name, encoded in all_codes(model, 14).items():
        fillers = encoded.unused
        assert encoded.numbers == sum(part.numel() for part in encoded.parts) - fillers, name
        assert (fillers > 0) <= (name == "matrix code"), name
        # Where fillers are moved, nothing of the code is: they are what follows the last number of each window.
        structure = sum(int((scale == 0).sum()) for scale in encoded.scales)
        assert encoded.indices + fillers <= structure, name
    assert all_codes(model, 14)["largest entries"].indices == 6 * len(model.tokens)


def test_a_matrix_of_low_rank_is_given_back_within_a_budget_that_holds_its_factors():
    model = drawn_model()
    layer, place = next(pair for pair in model.layers if pair[0].name == "low")
    assert 8 * layer.num_tokens >= 4 * (30 + 40) + 30
    svd = codes.matrix_svd(model, 8, random_projection(6, TOKEN_SIZE, seed=0))
    torch.testing.assert_close(svd.decode(svd.parts)[place], model.tokens[place], rtol=0, atol=1e-5)


def test_keras_matrices_have_their_outputs_last():
    model = drawn_model()
    keras = codes.HeldOutModel("m", "o", model.tokens, model.token_mask, model.positions, model.manifest, True)
    kernel = TensorSpec("conv/kernel", (3, 3, 8, 16), "float32")
    assert keras.matrix_shape(kernel) == (72, 16)
    assert model.matrix_shape(kernel) == (3, 384)


def test_the_largest_entries_and_nothing_else_are_kept():
    model = drawn_model()
    whole = model.token_mask.all(1)
    encoded = codes.largest_entries(model, 14)
    standardized, _, _ = codes.token_statistics(model)
    kept = torch.zeros_like(standardized).scatter(1, encoded.parts[1].long(), 1).bool()
    assert (kept.sum(1) == 6).all()
    decoded = encoded.decode(encoded.parts)
    torch.testing.assert_close(decoded[whole][kept[whole]], model.tokens[whole][kept[whole]], rtol=0, atol=1e-6)
    mean = model.tokens[whole].mean(1, keepdim=True).expand(-1, TOKEN_SIZE)
    torch.testing.assert_close(decoded[whole][~kept[whole]], mean[~kept[whole]], rtol=0, atol=1e-6)
    for row, mask in zip(standardized[whole].abs(), kept[whole], strict=True):
        assert row[mask].min() >= row[~mask].max()


@pytest.mark.parametrize("name", ["window SVD", "matrix SVD", "matrix code"])
def test_a_unit_of_noise_on_all_numbers_moves_weights_by_about_their_deviation(name):
    model = drawn_model()
    encoded = all_codes(model, 14)[name]
    clean = encoded.decode(encoded.parts)
    small = 0.01  # where a product of two noises counts for nothing
    lost = []
    for seed in range(8):
        change = encoded.decode(encoded.noisy(small, torch.Generator().manual_seed(seed))) - clean
        lost.append(1 - float(reconstruction_r2(model.tokens + change, model.tokens, model.token_mask)))
    statistics = 2 if name == "window SVD" else 0  # a token's mean and log deviation move its weights by as much each
    assert 0.3 < np.mean(lost) / small**2 / (1 + statistics) < 2


def test_no_noise_and_no_rounding_reach_an_index():
    encoded = all_codes(drawn_model(), 14)["matrix code"]
    generator = torch.Generator().manual_seed(0)
    for changed in (encoded.rounded(), encoded.noisy(0.05, generator)):
        for part, new, scale in zip(encoded.parts, changed, encoded.scales, strict=True):
            assert torch.equal(part[scale == 0], new[scale == 0])
            assert not torch.equal(part, new)


@pytest.mark.parametrize(
    ("name", "shape", "outputs_last", "kind"),
    [
        ("a.weight", (8, 4, 3, 3), False, "convolution"),
        ("a.weight", (8, 1, 3, 3), False, "depthwise convolution"),
        ("a.weight", (8, 4, 1, 1), False, "1x1 convolution"),
        ("a/kernel", (1, 1, 8, 4), True, "1x1 convolution"),
        ("a/kernel", (3, 3, 1, 4), True, "convolution"),
        ("a/depthwise_kernel", (3, 3, 8, 1), True, "depthwise convolution"),
        ("a.weight", (8, 4), False, "linear"),
        ("lstm.weight_ih_l0", (8, 4), False, "recurrent"),
        ("lstm/recurrent_kernel", (8, 4), True, "recurrent"),
        ("wte.weight", (8, 4), False, "embedding"),
        ("a/embeddings", (8, 4), True, "embedding"),
        ("norm.weight", (8,), False, "normalization"),
        ("a.bias", (8,), False, "other"),
    ],
)
def test_layers_have_the_kind_that_their_largest_tensor_says(name, shape, outputs_last, kind):
    bias = TensorSpec("a.bias", (2,), "float32")
    layer = LayerSpec("a", (TensorSpec(name, shape, "float32"), bias), 0, 1)
    assert codes.layer_kind(layer, None, outputs_last) == kind


@pytest.mark.parametrize("linear_path", [True, False])
@pytest.mark.parametrize("projection", ["pooled", "flat"])
def test_operations_are_those_that_torch_counts(linear_path, projection):
    config = WSLConfig.from_size("nano", window_size=12, linear_path=linear_path, projection=projection)
    model = WSLForPreTraining._from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 12, config.token_size), make_views=False)
        model.projection(torch.randn(1, 12, config.latent_size))
    assert counter.get_total_flops() == representation.forward_operations(config, 12)


def test_operations_of_the_network_beside_the_matrix_code_are_those_that_torch_counts():
    config = WSLConfig.from_size("nano", latent_code="matrix", linear_path=False)
    model = WSLForPreTraining._from_config(config, attn_implementation="eager")
    tokens = torch.randn(1, 12, config.token_size)
    with FlopCounterMode(display=False) as counter:
        model.wsl.code.refine(model.wsl, tokens, torch.ones_like(tokens, dtype=torch.bool))
        model.projection(torch.randn(1, 12, config.latent_size))
    assert counter.get_total_flops() == representation.forward_operations(config, 12)


def test_sums_over_layers_give_the_figures_of_whole_models():
    models = [drawn_model("one"), drawn_model("one", 1), drawn_model("two", 2)]
    projection = random_projection(12, TOKEN_SIZE, seed=0)
    scores = [representation.score(lambda m: codes.projection_code(m, projection), m, 0.05, 0) for m in models]
    summary = representation.summary(models, scores, seed=0)
    decoded = [(encoded := codes.projection_code(m, projection)).decode(encoded.parts) for m in models]
    tokens, masks = torch.cat([m.tokens for m in models]), torch.cat([m.token_mask for m in models])
    assert summary["r2"] == pytest.approx(float(reconstruction_r2(torch.cat(decoded), tokens, masks)), abs=1e-6)
    assert summary["interval"][0] <= summary["r2"] <= summary["interval"][1]
    of_one = float(reconstruction_r2(torch.cat(decoded[:2]), tokens[: -len(decoded[2])], masks[: -len(decoded[2])]))
    assert summary["r2_by_owner"]["one"] == pytest.approx(of_one, abs=1e-6)
    error = float((torch.cat(decoded) - tokens)[masks].square().sum() / tokens[masks].square().sum())
    assert summary["relative_error"]["all_together"] == pytest.approx(error, rel=1e-5)
    assert summary["r2"] - 0.02 < summary["r2_noise"] < summary["r2"]
    assert set(summary["r2_by_kind"]) == {"convolution", "linear", "recurrent", "normalization"}
    json.dumps(summary)


def test_the_pictures_show_a_backbone_that_gives_back_nothing_like_the_weights():
    found = {"r2": 0.5, "interval": [0.4, 0.6]}
    bad = {"r2": -30.0, "interval": [-40.0, -2.0]}
    spent = {"operations": 1e9, "seconds": 2.0}
    report = {
        "budgets": [32, 128],
        "token_size": 230,
        "codes": {"PCA": {"32": found, "128": found}, "window SVD": {"128": found}, "theirs": {"128": bad}},
        "training": {"PCA": spent, "theirs": {"128": spent}},
    }
    for draw, panels in ((representation.draw_r2_by_budget, 1), (representation.draw_r2_by_cost, 2)):
        drawn = draw(report)
        assert len(drawn.axes) == panels
        assert [text.get_text() for axes in drawn.axes for text in axes.texts] == ["R2 -30"] * panels
        drawn.draw_without_rendering()
