"""Near copies: fine-tunes, noise and casts are found, independent models of one architecture never are."""

import base64
import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from datasets_scripts.near_copies import NearCopyItem, fingerprint, near_copy_groups
from modeling_wsl.checkpoints.checkpoint import open_checkpoint
from modeling_wsl.embedding.model_embedding import embed_model


def new_net(seed: int, classes: int = 10) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        convolutions = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*convolutions, nn.Linear(512, 48), nn.ReLU(), nn.Linear(48, classes))


def train(net: nn.Module, steps: int, learning_rate: float, seed: int, modulo: int = 10) -> nn.Module:
    """Trains on scikit-learn's digits; the labels modulo `modulo` make another task of them."""
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).float()[:, None] / 8 - 1, torch.from_numpy(digits.target) % modulo
    optimizer = torch.optim.AdamW(net.parameters(), learning_rate)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(len(images), (32,), generator=draw)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
        optimizer.step()
    return net


@pytest.fixture(scope="module")
def trained():
    """State dicts: three nets trained from different initial weights, and fine-tunes of the first with new heads."""
    nets = {f"net-{seed}": train(new_net(seed), 200, 2e-3, seed) for seed in range(3)}
    for rate in (1e-4, 5e-4, 2e-3):
        tuned = new_net(99, classes=5)
        body = {name: t for name, t in nets["net-0"].state_dict().items() if not name.startswith("7.")}
        tuned.load_state_dict({**tuned.state_dict(), **body})
        nets[f"tuned-{rate}"] = train(tuned, 200, rate, 7, modulo=5)
    return {name: {key: t.clone() for key, t in net.state_dict().items()} for name, net in nets.items()}


def groups_of(**states) -> list[str]:
    return near_copy_groups([NearCopyItem(name, fingerprint(open_checkpoint(s))) for name, s in states.items()])


def stated(model_id: str, base_model: str | None = None, repository: str | None = None) -> NearCopyItem:
    return NearCopyItem(model_id, None, base_model, repository)


def test_fine_tunes_are_found_and_independent_nets_are_not(trained):
    order = ["net-1", "tuned-0.002", "net-0", "net-2", "tuned-0.0001", "tuned-0.0005"]
    groups = groups_of(**{name: trained[name] for name in order})
    assert groups == ["net-1", "tuned-0.002", "tuned-0.002", "net-2", "tuned-0.002", "tuned-0.002"]


@pytest.mark.parametrize("relative", [1e-3, 1e-2, 0.1, 0.3, 0.5])
def test_noise_does_not_hide_a_copy(trained, relative):
    draw = torch.Generator().manual_seed(0)
    noisy = {k: t + relative * t.std() * torch.randn(t.shape, generator=draw) for k, t in trained["net-0"].items()}
    assert groups_of(a=trained["net-0"], b=noisy) == ["a", "a"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_a_cast_does_not_hide_a_copy(trained, dtype):
    cast = {name: tensor.to(dtype) for name, tensor in trained["net-0"].items()}
    assert groups_of(a=trained["net-0"], b=cast) == ["a", "a"]


@pytest.mark.parametrize("prefix", ["module.", "model.", "backbone.0."])
def test_neither_a_prefix_nor_another_order_hides_a_copy(trained, prefix):
    moved = {prefix + name: tensor for name, tensor in reversed(trained["net-0"].items())}
    assert groups_of(a=trained["net-0"], b=moved) == ["a", "a"]


def test_untrained_models_of_one_architecture_are_strangers():
    nets = {f"net-{seed:02d}": new_net(seed).state_dict() for seed in range(100, 124)}
    assert groups_of(**nets) == [*nets]


def test_a_small_part_in_common_is_not_enough():
    place = torch.arange(200)[:, None] / 10000 ** (torch.arange(64) / 64)
    table = torch.cat([place.sin(), place.cos()], 1)  # [200, 128], as in any sinusoidal model

    def model(seed, shared):
        draw = torch.Generator().manual_seed(seed)
        return shared | {f"layers.{i}.weight": torch.randn(128, 128, generator=draw) for i in range(6)}

    assert groups_of(a=model(0, {"pos.table": table}), b=model(1, {"pos.table": table})) == ["a", "b"]
    draw = torch.Generator().manual_seed(2)
    backbone = {f"backbone.{i}.conv.weight": torch.randn(16, 16, 3, 3, generator=draw) for i in range(4)}
    assert groups_of(a=model(0, backbone), b=model(1, backbone)) == ["a", "b"]
    assert groups_of(a=model(0, {}), b=model(0, backbone)) == ["a", "a"]


def test_stated_base_models_tie():
    items = [
        stated("x/tuned", "Org/Base"),
        stated("y/other", "z/elsewhere"),
        stated("org/base"),
        stated("w/adapter", "x/tuned"),
        stated("v/other", "z/elsewhere"),
        stated("local-copy", repository="q/repo"),
        stated("u/tuned", "q/repo"),
        stated("t/alone"),
        stated("self/base", "self/base"),
    ]
    groups = near_copy_groups(items)
    assert groups == [
        "x/tuned",
        "y/other",
        "x/tuned",
        "x/tuned",
        "y/other",
        *["local-copy"] * 2,
        "t/alone",
        "self/base",
    ]


def test_weights_and_statements_tie_together(trained):
    prints = {name: fingerprint(open_checkpoint(state)) for name, state in trained.items()}
    items = [
        NearCopyItem("a", prints["net-0"]),
        NearCopyItem("b", prints["net-1"], "x/y"),
        NearCopyItem("c", prints["tuned-0.0005"], "x/y"),
        NearCopyItem("d", prints["net-2"]),
    ]
    assert near_copy_groups(items) == ["a", "a", "a", "d"]
    assert near_copy_groups([]) == []


def test_a_fingerprint_is_small_json_and_the_same_every_time(trained):
    first, second = (fingerprint(open_checkpoint(trained["net-0"])) for _ in range(2))
    assert json.loads(json.dumps(first)) == second and len(json.dumps(first)) < 400
    position = np.frombuffer(base64.b64decode(first["position"]), np.float16)
    np.testing.assert_allclose(position, embed_model(trained["net-0"]).position, atol=1e-3)


def test_models_without_matrices_or_of_zeros_have_no_fingerprint_and_stay_alone():
    tiny = {"scale": torch.ones(100), "count": torch.ones(9, 9, dtype=torch.int64)}
    zeros = {f"layers.{i}.weight": torch.zeros(32, 32) for i in range(4)}
    for state in (tiny, zeros):
        assert fingerprint(open_checkpoint(state)) == {}
        assert groups_of(a=state, b=state) == ["a", "b"]  # exact copies are told by their hash
