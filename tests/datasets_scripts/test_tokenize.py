"""What `tokenize` writes: seen through `load_dataset`, and compared with the feature extractor and the manifest."""

import os
import socket

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from zoo_fixtures import add_model, add_refused, make_zoo, tiny_state

from datasets_scripts.model_task import feature_extractor
from datasets_scripts.schema import window_features
from datasets_scripts.tokenize import tokenize
from datasets_scripts.tokenize_config import TokenizeConfig, TokenizeError
from hf_wsl.run_folder import RunFolderError
from modeling_wsl.checkpoints.checkpoint import open_checkpoint
from modeling_wsl.feature_extraction_wsl import WSLFeatureExtractor
from modeling_wsl.tokens.manifest import Segment, WeightManifest, mask_from_valid_entries, positions_from_segments
from trainers.data.windows.dataset_source import DatasetSource


CONFIG = TokenizeConfig(token_size=16, window_size=24, validation_fraction=0.4)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dataset of ten models, four of them refused, with several row groups and files."""
    folder = tmp_path_factory.mktemp("tokenize")
    zoo = make_zoo(folder / "zoo")
    add_refused(zoo)
    config = TokenizeConfig(**{**CONFIG.settings(), "max_shard_size": "5KB", "max_row_group_size": "2KB"})
    return zoo, folder / "dataset", tokenize(zoo, folder / "dataset", config)


def load(folder, name, **options):
    return datasets.load_dataset(str(folder), name, **options)


def rows_of(splits):
    return [row for split in splits.values() for row in split]


def test_both_configs_load_with_their_features(made):
    _, dataset, report = made
    windows, models = load(dataset, "windows"), load(dataset, "models")
    assert set(windows) == {"train", "validation"}
    assert set(models) == {"train", "validation", "refused"}
    assert windows["train"].features == window_features(16)
    assert windows["train"].features["tokens"] == datasets.List(datasets.List(datasets.Value("float16"), length=16))
    assert (report.accepted, report.refused) == (6, 4)
    assert sum(len(split) for split in windows.values()) == report.num_windows
    assert load(dataset, None)["train"].column_names == windows["train"].column_names  # windows are the default


def test_both_configs_stream_row_by_row(made):
    _, dataset, _ = made
    for name in ("windows", "models"):
        whole, stream = load(dataset, name, split="train"), load(dataset, name, split="train", streaming=True)
        assert stream.features == whole.features
        assert [row["model_id"] for row in stream] == whole["model_id"][:]


def test_rows_are_the_feature_extractor_s_tokens_rounded_to_float16(made):
    zoo, dataset, _ = made
    windows = rows_of(load(dataset, "windows"))
    models = [row for row in rows_of(load(dataset, "models")) if row["status"] == "accepted"]
    assert len(models) == 6
    for model in models:
        mine = sorted((w for w in windows if w["model_id"] == model["model_id"]), key=lambda w: w["window_index"])
        expected = feature_extractor(CONFIG)(zoo / model["model_id"])
        tokens = torch.from_numpy(np.concatenate([np.array(w["tokens"], np.float16) for w in mine]))
        assert torch.equal(tokens, expected["tokens"].half())
        assert [w["token_start"] for w in mine] == list(range(0, len(tokens), 24))
        assert [w["num_tokens"] for w in mine] == [len(w["tokens"]) for w in mine]
        assert model["num_windows"] == len(mine) > 1
        assert model["num_tokens"] == len(tokens)
        assert model["num_parameters"] == expected["manifest"].num_parameters


@pytest.mark.parametrize(
    "options", [{}, {"tokenization": "sparse"}, {"tokenization": "sparse", "position_unit": "row"}]
)
def test_masks_and_positions_follow_from_the_columns(tmp_path, options):
    config = TokenizeConfig(**{**CONFIG.settings(), **options, "validation_fraction": 0.0})
    tokenize(make_zoo(tmp_path / "zoo"), tmp_path / "dataset", config)
    manifests = {m["model_id"]: m["manifest"] for m in load(tmp_path / "dataset", "models", split="train")}
    for row in load(tmp_path / "dataset", "windows", split="train"):
        manifest = WeightManifest.from_json(manifests[row["model_id"]])
        start, stop = row["token_start"], row["token_start"] + row["num_tokens"]
        columns = ("segment_layer", "segment_position", "segment_stride", "segment_length")
        segments = [Segment(*values) for values in zip(*(row[c] for c in columns), strict=True)]
        assert torch.equal(positions_from_segments(start, segments), manifest.positions(start, stop))
        valid = torch.tensor(row["valid_entries"])
        assert torch.equal(mask_from_valid_entries(valid, 16), manifest.token_mask(start, stop))
        beyond = torch.tensor(row["tokens"])[~manifest.token_mask(start, stop)]
        assert not beyond.any()


def test_a_float32_dataset_decodes_to_the_same_bits(tmp_path):
    state = tiny_state(0)
    state["head.bias"][0] = 1e30  # float16 would refuse it
    add_model(tmp_path / "zoo", "one", state)
    config = TokenizeConfig(token_size=16, dtype="float32", validation_fraction=0.0)
    tokenize(tmp_path / "zoo", tmp_path / "dataset", config)
    model = load(tmp_path / "dataset", "models", split="train")[0]
    rows = load(tmp_path / "dataset", "windows", split="train")
    tokens = torch.from_numpy(np.concatenate([np.array(row["tokens"], np.float32) for row in rows]))
    decoded = WSLFeatureExtractor(token_size=16).decode(tokens, WeightManifest.from_json(model["manifest"]), {})
    assert decoded
    assert all(torch.equal(tensor, state[name]) for name, tensor in decoded.items())


def test_refused_models_are_rows_with_the_reason(made):
    _, dataset, _ = made
    refused = {row["model_id"]: row for row in load(dataset, "models", split="refused")}
    assert set(refused) == {"eve-loud", "eve-nan", "eve-worn", "evil.pkl"}
    assert "'head.bias' holds -70000, more than float16 does" in refused["eve-loud"]["reason"]
    assert "dtype float32" in refused["eve-loud"]["reason"]
    assert "'conv.weight' holds nan" in refused["eve-nan"]["reason"]
    assert "'norm.running_var' holds nan" in refused["eve-worn"]["reason"]
    assert "allow_nonfinite" in refused["eve-nan"]["reason"]
    assert "cannot be read" in refused["evil.pkl"]["reason"]
    assert all(row["status"] == "refused" and row["num_windows"] == 0 for row in refused.values())
    assert refused["eve-nan"]["owner"] == "eve"  # what its files say is kept
    windows = rows_of(load(dataset, "windows"))
    assert not {w["model_id"] for w in windows} & set(refused)


def test_copies_share_a_group_and_a_split_and_owners_stay_together(made):
    zoo, dataset, report = made
    models = {
        row["model_id"]: row for split in ("train", "validation") for row in load(dataset, "models", split=split)
    }
    copy, original = models["dan-copy-of-bob"], models["bob-2"]
    assert copy["weights_sha256"] == original["weights_sha256"] == open_checkpoint(zoo / "bob-2").sha256()
    assert copy["duplicate_group"] == original["duplicate_group"] == "bob-2"
    assert copy["split"] == original["split"]
    assert models["ada-0"]["split"] == models["ada-1"]["split"]
    assert models["ada-0"]["duplicate_group"] == "ada-0"
    assert {m["split"] for m in models.values()} == {"train", "validation"}
    assert 0 < report.tokens_by_split["validation"] <= 0.4 * report.num_tokens


def test_windows_that_must_not_be_passed_on_lie_in_files_of_their_own(tmp_path):
    zoo = tmp_path / "zoo"
    licenses = {"ada": "mit", "bob": "cc-by-nc-nd-4.0", "copy-of-bob": "mit", "cyd": None, "dan": "Apache 2.0"}
    for number, (name, license) in enumerate(licenses.items()):
        state = tiny_state(1 if "copy" in name else number)
        add_model(zoo, name, state, family="vit", **({"license": license} if license else {}))
    for by_family, files in ((False, "train"), (True, "train-vit")):
        config = TokenizeConfig(
            token_size=16, validation_fraction=0.0, max_shard_size="8KB", split_files_by_family=by_family
        )
        dataset = tmp_path / f"dataset-{by_family}"
        tokenize(zoo, dataset, config)
        models = {row["model_id"]: row for row in load(dataset, "models", split="train")}
        passed_on = {name for name, row in models.items() if row["redistributable"]}
        assert passed_on == {"ada", "dan"}
        ids = {}
        for path in sorted((dataset / "windows").iterdir()):
            ids.setdefault(path.name.rsplit("-", 3)[0], set()).update(pq.read_table(path)["model_id"].to_pylist())
        assert ids == {files: {"ada", "dan"}, f"{files}-local": {"bob", "copy-of-bob", "cyd"}}
        windows = load(dataset, "windows-vit" if by_family else "windows", split="train")
        assert set(windows["model_id"]) == set(licenses)
        source = DatasetSource(str(dataset))
        assert set(source.load()["train"]["model_id"]) == set(licenses)
        assert source.sizes()["train"].windows == len(windows)
        for path in (dataset / "windows").glob("*-local-*"):  # as publishing leaves them behind
            path.unlink()
        assert set(source.load()["train"]["model_id"]) == {"ada", "dan"}
        assert source.sizes()["train"].windows == sum(models[name]["num_windows"] for name in passed_on)
        left = load(dataset, "windows-vit" if by_family else "windows", split="train", streaming=True)
        assert {row["model_id"] for row in left} == {"ada", "dan"}


def test_files_and_row_groups_stay_below_their_sizes(made):
    _, dataset, _ = made
    files = sorted((dataset / "windows").glob("*.parquet"))
    assert len(files) > 2
    for file in files:
        metadata = pq.ParquetFile(file).metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        payloads = [sum(pq.ParquetFile(file).read_row_group(i)["num_tokens"].to_pylist()) for i in range(len(groups))]
        assert all(tokens * CONFIG.token_bytes <= 2000 for tokens in payloads)
    names = sorted(p.name for p in dataset.iterdir())
    assert names == ["README.md", "composition.png", "models", "preprocessor_config.json", "tokenize.json", "windows"]


def test_the_folder_carries_the_feature_extractor_s_settings(made):
    _, dataset, _ = made
    assert WSLFeatureExtractor.from_pretrained(dataset).token_size == 16


def test_a_run_without_any_usable_model_fails_but_leaves_the_reasons_as_rows(tmp_path):
    add_refused(tmp_path / "zoo")
    for _ in range(2):  # the second run tries again
        with pytest.raises(TokenizeError, match="None of the 4 models.*split `refused`"):
            tokenize(tmp_path / "zoo", tmp_path / "dataset")
        refused = load(tmp_path / "dataset", "models", split="refused")
        assert sorted(refused["model_id"]) == ["eve-loud", "eve-nan", "eve-worn", "evil.pkl"]
        assert all(refused["reason"])
        assert "4 models were refused" in (tmp_path / "dataset" / "README.md").read_text()
        names = sorted(p.name for p in (tmp_path / "dataset").iterdir())
        assert names == ["README.md", "models", "preprocessor_config.json", "tokenize.json"]
    config = TokenizeConfig(dtype="float32", validation_fraction=0.0)
    assert tokenize(tmp_path / "zoo", tmp_path / "dataset", config).accepted == 1
    assert len(load(tmp_path / "dataset", "models", split="train")) == 1
    with pytest.raises(RunFolderError, match="dtype was float32, now float16"):
        tokenize(tmp_path / "zoo", tmp_path / "dataset")


def test_a_model_of_batch_norm_statistics_alone_is_refused(tmp_path):
    make_zoo(tmp_path / "zoo")
    add_model(tmp_path / "zoo", "stats", {"n.running_mean": torch.ones(3), "n.running_var": torch.ones(3)})
    tokenize(tmp_path / "zoo", tmp_path / "dataset", CONFIG)
    (row,) = load(tmp_path / "dataset", "models", split="refused")
    assert "holds nothing that is tokenized" in row["reason"]


def test_the_manifest_of_a_row_keeps_the_order_of_tied_names(tmp_path):
    torch.save(tiny_state(0), tmp_path / "net.pth")
    tokenize(tmp_path / "net.pth", tmp_path / "dataset", TokenizeConfig(token_size=16, validation_fraction=0.0))
    (row,) = load(tmp_path / "dataset", "models", split="train")
    assert list(WeightManifest.from_json(row["manifest"]).tensor_order) == list(tiny_state(0))


def test_small_models_are_refused_on_demand(tmp_path):
    config = TokenizeConfig(**{**CONFIG.settings(), "min_parameters": 1500})
    tokenize(make_zoo(tmp_path / "zoo"), tmp_path / "dataset", config)
    reasons = {row["model_id"]: row["reason"] for row in load(tmp_path / "dataset", "models", split="refused")}
    assert "ada-0" in reasons
    assert "fewer than 1500" in reasons["ada-0"]


def test_a_file_that_breaks_the_reader_is_refused_and_the_run_goes_on(tmp_path, caplog):
    make_zoo(tmp_path / "zoo")
    (tmp_path / "zoo" / "locked").mkdir()
    os.mkfifo(tmp_path / "zoo" / "locked" / "model.safetensors")
    (tmp_path / "zoo" / "locked" / "config.json").write_text("{}")
    report = tokenize(tmp_path / "zoo", tmp_path / "dataset", CONFIG)
    assert (report.accepted, report.refused) == (6, 1)


def test_models_of_the_hub_come_with_commit_and_owner(tmp_path, hub):
    add_model(tmp_path, "one", tiny_state(0))
    weights = (tmp_path / "one" / "model.safetensors").read_bytes()
    commit = hub.add("ada/net", {"model.safetensors": weights, "config.json": b'{"model_type": "tiny"}'})
    report = tokenize(["ada/net", "bob/missing"], tmp_path / "dataset", TokenizeConfig(validation_fraction=0.0))
    assert (report.accepted, report.refused) == (1, 1)
    (row,) = load(tmp_path / "dataset", "models", split="train")
    assert (row["model_id"], row["owner"], row["revision"], row["architecture"]) == ("ada/net", "ada", commit, "tiny")
    assert row["library"] == "transformers"
    (row,) = load(tmp_path / "dataset", "models", split="refused")
    assert "neither a local path nor a model on the Hub" in row["reason"]


@pytest.fixture
def unreachable_hub(monkeypatch):
    """Call it to point the Hub's client at a port that nobody listens on."""

    def cut():
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            port = closed.getsockname()[1]
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")

    return cut


def test_without_the_hub_cached_models_are_taken_and_the_others_are_left_for_the_next_run(
    tmp_path, hub, unreachable_hub, caplog
):
    add_model(tmp_path, "one", tiny_state(0))
    hub.add("ada/cached", {"model.safetensors": (tmp_path / "one" / "model.safetensors").read_bytes()})
    hub.add("ada/damaged", {"model.safetensors": b"no header"})
    hub.add("ada/later", {"model.safetensors": (tmp_path / "one" / "model.safetensors").read_bytes()})
    for name in ("ada/cached", "ada/damaged"):
        huggingface_hub.snapshot_download(name)
    unreachable_hub()
    report = tokenize(["ada/cached", "ada/damaged"], tmp_path / "cached", TokenizeConfig(validation_fraction=0.0))
    assert (report.accepted, report.refused) == (1, 1)
    assert "ada/cached: the Hub does not give its license and task" in caplog.text
    with pytest.raises(TokenizeError, match="1 models could not be fetched.*ada/later: cannot be downloaded"):
        tokenize(["ada/cached", "ada/later"], tmp_path / "dataset")


def test_models_that_cannot_be_fetched_now_are_fetched_by_the_next_run(tmp_path, hub):
    add_model(tmp_path, "one", tiny_state(0))
    weights = (tmp_path / "one" / "model.safetensors").read_bytes()
    hub.add("ada/late", {"model.safetensors": weights})
    hub.failures["ada/late"] = 418
    sources = ["ada/late", tmp_path / "one"]
    with pytest.raises(TokenizeError, match="1 models could not be fetched"):
        tokenize(sources, tmp_path / "dataset")
    hub.failures.clear()
    assert tokenize(sources, tmp_path / "dataset").accepted == 2
