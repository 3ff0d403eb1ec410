"""Copies planted into a table: how they are made, calibrated and found again."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from search_fixtures import new_net, train, write_model, write_population
from torch import nn

from datasets_scripts.embedding import EmbedConfig, embed
from datasets_scripts.search.calibration import Calibration, held_out_rate, threshold_at
from datasets_scripts.search.nearest import FeatureSpace
from datasets_scripts.search.planted_copies import copies_of, permute_hidden, plant_copies
from datasets_scripts.search.search import search
from datasets_scripts.search.search_config import SearchConfig
from datasets_scripts.search.weight_relations import WeightVerdicts, related_groups
from datasets_scripts.sources import expand_sources
from hf_wsl.options import ConfigError


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CHAINS = {
    "mlp": (nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 2)), (3, 5), 2),
    "cnn": (
        nn.Sequential(
            *[nn.Conv2d(1, 8, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(8, 6, 5), nn.ReLU(), nn.Conv2d(6, 4, 2)],
            *[nn.Flatten(), nn.Linear(4 * 7 * 7, 20), nn.ReLU(), nn.Linear(20, 10)],
        ),
        (2, 1, 28, 28),
        4,
    ),
    "batch norm": (
        nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False)),
        (2, 3, 8, 8),
        1,
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_with_permuted_hidden_neurons_computes_the_same(name):
    net, shape, hidden = CHAINS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in [*net.parameters(), *net.buffers()]:
            if parameter.is_floating_point():
                parameter.data.uniform_(0.1, 1)
    inputs = torch.randn(shape, generator=draw())
    expected = net.eval()(inputs)
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    permuted = permute_hidden(state, draw())
    changed = [key for key in state if state[key].dim() > 1 and not torch.equal(state[key], permuted[key])]
    assert len(changed) == hidden + 1
    net.load_state_dict(permuted)
    torch.testing.assert_close(net(inputs), expected, rtol=1e-4, atol=1e-4)
    net.load_state_dict(state)


@pytest.mark.parametrize(
    "net",
    [
        nn.ModuleDict({"fc1": nn.Linear(5, 9), "fc2": nn.Linear(9, 2)}),  # names do not tell what follows what
        nn.Sequential(nn.Linear(5, 9, bias=False), nn.Linear(9, 2)),  # nor which dimension is the output
        nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(2, 6, 3), nn.Conv2d(6, 1, 1)),  # grouped, perhaps
        nn.Sequential(nn.ConvTranspose2d(6, 6, 3), nn.ConvTranspose2d(6, 6, 3)),
        nn.Sequential(nn.ConvTranspose2d(6, 3, 3), nn.ConvTranspose2d(3, 6, 3)),
        nn.Sequential(nn.Linear(5, 9), nn.GroupNorm(3, 9), nn.Linear(9, 2)),
        nn.Sequential(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), nn.Linear(5, 5)),
    ],
)
def test_what_may_be_something_else_than_a_chain_is_left_alone(net):
    state = net.state_dict()
    if "0.0.weight" in state:  # the inner chain is one; the outer one holds nested modules
        permuted = permute_hidden(state, draw())
        assert permuted["1.weight"] is state["1.weight"] and permuted["0.0.weight"] is not state["0.0.weight"]
    else:
        assert permute_hidden(state, draw()) is None


def test_copies_are_of_the_kinds_and_sizes_that_are_stated():
    state = {**new_net(0).state_dict(), "n.running_var": torch.ones(4), "n.running_mean": torch.ones(4)}
    copies = dict(copies_of(state, "net", [0.01, 0.5], seed=3))
    assert list(copies) == ["exact", "float16", "noise 0.01", "noise 0.5", "permuted"]
    weight = state["2.weight"]
    for size in (0.01, 0.5):
        noise = copies[f"noise {size}"]["2.weight"] - weight
        assert noise.std() / weight.std() == pytest.approx(size, rel=0.1)
        assert torch.equal(copies[f"noise {size}"]["n.running_var"], torch.ones(4))
    assert torch.equal(copies["float16"]["2.weight"], weight.half().float())
    assert torch.equal(copies["exact"]["2.weight"], weight)
    again = dict(copies_of(state, "net", [0.5], seed=3))
    assert torch.equal(again["noise 0.5"]["2.weight"], copies["noise 0.5"]["2.weight"])
    assert torch.equal(again["permuted"]["2.weight"], copies["permuted"]["2.weight"])
    other = dict(copies_of(state, "net", [0.5], seed=4))
    assert not torch.equal(other["noise 0.5"]["2.weight"], copies["noise 0.5"]["2.weight"])
    kinds = [kind for kind, _ in copies_of({"w": torch.full((70, 70), 1e6)}, "large", [], seed=0)]
    assert kinds == ["exact"]  # overflows float16, and there is no chain


def test_the_threshold_lets_in_no_more_strangers_than_stated():
    distances = torch.arange(1.0, 101).numpy()
    for rate, within in ((0, 0), (0.01, 1), (0.1, 10)):
        assert (distances <= threshold_at(distances, rate)).sum() == within


def test_false_positives_are_counted_on_models_that_did_not_give_the_threshold():
    features = np.random.default_rng(0).normal(size=(600, 3))
    space = FeatureSpace.of(features, "euclidean", standardize=False)
    assert abs(held_out_rate(space, features, range(600), 0.1, seed=0) - 0.1) < 0.04
    # Of so few models none may be within the threshold, and on others some are.
    assert held_out_rate(space, features[:40], range(40), 0.01, seed=0) > 0
    assert held_out_rate(space, features[:40], [i % 3 for i in range(40)], 0.01, seed=0) is None
    assert held_out_rate(space, features[:40], [0] * 30 + [*range(1, 11)], 0.01, seed=0) is None


def test_copies_whose_statistics_or_counts_differ_are_not_exact(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
    state = net.state_dict()
    write_model(tmp_path / "a", state)
    write_model(tmp_path / "same", state)
    write_model(tmp_path / "statistics", state | {"1.running_mean": torch.ones(8)})
    write_model(tmp_path / "count", state | {"1.num_batches_tracked": torch.tensor(9)})
    verdicts = WeightVerdicts(expand_sources([tmp_path]))
    kinds = {name: verdicts.kind("a", name) for name in ("same", "statistics", "count")}
    assert kinds == {"same": "exact", "statistics": "near", "count": "near"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Unrelated networks, and copies of the first ones under other owners."""
    folder = write_population(tmp_path_factory.mktemp("copies") / "models")
    bases = [load_file(folder / f"owner{i:02d}--net" / "model.safetensors") for i in range(4)]
    write_model(folder / "thief--exact", bases[0])
    write_model(folder / "thief--noisy", dict(copies_of(bases[1], "x", [0.005], 0))["noise 0.005"])
    write_model(folder / "thief--permuted", permute_hidden(bases[2], draw()))
    net = new_net(3, hidden=22, scale=0.6 + 0.07 * 3)
    write_model(folder / "tuner--tuned", train(net, 0, steps=30).state_dict())
    return folder


@pytest.fixture(scope="module")
def calibrated(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated")
    embed("pooled-statistics", [models], folder / "table.parquet")
    options = {"models": [str(models)], "noises": ["0.01", "0.1"], "sample": 12}
    config = SearchConfig(calibrate=True, output_file=str(folder / "calibration.json"), **options)
    lines = search(folder / "table.parquet", None, config)
    return folder, lines


def test_models_of_one_owner_and_near_copies_are_no_strangers(models):
    sources = expand_sources([models])
    groups = dict(zip([model.model_id for model in sources], related_groups(sources), strict=True))
    assert groups["thief--exact"] == groups["owner00--net"] == groups["owner01--net"] == groups["thief--permuted"]
    assert groups["tuner--tuned"] == groups["owner03--net"]
    assert len(set(groups.values())) == 16 - 2


def test_calibration_finds_copies_and_says_how_well(calibrated):
    folder, lines = calibrated
    calibration = Calibration.read(folder / "calibration.json")
    for metric in ("cosine", "euclidean"):
        found = calibration.metrics[metric]
        assert found["exact"] <= found["near"] <= found["threshold"]
        assert 0 < found["false_positive_rate"] < 0.5 and found["strangers"] == 20
        for kind in ("exact", "float16", "noise 0.01", "permuted"):
            assert found["kinds"][kind]["copies"] == 12
            assert found["kinds"][kind]["recall"] == 1
            assert found["kinds"][kind]["precision"] == 1 / (1 + found["false_positive_rate"])
            assert found["kinds"][kind]["found_first"] == found["kinds"][kind]["auc"] == 1
        spread = [found["kinds"][kind]["distances"][1] for kind in ("exact", "noise 0.01", "noise 0.1")]
        assert spread == sorted(spread) and spread[0] < 1e-6 < spread[2]
    assert calibration.settings["models_copied"] == 12 and calibration.settings["seed"] == 0
    assert any("permuted" in line for line in lines)


def test_calibration_is_the_same_every_time(calibrated, models, tmp_path):
    folder, _ = calibrated
    options = {"models": [str(models)], "noises": ["0.01", "0.1"], "sample": 12}
    search(
        folder / "table.parquet", None, SearchConfig(calibrate=True, output_file=str(tmp_path / "c.json"), **options)
    )
    assert (tmp_path / "c.json").read_bytes() == (folder / "calibration.json").read_bytes()


def found_groups(table, tmp_path, **options):
    output = tmp_path / "groups.json"
    search(table, None, SearchConfig(duplicates=True, output_file=str(output), **options))
    return [
        {c["model_id"]: (c["verdict"], c["by_weights"]) for c in group} for group in json.loads(output.read_text())
    ]


def test_without_calibration_a_table_tells_models_of_the_same_embedding(calibrated, tmp_path):
    groups = found_groups(calibrated[0] / "table.parquet", tmp_path)
    assert {"owner00--net": ("exact", False), "thief--exact": ("exact", False)} in groups
    assert {frozenset(group) for group in groups} <= {
        frozenset({"owner00--net", "thief--exact"}),
        frozenset({"owner02--net", "thief--permuted"}),  # its statistics are the same too
    }


def test_a_calibrated_table_tells_near_copies(calibrated, tmp_path):
    folder, _ = calibrated
    groups = found_groups(folder / "table.parquet", tmp_path, calibration=str(folder / "calibration.json"))
    members = [set(group) for group in groups]
    assert {"owner00--net", "thief--exact"} in members and {"owner01--net", "thief--noisy"} in members
    noisy = groups[members.index({"owner01--net", "thief--noisy"})]
    assert noisy["thief--noisy"] == ("near", False)


def test_with_weights_at_hand_the_weights_decide(calibrated, models, tmp_path):
    folder, _ = calibrated
    options = {"calibration": str(folder / "calibration.json"), "models": [str(models)]}
    assert found_groups(folder / "table.parquet", tmp_path, **options) == [
        dict.fromkeys(("owner00--net", "thief--exact"), ("exact", True)),
        dict.fromkeys(("owner01--net", "thief--noisy"), ("near", True)),
        dict.fromkeys(("owner02--net", "thief--permuted"), ("reordered", True)),
        dict.fromkeys(("owner03--net", "tuner--tuned"), ("fine-tune-like", True)),
    ]


def test_fine_tunes_that_are_named_are_a_kind_of_copy(models, tmp_path):
    embed("pooled-statistics", [models], tmp_path / "table.parquet")
    config = SearchConfig(
        calibrate=True,
        models=[str(models)],
        noises=["0.1"],
        sample=3,
        fine_tunes=["owner03--net=tuner--tuned"],
        output_file=str(tmp_path / "c.json"),
    )
    search(tmp_path / "table.parquet", None, config)
    assert Calibration.read(tmp_path / "c.json").metrics["cosine"]["kinds"]["fine-tune"]["copies"] == 1


def test_a_calibration_of_another_method_or_of_changed_weights_is_refused(calibrated, models, tmp_path):
    folder, _ = calibrated
    embed("random-projection", [models], tmp_path / "other.parquet")
    options = {"duplicates": True, "calibration": str(folder / "calibration.json")}
    with pytest.raises(ConfigError, match="method=pooled-statistics, this one has random-projection"):
        search(tmp_path / "other.parquet", None, SearchConfig(**options))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no calibration"):
        Calibration.read(tmp_path / "bad.json")
    changed = tmp_path / "changed"
    for i in range(3):
        write_model(changed / f"owner{i:02d}--net", new_net(40 + i, scale=3).state_dict())
    with pytest.raises(ValueError, match="not what its weights give"):
        config = SearchConfig(calibrate=True, models=[str(changed)], output_file=str(tmp_path / "c.json"))
        search(folder / "table.parquet", None, config)
    with pytest.raises(ValueError, match="Calibration needs at least 2"):
        config = SearchConfig(
            calibrate=True, models=[str(changed / "owner00--net")], output_file=str(tmp_path / "c.json")
        )
        search(folder / "table.parquet", None, config)


def test_a_calibration_of_one_architecture_is_refused_for_another(tmp_path):
    for width in (16, 20):
        for i in range(4):
            write_model(tmp_path / f"{width}" / f"owner{i}--net", new_net(i, hidden=width).state_dict())
        embed("statistics", [tmp_path / f"{width}"], tmp_path / f"{width}.parquet")
    options = {"calibrate": True, "models": [str(tmp_path / "16")], "noises": ["0.01"]}
    search(tmp_path / "16.parquet", None, SearchConfig(output_file=str(tmp_path / "c.json"), **options))
    config = SearchConfig(duplicates=True, calibration=str(tmp_path / "c.json"))
    assert search(tmp_path / "16.parquet", None, config)
    with pytest.raises(ConfigError, match="made with tensors="):
        search(tmp_path / "20.parquet", None, config)
    record = json.loads((tmp_path / "c.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps(record | {"center": record["center"][:5]}))
    with pytest.raises(ConfigError, match="of embeddings of 5 numbers"):
        search(tmp_path / "16.parquet", None, config)


def test_a_calibration_needs_the_pca_of_its_table(models, tmp_path):
    for name, fit_on in (("all", models), ("one", models / "owner00--net")):
        embed("pca", [models], tmp_path / f"{name}.parquet", EmbedConfig(latent_size=8, fit_on=[str(fit_on)]))
    options = {"calibrate": True, "models": [str(models)], "noises": ["0.01"], "sample": 2}
    search(tmp_path / "all.parquet", None, SearchConfig(output_file=str(tmp_path / "c.json"), **options))
    with pytest.raises(ConfigError, match="made with fit_on="):
        search(tmp_path / "one.parquet", None, SearchConfig(duplicates=True, calibration=str(tmp_path / "c.json")))


def test_models_that_are_not_at_hand_are_told(calibrated, models, tmp_path, caplog):
    table = calibrated[0] / "table.parquet"
    write_model(tmp_path / "other" / "one", new_net(0).state_dict())
    write_model(tmp_path / "other" / "two", new_net(1).state_dict())
    options = {"calibrate": True, "output_file": str(tmp_path / "c.json"), "noises": ["0.1"], "sample": 1}
    with pytest.raises(ValueError, match="they are called one, two ..., and the table's rows owner00--net, owner01"):
        search(table, None, SearchConfig(models=[str(tmp_path / "other")], **options))
    some = [str(tmp_path / "other"), *(str(models / f"owner{i:02d}--net") for i in range(5))]
    search(table, None, SearchConfig(models=some, **options))
    assert "2 of the 7 models named with --models are not in the table" in caplog.text
    assert "5 of the table's 20 models are at hand" in caplog.text
    with pytest.raises(ConfigError, match="the fine-tunes name nope, which is no row"):
        search(table, None, SearchConfig(models=some, fine_tunes=["nope=owner01--net"], **options))
    with pytest.raises(ConfigError, match="is a folder; name a JSON file"):
        search(table, None, SearchConfig(models=some, **(options | {"output_file": str(tmp_path)})))


def test_planted_copies_are_models_that_can_be_read(models, tmp_path):
    sources = [m for m in expand_sources([models]) if m.model_id == "owner02--net"]
    planted = plant_copies(sources, tmp_path, [0.1], seed=0)
    assert [copy.kind for copy in planted] == ["exact", "float16", "noise 0.1", "permuted"]
    assert [m.model_id for m in expand_sources([tmp_path])] == [copy.model_id for copy in planted]
