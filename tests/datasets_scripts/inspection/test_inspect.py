"""`hf-wsl inspect`: what it says of a model is so, and what is odd in a model is said."""

import json
from dataclasses import asdict

import pytest
import torch
from command_line import hf_wsl
from safetensors.torch import save, save_file
from zoo_fixtures import add_model, add_refused, tiny_state

from datasets_scripts.embedding import EmbedConfig, embed
from datasets_scripts.inspection import model_inspection, reconstruction
from datasets_scripts.inspection.model_inspection import inspect_model
from datasets_scripts.inspection.page import inspection_page
from datasets_scripts.inspection.report import text_report
from modeling_wsl import CheckpointError, WSLConfig, WSLFeatureExtractor, WSLModel
from modeling_wsl.backbone.encoding import HaloedWindows
from modeling_wsl.backbone.losses import reconstruction_r2


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    config = WSLConfig(
        token_size=30, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, latent_size=16, window_size=32
    )
    WSLModel(config).eval().save_pretrained(folder)
    WSLFeatureExtractor(token_size=30).save_pretrained(folder)
    return folder


def deep_state(layers: int = 7) -> dict[str, torch.Tensor]:
    """Equal layers, none of them odd."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for index in range(layers):
        state[f"{index}.weight"] = torch.randn(16, 24, generator=generator) / 24**0.5
        state[f"{index}.bias"] = 0.1 * torch.randn(16, generator=generator)
    return state


def said(folder) -> dict[str, list[str]]:
    return {finding.what: finding.where for finding in inspect_model(folder).findings}


def test_a_model_is_told_with_its_facts_layers_and_what_is_carried(tmp_path):
    folder = add_model(tmp_path, "ada-1", tiny_state(0), owner="ada", license="MIT", family="tiny", task="none")
    found = inspect_model(folder)
    assert {name: found.facts[name] for name in ("owner", "license", "family")} == {
        "owner": "ada",
        "license": "MIT",
        "family": "tiny",
    }
    assert (found.file_format, found.file_bytes) == ("safetensors", (folder / "model.safetensors").stat().st_size)
    stored = {tensor.name: tensor for layer in found.layers for tensor in layer.tensors}
    assert set(stored) | {tensor.name for tensor in found.carried} == set(tiny_state(0)) - {"head.weight"}
    assert stored["conv.weight"].kind == "kernel" and stored["embed.weight"].kind == "table"
    reasons = {tensor.name: tensor.reason for tensor in found.carried}
    assert reasons["norm.running_var"] == "running statistic of a batch norm"
    assert sum(layer.num_tokens for layer in found.layers) == found.num_tokens
    assert json.loads(json.dumps(asdict(found), allow_nan=False))["num_parameters"] == found.num_parameters
    text = text_report(found)
    assert "license" in text and "12×3×3×3" in text and "Pass --backbone" in text and "Pass --table" in text


def test_a_model_of_the_hub_is_told_with_its_revision_and_license(hub):
    card = b"---\nlicense: mit\npipeline_tag: image-classification\n---\n"
    commit = hub.add("ada/net", {"model.safetensors": save(deep_state()), "README.md": card})
    found = inspect_model("ada/net")
    assert (found.source, found.revision, found.facts["license"]) == ("ada/net", commit, "mit")


def test_shards_are_counted_as_one_model(tmp_path):
    state = deep_state()
    parts = [dict(list(state.items())[:6]), dict(list(state.items())[6:])]
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, tmp_path / name)
    weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for source in (tmp_path, index):
        found = inspect_model(source)
        assert found.file_format == "safetensors, 2 shards"
        assert found.file_bytes == sum((tmp_path / name).stat().st_size for name in names)
        assert found.num_parameters == sum(tensor.numel() for tensor in state.values())
    embed("pooled-statistics", [tmp_path], tmp_path.with_suffix(".parquet"))
    found = inspect_model(index, table=tmp_path.with_suffix(".parquet")).neighbors
    assert [name for name, _ in found.models] == [tmp_path.name]


def test_nothing_is_said_of_a_model_without_oddities(tmp_path):
    folder = add_model(tmp_path, "plain", deep_state())
    assert said(folder) == {}
    assert "Nothing odd." in text_report(inspect_model(folder))


def test_damaged_dead_constant_huge_and_unusual_tensors_are_found(tmp_path):
    state = deep_state()
    state["0.weight"][2, 3], state["0.weight"][4, 5] = float("nan"), float("-inf")
    state["1.weight"][[3, 7]] = 0
    state["2.bias"][:] = 0.25
    state["3.bias"][1] = 1e5
    state["4.weight"] *= 40
    state["5.weight"] = torch.outer(state["5.weight"][:, 0], state["5.weight"][0])
    found = said(add_model(tmp_path, "odd", state))
    assert found["entries are NaN"] == ["0.weight (1 of 384)"]
    assert found["entries are infinite"] == ["0.weight (1 of 384)"]
    assert found["outputs whose weights are all zero (matrix)"] == ["1.weight (2 of 16)"]
    assert found["all entries are 0.25 (bias)"] == ["2.bias"]
    assert found["entries that do not fit float16"] == ["3.bias (1e+05)"]
    unusual = {what.partition(" unlike")[0]: where[0].split()[0] for what, where in found.items() if "unlike" in what}
    assert unusual["standard deviation × √fan-in"] == "4.weight"
    assert unusual["stable rank over the smaller side"] == "5.weight"


def test_batch_norms_that_no_data_can_have_made_are_found(tmp_path):
    state = {}
    for index in range(4):
        state[f"{index}.weight"] = torch.linspace(0.5, 1.5, 8)
        state[f"{index}.running_mean"] = torch.linspace(-1, 1, 8)
        state[f"{index}.running_var"] = torch.linspace(0.5, 2, 8)
        state[f"{index}.num_batches_tracked"] = torch.tensor(100)
    state["0.running_var"][1], state["0.running_var"][2], state["0.running_var"][3] = -1, 0, float("nan")
    state["1.running_var"][0] = 3e5
    state["2.weight"][5] = 1e-9
    state["3.running_mean"], state["3.running_var"] = torch.zeros(8), torch.ones(8)
    found = said(add_model(tmp_path, "norms", state))
    assert found["negative running variances"] == ["0 (1 of 8)"]
    assert found["running statistics of a batch norm that are NaN or infinite"] == ["0 (1 of 8)"]
    assert found["running variances below 1e-10: channels whose input was constant"] == ["0 (1 of 8)"]
    assert found["running variances that do not fit float16"] == ["1 (3e+05)"]
    assert found["scales of a batch norm that are next to 0: channels that are off"] == ["2 (1 of 8)"]
    assert found["running statistics as initialized: it never saw data in training mode"] == ["3"]


def test_reconstruction_by_layer_is_that_of_the_whole_model_at_once(backbone, tmp_path):
    state = {"a.weight": torch.randn(20, 17), "a.bias": torch.randn(20), "b.weight": 5 * torch.randn(9, 20)}
    found = inspect_model(add_model(tmp_path, "net", state), backbone).reconstruction
    model = WSLModel.from_pretrained(backbone).eval()
    batch = WSLFeatureExtractor(token_size=30)(state)
    tokens, mask, positions = batch["tokens"], batch["token_mask"], batch["positions"]
    with torch.no_grad():
        output = model(tokens[None], token_mask=mask[None], positions=positions[None]).reconstruction[0]
    assert found.num_tokens == len(tokens) <= 32 + 2 * reconstruction.HALO
    assert found.overall["backbone"].r2 == pytest.approx(float(reconstruction_r2(output, tokens, mask)), rel=1e-4)
    for index, name in enumerate(("a", "b")):
        own = positions[:, 1] == index
        error, weights = (output - tokens)[own] * mask[own], tokens[own]
        fidelity = found.layers[name]["backbone"]
        assert fidelity.relative_error == pytest.approx(float(error.norm() / weights.norm()), rel=1e-4)
        assert fidelity.r2 == pytest.approx(float(reconstruction_r2(output[own], tokens[own], mask[own])), rel=1e-4)
    random = found.overall["random projection"]
    assert random.r2 == pytest.approx(14 / 30, abs=0.1)  # of weights without structure


def test_pca_is_judged_on_tokens_that_it_was_not_fitted_on(backbone, tmp_path):
    torch.manual_seed(1)
    directions = torch.randn(5, 30)
    structured = {"weight": torch.randn(400, 5) @ directions}
    noise = {"weight": torch.randn(400, 30)}
    overall = [
        inspect_model(add_model(tmp_path, name, state), backbone).reconstruction.overall
        for name, state in (("structured", structured), ("noise", noise))
    ]
    assert overall[0]["pca"].r2 > 0.99
    assert overall[1]["pca"].r2 == pytest.approx(14 / 30, abs=0.04)  # fitted on the same tokens it would be above


def test_a_long_model_goes_through_in_windows_that_cover_every_token_once(backbone, tmp_path):
    folder = add_model(tmp_path, "long", deep_state(30))
    found = inspect_model(folder, backbone).reconstruction
    assert found.num_tokens > 3 * 32 + 2 * reconstruction.HALO
    model, extractor = WSLModel.from_pretrained(backbone).eval(), WSLFeatureExtractor(token_size=30)
    batch = extractor(deep_state(30))
    windows = HaloedWindows(found.num_tokens, 32, reconstruction.HALO)
    output = torch.zeros_like(batch["tokens"])
    for index in range(len(windows)):
        row = windows.row_start(index)
        fields = (batch[name][None, row : row + windows.row_length] for name in ("tokens", "token_mask", "positions"))
        start, stop = windows.core(index)
        with torch.no_grad():
            output[start:stop] = model(*fields).reconstruction[0, start - row : stop - row]
    expected = float(reconstruction_r2(output, batch["tokens"], batch["token_mask"]))
    assert found.overall["backbone"].r2 == pytest.approx(expected, rel=1e-4)


def test_a_model_with_nan_is_inspected_and_kept_from_backbone_and_table(backbone, tmp_path):
    add_refused(tmp_path)
    embed("pooled-statistics", [add_model(tmp_path, "net", tiny_state(0))], tmp_path / "table.parquet")
    found = inspect_model(tmp_path / "eve-nan", backbone, tmp_path / "table.parquet")
    assert found.reconstruction is None and found.neighbors is None
    assert "Not done: conv.weight holds NaN or infinity" in text_report(found)
    assert "Not searched: conv.weight holds NaN" in inspection_page(found)


def test_the_nearest_models_are_found_for_a_model_of_the_table_and_for_another_one(backbone, tmp_path):
    zoo = tmp_path / "zoo"
    for seed in range(4):
        add_model(zoo, f"net-{seed}", tiny_state(seed))
    other = {name: t + 1e-6 if t.is_floating_point() else t for name, t in tiny_state(2).items()}
    stranger = add_model(tmp_path, "stranger", other)
    for method in ("pooled-statistics", str(backbone)):
        embed(method, [zoo], tmp_path / "table.parquet", EmbedConfig())
        own = inspect_model(zoo / "net-1", table=tmp_path / "table.parquet")
        assert not own.neighbors.own_row and own.neighbors.models[0][0] == "net-1"
        assert "A row at distance 0.0000 is this model itself" in text_report(own)
        found = inspect_model(stranger, table=tmp_path / "table.parquet").neighbors
        assert not found.own_row and found.models[0][0] == "net-2" and found.models[0][1] < 1e-3
        distances = [distance for _, distance in found.models]
        assert distances == sorted(distances)


def test_a_model_of_another_folder_with_the_same_name_is_not_taken_for_the_row(tmp_path):
    zoo, table = tmp_path / "zoo", tmp_path / "table.parquet"
    for seed in range(4):
        add_model(zoo, f"net-{seed}", tiny_state(seed))
    embed("pooled-statistics", [zoo], table)
    found = inspect_model(add_model(tmp_path / "other", "net-1", tiny_state(3)), table=table).neighbors
    assert not found.own_row and found.models[0][0] == "net-3" and found.models[0][1] < 1e-9


def test_a_model_of_the_hub_has_its_own_row_at_the_same_commit_alone(hub, tmp_path):
    table = tmp_path / "table.parquet"
    for name in ("one", "two", "three"):
        hub.add(f"ada/{name}", {"model.safetensors": save({"w": torch.randn(8, 9)})})
    embed("pooled-statistics", ["ada/one", "ada/two", "ada/three"], table)
    found = inspect_model("ada/one", table=table).neighbors
    assert found.own_row and sorted(name for name, _ in found.models) == ["ada/three", "ada/two"]
    hub.add("ada/one", {"model.safetensors": save({"w": torch.randn(8, 9)})})
    found = inspect_model("ada/one", table=table).neighbors
    assert not found.own_row and len(found.models) == 3 and found.models[0][1] > 1e-3


def test_a_table_that_a_model_cannot_be_compared_with_is_refused_before_the_model_is_read(tmp_path, monkeypatch):
    zoo, table = tmp_path / "zoo", tmp_path / "table.parquet"
    for seed in range(3):
        add_model(zoo, f"net-{seed}", deep_state())
    monkeypatch.setattr(model_inspection, "tensor_statistics", None)  # calling it would be an error
    with pytest.raises(ValueError, match="no such table of embeddings"):
        inspect_model(zoo / "net-0", table=table)
    embed("pca", [zoo], table, EmbedConfig(latent_size=4))
    with pytest.raises(ValueError, match="embed pca --fit_on MODELS"):
        inspect_model(zoo / "net-0", table=table)


def test_nothing_of_a_model_is_markup_or_a_control_character_on_the_page_or_in_the_text(tmp_path):
    state = {"<script>alert(1)</script>.weight": torch.randn(40, 3), "\x1b[31mred.weight": torch.randn(8, 9)}
    folder = add_model(tmp_path, "hostile", state, license="<img src=x onerror=alert(2)>", family="$title")
    found = inspect_model(folder)
    page, text = inspection_page(found), text_report(found)
    assert "<script" not in page and "<img" not in page and "&lt;script&gt;" in page
    assert "$title" in page  # a placeholder of the template stays as it was given
    assert "\x1b" not in page and "\x1b" not in text
    assert " src=" not in page.replace("&lt;img src=x", "") and "url(" not in page and "<link" not in page


def test_every_layer_of_many_entries_is_drawn(tmp_path):
    state = deep_state(3) | {"3.weight": torch.ones(10, 10), "4.weight": torch.randn(5)}
    page = inspection_page(inspect_model(add_model(tmp_path, "net", state)))
    assert page.count('aria-label="histogram"') == 3  # not the constant tensor, and not that of five entries


def test_what_is_no_model_or_several_is_refused(tmp_path):
    zoo = tmp_path / "zoo"
    for seed in range(2):
        add_model(zoo, f"net-{seed}", deep_state())
    with pytest.raises(ValueError, match="holds 2 models; name one of them"):
        inspect_model(zoo)
    (tmp_path / "evil.pkl").write_bytes(b"\x80\x04cos\nsystem\n(X\x04\x00\x00\x00true\x85R.")
    with pytest.raises(CheckpointError, match="cannot be read"):
        inspect_model(tmp_path / "evil.pkl")
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(CheckpointError, match="is JSON, not weights"):
        inspect_model(tmp_path / "list.json")
    with pytest.raises(ValueError, match="no such table of embeddings"):
        inspect_model(zoo / "net-0", table=tmp_path / "missing.parquet")


def test_the_command_prints_the_text_and_writes_the_page(tmp_path):
    folder = add_model(tmp_path, "net", deep_state())
    page = tmp_path / "out" / "page.html"
    result = hf_wsl("inspect", folder, "--output_file", page)
    assert result.exit_code == 0 and "Nothing odd." in result.stdout and str(page) in result.stdout
    assert page.read_text().startswith("<!doctype html>") and [p.name for p in page.parent.iterdir()] == ["page.html"]


@pytest.mark.parametrize("command", [["inspect", "nowhere"], ["embed", "statistics", "nowhere"]])
def test_an_output_that_is_a_folder_is_refused_before_any_work(tmp_path, command):
    result = hf_wsl(*command, "--output_file", tmp_path)
    assert result.exit_code == 1 and "is a folder" in result.output
