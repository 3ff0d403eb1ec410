"""The arithmetic of the controls, and of how far a model is from another one."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from datasets_scripts.embedding.linear_projection import random_projection
from modeling_wsl import WSLFeatureExtractor
from trainers.evaluation.controls import inherited_only, permuted, projected, rotated, with_noise
from trainers.evaluation.weight_comparison import (
    compare_kinds,
    compare_weights,
    function_agreement,
    layer_kinds,
    relative_error,
)
from trainers.finetuning.tasks import IMAGE_CLASSIFICATION
from trainers.zoo.digits_zoo import new_model


def test_noise_is_as_long_as_the_way_to_the_generated_model_tensor_by_tensor():
    anchor = {"a": torch.randn(50), "b": torch.randn(4, 5), "running_mean": torch.ones(3)}
    generated = {"a": anchor["a"] + 0.3, "b": anchor["b"] * 2, "running_mean": torch.zeros(3)}
    noisy = with_noise(anchor, anchor, generated, ["a", "b"], seed=0)
    for name in ("a", "b"):
        expected = (generated[name] - anchor[name]).norm()
        torch.testing.assert_close((noisy[name] - anchor[name]).norm(), expected)
    assert torch.equal(noisy["running_mean"], anchor["running_mean"])


def test_a_rotated_anchor_has_the_distance_the_angle_and_the_length_of_the_generated_model():
    anchor = {"a": torch.randn(50), "b": torch.randn(4, 5), "zero": torch.zeros(6), "kept": torch.ones(3)}
    generated = {name: 0.7 * value + 0.4 * torch.randn_like(value) for name, value in anchor.items()}
    turned = rotated(anchor, anchor, generated, ["a", "b", "zero"], seed=0)
    for name in ("a", "b", "zero"):
        torch.testing.assert_close((turned[name] - anchor[name]).norm(), (generated[name] - anchor[name]).norm())
        torch.testing.assert_close(turned[name].norm(), generated[name].norm())
        assert not torch.allclose(turned[name], generated[name])
    assert torch.equal(turned["kept"], anchor["kept"])

    other = {name: 3 * torch.randn_like(value) for name, value in anchor.items()}
    turned = rotated(other, anchor, generated, ["a"], seed=0)  # around another anchor: the same angle
    angle = torch.cosine_similarity(anchor["a"], generated["a"], dim=0)
    torch.testing.assert_close(torch.cosine_similarity(other["a"], turned["a"], dim=0), angle)


def test_permuting_keeps_every_value_and_moves_them():
    anchor = {"a": torch.randn(20, 5), "b": torch.randn(7)}
    shuffled = permuted(anchor, ["a"], seed=0)
    assert torch.equal(shuffled["a"].flatten().sort().values, anchor["a"].flatten().sort().values)
    assert not torch.equal(shuffled["a"], anchor["a"])
    assert torch.equal(shuffled["b"], anchor["b"])


def test_inherited_only_takes_what_generation_took_and_nothing_else():
    generated, scratch = {"w": torch.ones(2), "s": torch.ones(2)}, {"w": torch.zeros(2), "s": torch.zeros(2)}
    state = inherited_only(generated, {"w": "sampled", "s": "inherited: anchor"}, scratch)
    assert (state["w"].sum(), state["s"].sum()) == (0, 2)
    assert inherited_only(generated, {"w": "sampled", "s": "re-estimated"}, scratch) is None


def test_a_projection_onto_all_directions_gives_the_anchor_back():
    anchor = new_model("efficientnet", seed=0).state_dict()
    names = [name for name in anchor if name.endswith("weight") and name != "classifier.weight"]
    state = projected(WSLFeatureExtractor(), random_projection(230, 230, seed=0), anchor, names)
    assert relative_error(state, anchor, names) < 1e-5
    assert not torch.equal(state["conv_stem.weight"], anchor["conv_stem.weight"])
    for untouched in ("bn1.running_var", "classifier.weight"):
        assert torch.equal(state[untouched], anchor[untouched])


def test_kinds_of_layers_follow_from_the_module_not_from_the_name():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2), nn.PReLU())
    assert layer_kinds(model) == {
        "0.weight": "conv",
        "0.bias": "bias and other",
        "1.weight": "norm",
        "1.bias": "norm",
        "3.weight": "linear",
        "3.bias": "bias and other",
        "4.weight": "bias and other",
    }


def test_kinds_report_no_error_for_equal_weights_and_one_for_a_tensors_mean():
    model = nn.Sequential(nn.Linear(30, 20, bias=False))
    original, origins = {"0.weight": model[0].weight.detach().clone()}, {"0.weight": "sampled"}
    exact = compare_kinds([(model, original, origins)])["linear"]
    assert (exact["r2"], exact["relative_error"]) == (1, 0)
    assert exact["original"] == exact["reconstructed"]
    with torch.no_grad():
        model[0].weight.fill_(float(original["0.weight"].mean()))
    assert compare_kinds([(model, original, origins)])["linear"]["r2"] == pytest.approx(0, abs=1e-6)


def test_weights_at_known_distances_are_reported_at_them():
    model = nn.Sequential(nn.Linear(40, 30))
    reference = {name: value.clone() for name, value in model.state_dict().items()}
    std = float(reference["0.weight"].std(correction=0))
    shifted = {**reference, "0.weight": reference["0.weight"] + 2 * std, "0.bias": -reference["0.bias"]}
    found = compare_weights(model, shifted, reference, list(reference))
    assert found["kinds"]["linear"]["distance"] == pytest.approx(2, rel=1e-4)
    assert found["kinds"]["bias and other"]["cosine"] == pytest.approx(-1)
    assert found["layers"]["0.bias"] == pytest.approx(2)
    same = compare_weights(model, reference, reference, list(reference))
    assert (same["relative_error"], same["cosine"]) == (0, pytest.approx(1))
    assert same["kinds"]["linear"] == {"entries": 1200, "relative_error": 0, "cosine": pytest.approx(1), "distance": 0}


def test_a_permuted_tensor_has_the_distribution_of_the_original_and_nothing_else_of_it():
    model = nn.Sequential(nn.Linear(40, 30))
    reference = model.state_dict()
    found = compare_weights(model, permuted(reference, ["0.weight"], seed=0), reference, ["0.weight"])
    assert found["kinds"]["linear"]["distance"] == 0
    assert abs(found["cosine"]) < 0.1


def test_models_agree_with_themselves_and_less_with_others():
    examples = TensorDataset(torch.randn(30, 1, 4, 4), torch.zeros(30, dtype=torch.int64))
    model, other = (nn.Sequential(nn.Flatten(), nn.Linear(16, 5)).eval() for _ in range(2))
    itself = function_agreement(model, model, examples, IMAGE_CLASSIFICATION, max_examples=20, batch_size=7)
    assert itself == {"same_answer": 1, "kl": pytest.approx(0, abs=1e-6)}
    between = function_agreement(model, other, examples, IMAGE_CLASSIFICATION, max_examples=30)
    images = examples.tensors[0]
    with torch.no_grad():
        p, q = other(images).softmax(1), model(images).softmax(1)
    assert between["kl"] == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-4)
    assert between["same_answer"] == pytest.approx(float((p.argmax(1) == q.argmax(1)).float().mean()))
