"""Copies in a table: found by fingerprints, and told by weights where these are at hand."""

import json

import pytest
import torch
from command_line import hf_wsl
from safetensors.torch import load_file, save_file
from search_fixtures import new_net, train, write_model, write_population
from torch import nn

from datasets_scripts.embedding import embed
from datasets_scripts.search.search import search
from datasets_scripts.search.search_config import SearchConfig
from hf_wsl.options import ConfigError


def permuted(state):
    """The first layer's neurons in another order, with the columns that read them."""
    weights = [name for name, value in state.items() if value.dim() > 1]
    order = torch.randperm(len(state[weights[0]]), generator=torch.Generator().manual_seed(0))
    bias = weights[0].replace("weight", "bias")
    moved = {weights[0]: state[weights[0]][order], bias: state[bias][order], weights[1]: state[weights[1]][:, order]}
    return {**state, **{name: value.contiguous() for name, value in moved.items()}}


def noisy(state, size):
    draw = torch.Generator().manual_seed(0)
    return {
        name: value + size * value.std(correction=0) * torch.randn(value.shape, generator=draw)
        for name, value in state.items()
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Unrelated networks, and copies of the first ones under other owners."""
    folder = write_population(tmp_path_factory.mktemp("copies") / "models")
    bases = [load_file(folder / f"owner{i:02d}--net" / "model.safetensors") for i in range(5)]
    write_model(folder / "thief--exact", bases[0])
    write_model(folder / "thief--noisy", noisy(bases[1], 0.005))
    write_model(folder / "thief--permuted", permuted(bases[2]))
    net = new_net(3, hidden=22, scale=0.6 + 0.07 * 3)
    write_model(folder / "tuner--tuned", train(net, 0, steps=30).state_dict())
    write_model(folder / "thief--halved", {name: value.half() for name, value in bases[4].items()})
    return folder


@pytest.fixture(scope="module")
def table(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "table.parquet"
    embed("profile", [models], path)
    return path


def found_groups(table, tmp_path, **options):
    output = tmp_path / "groups.json"
    search(table, None, SearchConfig(duplicates=True, output_file=str(output), **options))
    return [
        {c["model_id"]: (c["verdict"], c["by_weights"]) for c in group} for group in json.loads(output.read_text())
    ]


def test_fingerprints_alone_tell_copies(table, tmp_path):
    groups = found_groups(table, tmp_path)
    for pair in (
        {"owner00--net", "thief--exact"},
        {"owner01--net", "thief--noisy"},
        {"owner03--net", "tuner--tuned"},
        {"owner04--net", "thief--halved"},
    ):
        assert dict.fromkeys(pair, ("copy or fine-tune", False)) in groups
    assert dict.fromkeys(("owner02--net", "thief--permuted"), ("permuted or rescaled copy", False)) in groups


def test_with_weights_at_hand_the_weights_decide(table, models, tmp_path):
    assert found_groups(table, tmp_path, models=[str(models)]) == [
        dict.fromkeys(("owner00--net", "thief--exact"), ("same weights", True)),
        dict.fromkeys(("owner01--net", "thief--noisy"), ("copy", True)),
        dict.fromkeys(("owner02--net", "thief--permuted"), ("permuted or rescaled copy", True)),
        dict.fromkeys(("owner03--net", "tuner--tuned"), ("fine-tune", True)),
        dict.fromkeys(("owner04--net", "thief--halved"), ("copy", True)),
    ]


def test_counts_of_batches_do_not_matter_and_statistics_do(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
    state = net.state_dict()
    write_model(tmp_path / "models" / "a", state)
    write_model(tmp_path / "models" / "count", state | {"1.num_batches_tracked": torch.tensor(9)})
    write_model(tmp_path / "models" / "statistics", state | {"1.running_mean": torch.ones(8)})
    embed("profile", [tmp_path / "models"], tmp_path / "table.parquet")
    (group,) = found_groups(tmp_path / "table.parquet", tmp_path, models=[str(tmp_path / "models")])
    assert {verdict for verdict, _ in group.values()} <= {"same weights", "copy"}


def test_a_table_without_fingerprints_says_what_makes_them(models, tmp_path):
    embed("pooled-statistics", [models], tmp_path / "table.parquet")
    with pytest.raises(ValueError, match="has no fingerprints. Make it with `hf-wsl embed profile`"):
        search(tmp_path / "table.parquet", None, SearchConfig(duplicates=True))


@pytest.mark.parametrize("option", ["--calibrate", "--calibration", "--noises"])
def test_options_of_earlier_versions_are_refused_with_what_to_use(table, option):
    result = hf_wsl("search", table, option, "0.1", "--models", "m")
    assert result.exit_code == 1 and f"'{option}'" in result.output and "--duplicates" in result.output


def test_models_that_are_not_at_hand_are_told(table, models, tmp_path, caplog):
    write_model(tmp_path / "other" / "one", new_net(0).state_dict())
    write_model(tmp_path / "other" / "two", new_net(1).state_dict())
    with pytest.raises(ValueError, match="they are called one, two ..., and the table's rows owner00--net, owner01"):
        search(table, None, SearchConfig(duplicates=True, models=[str(tmp_path / "other")]))
    some = [str(tmp_path / "other"), *(str(models / f"owner{i:02d}--net") for i in range(5))]
    search(table, None, SearchConfig(duplicates=True, models=some))
    assert "2 of the 7 models named with --models are not in the table" in caplog.text
    with pytest.raises(ConfigError, match="is a folder; name a JSON file"):
        search(table, None, SearchConfig(duplicates=True, output_file=str(tmp_path)))


def test_a_model_with_infinite_weights_is_compared_where_that_is_asked_for(models, tmp_path):
    state = load_file(models / "owner00--net" / "model.safetensors")
    broken = {name: value.clone() for name, value in state.items()}
    next(value for value in broken.values() if value.dim() > 1)[0, 0] = torch.inf
    write_model(tmp_path / "models" / "plain", state)
    write_model(tmp_path / "models" / "broken", state)
    embed("profile", [tmp_path / "models"], tmp_path / "table.parquet")
    save_file(broken, tmp_path / "models" / "broken" / "model.safetensors")
    (group,) = found_groups(tmp_path / "table.parquet", tmp_path, models=[str(tmp_path / "models")])
    assert all(verdict.startswith("not comparable: ") for verdict, _ in group.values())
    options = {"models": [str(tmp_path / "models")], "allow_nonfinite": True}
    (group,) = found_groups(tmp_path / "table.parquet", tmp_path, **options)
    assert not any(verdict.startswith("not comparable") for verdict, _ in group.values())
