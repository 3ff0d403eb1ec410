"""Near copies: fine-tunes, noise and casts are found, independent models of one architecture never are."""

import json
import random
import struct
import sys
from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from datasets_scripts import near_copies
from datasets_scripts.near_copies import NearCopyItem, fingerprint, near_copy_groups
from modeling_wsl.checkpoints.checkpoint import open_checkpoint


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


def test_a_copy_with_permuted_neurons_is_not_found(trained):
    state, draw = dict(trained["net-0"]), torch.Generator().manual_seed(0)
    for layer, following in (("0", "2"), ("5", "7")):
        order = torch.randperm(len(state[f"{layer}.weight"]), generator=draw)
        state[f"{layer}.weight"], state[f"{layer}.bias"] = (
            state[f"{layer}.weight"][order],
            state[f"{layer}.bias"][order],
        )
        state[f"{following}.weight"] = state[f"{following}.weight"][:, order]
    assert groups_of(a=trained["net-0"], b=state) == ["a", "b"]


def test_tables_that_everyone_has_tie_nobody():
    place = torch.arange(200)[:, None] / 10000 ** (torch.arange(64) / 64)
    table = torch.cat([place.sin(), place.cos()], 1)  # [200, 128], as in any sinusoidal model

    def model(seed, constants):
        draw = torch.Generator().manual_seed(seed)
        layers = {f"layers.{i}.weight": torch.randn(32, 32, generator=draw) for i in range(4)}
        return {**{f"{name}.table": table for name in constants}, **layers}

    assert groups_of(a=model(0, ["pos"]), b=model(1, ["pos"])) == ["a", "b"]
    assert groups_of(a=model(0, ["enc", "dec", "mel"]), b=model(1, ["enc", "dec", "mel"])) == ["a", "b"]
    assert groups_of(a={"pos.table": table}, b={"pos.table": table, "w": torch.ones(9, 9)}) == ["a", "b"]
    zeros = {f"layers.{i}.weight": torch.zeros(32, 32) for i in range(4)}
    assert groups_of(a=zeros, b=zeros) == ["a", "b"]  # exact copies are told by their hash


def test_a_small_part_in_common_is_not_enough():
    draw = torch.Generator().manual_seed(0)
    shared = {f"backbone.{i}.conv.weight": torch.randn(16, 16, 3, 3, generator=draw) for i in range(8)}
    own = [{f"own.{i}.attn.weight": torch.randn(24, 24, generator=draw) for i in range(12)} for _ in range(2)]
    assert groups_of(a={**shared, **own[0]}, b={**shared, **own[1]}) == ["a", "b"]
    assert groups_of(a=shared, b={**shared, **own[1]}) == ["a", "a"]


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
    many = {f"blocks.{i}.weight": torch.randn(64, 64) for i in range(100)}
    for state in (trained["net-0"], many):
        first, second = (fingerprint(open_checkpoint(state)) for _ in range(2))
        assert json.loads(json.dumps(first)) == second
        assert len(json.dumps(first)) < 5000
    assert len(first) == near_copies.SAMPLED_TENSORS


def test_models_without_matrices_have_an_empty_fingerprint_and_stay_alone():
    tiny = {"scale": torch.ones(100), "count": torch.ones(9, 9, dtype=torch.int64), "weight": torch.ones(3, 3)}
    assert fingerprint(open_checkpoint(tiny)) == {}
    assert groups_of(a=tiny, b=tiny) == ["a", "b"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads what is resident from /proc")
def test_only_the_sampled_pages_of_a_file_are_read(tmp_path):
    path, side = tmp_path / "model.safetensors", 16384  # 1 GiB of float32, a hole on the disk
    entry = {"dtype": "F32", "shape": [side, side], "data_offsets": [0, 4 * side * side]}
    header = json.dumps({"layers.0.weight": entry}).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 4 * side * side)

    def resident_kib():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssFile:"))

    with open_checkpoint(path) as checkpoint:
        before = resident_kib()
        assert len(fingerprint(checkpoint)) == 1
        assert resident_kib() - before < 64 * 1024


def test_groups_are_those_of_a_plain_loop_over_pairs():
    draw = random.Random(0)
    noise = np.random.default_rng(0)
    bases = [
        {f"k{j}": noise.normal(0, 32, 64) for j in draw.sample(range(60), draw.randint(0, 40))} for _ in range(25)
    ]

    def copy_of(base):
        level = draw.choice([0, 20, 60])
        kept = draw.sample(sorted(base), draw.randint(0, len(base)))
        return {key: base[key] + noise.normal(0, level, 64) for key in kept}

    entries = [copy_of(draw.choice(bases)) for _ in range(150)]
    codes = [{key: np.clip(value, -127, 127).astype(np.int8) for key, value in entry.items()} for entry in entries]
    texts = [{key: near_copies.base64.b64encode(c.tobytes()).decode() for key, c in entry.items()} for entry in codes]
    groups = near_copy_groups([NearCopyItem(str(i), text) for i, text in enumerate(texts)])
    assert groups == plain_groups(codes)
    assert 25 < len(set(groups)) < 140


def plain_groups(codes: list[dict[str, np.ndarray]]) -> list[str]:
    group = list(range(len(codes)))
    for i, j in combinations(range(len(codes)), 2):
        shared = codes[i].keys() & codes[j].keys()
        close = sum(np.corrcoef(codes[i][k].astype(float), codes[j][k].astype(float))[0, 1] > 0.5 for k in shared)
        if close >= 2 and close >= 0.5 * min(len(codes[i]), len(codes[j])):
            old, new = max(group[i], group[j]), min(group[i], group[j])
            group = [new if g == old else g for g in group]
    return [str(g) for g in group]
