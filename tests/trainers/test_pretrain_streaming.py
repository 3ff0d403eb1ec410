"""The pretraining command on a dataset of the Hub, as a whole and as a stream."""

import signal
import time
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from huggingface_hub.constants import HF_HUB_CACHE
from pretrain_fixtures import (
    arguments,
    command,
    finish,
    lines_of,
    one_thread_and_a_fresh_accelerator,  # noqa: F401  a fixture
    weights,
)
from window_fixtures import publishable, same_tensors, write_dataset

from hf_wsl.options import ConfigError
from trainers.checkpointing import last_checkpoint
from trainers.pretrain import main, run


pytestmark = pytest.mark.usefixtures("one_thread_and_a_fresh_accelerator")
LENGTHS = {"train": [40, 7, 33, 16, 3, 90, 25, 64, 12, 20, 31], "validation": [30, 5, 44]}
STREAM = {"streaming": "true", "shuffle_buffer": 3}
LATEST = ("--resume_from_checkpoint", "latest")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("streaming") / "data"
    return write_dataset(path, LENGTHS, rows_per_file=4, rows_per_group=2)


@pytest.fixture
def published(hub, folder):
    return hub.add("org/tokens", publishable(folder), repo_type="dataset")


def move(hub, tmp_path, lengths=LENGTHS):
    """Another dataset becomes the branch's newest commit."""
    other = write_dataset(tmp_path / "moved", lengths, seed=1, rows_per_file=4, rows_per_group=2)
    return hub.add("org/tokens", publishable(other), repo_type="dataset")


@pytest.mark.slow
def test_a_streamed_run_that_sigterm_stopped_equals_an_uninterrupted_one_although_its_branch_moved(
    hub, published, tmp_path
):
    options = {**STREAM, "max_steps": 120, "eval_steps": 0, "logging_steps": 1, "gradient_accumulation_steps": 2}
    options["num_workers"] = 2
    finished = main(arguments("org/tokens", tmp_path / "whole", **options))
    broken = command(arguments("org/tokens", tmp_path / "broken", **options))
    metrics = tmp_path / "broken" / "metrics.jsonl"
    while broken.poll() is None and not (metrics.is_file() and '"loss"' in metrics.read_text()):
        time.sleep(0.005)
    broken.send_signal(signal.SIGTERM)
    assert "SIGTERM; saving, then stopping" in finish(broken)
    assert 0 < int(last_checkpoint(tmp_path / "broken").name.removeprefix("checkpoint-")) < 120

    move(hub, tmp_path)
    resumed = main(arguments("org/tokens", tmp_path / "broken", *LATEST, **options))
    for name in ("model.safetensors", "optimizer.safetensors"):
        first, second = (tmp_path / run / "checkpoint-120" / name for run in ("whole", "broken"))
        assert first.read_bytes() == second.read_bytes()
    losses = [[line["loss"] for line in lines_of(tmp_path / name) if "loss" in line] for name in ("whole", "broken")]
    assert losses[0] == losses[1] and len(losses[0]) == 120
    assert resumed["dataset_commit"] == finished["dataset_commit"] == published
    assert all(finished[name] == resumed[name] for name in ("val_r2", "tokens_seen", "baselines", "train_tokens"))
    assert finished["train_windows"] == 11 and finished["validation_tokens"] == 79


def test_a_branch_and_a_moved_branch_are_what_they_are_when_the_run_begins(hub, published, tmp_path):
    first = main(arguments("org/tokens", tmp_path / "first", **STREAM))
    moved = move(hub, tmp_path)
    for options in (STREAM, {}):
        newest = main(arguments("org/tokens", tmp_path / f"newest{len(options)}", **options))
        pinned = main(
            arguments("org/tokens", tmp_path / f"pinned{len(options)}", dataset_revision=published, **options)
        )
        assert newest["dataset_commit"] == moved and pinned["dataset_commit"] == published
    assert pinned["baselines"] == pytest.approx(first["baselines"], abs=0.02)
    assert newest["baselines"]["random projection"] != pinned["baselines"]["random projection"]
    assert same_tensors(weights(tmp_path / "first"), weights(tmp_path / f"pinned{len(STREAM)}"))
    assert not same_tensors(weights(tmp_path / "first"), weights(tmp_path / f"newest{len(STREAM)}"))


def test_a_folder_streams_the_same_run_as_the_hub(hub, published, folder, tmp_path):
    main(arguments("org/tokens", tmp_path / "hub", **STREAM))
    facts = main(arguments(folder, tmp_path / "folder", **STREAM))
    assert same_tensors(weights(tmp_path / "hub"), weights(tmp_path / "folder"))
    assert facts["dataset_commit"] is None


def test_training_windows_that_are_streamed_are_not_stored(hub, published, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    main(arguments("org/tokens", tmp_path / "run", max_steps=1, **STREAM))
    stored = [path.name for path in (tmp_path / "cache").rglob("*.arrow")]
    assert stored == ["parquet-validation.arrow"]
    assert not [r for r in hub.requests if "models/train" in r and r.startswith("HEAD")]


def test_the_cap_on_evaluation_limits_the_files_that_are_fetched(hub, tmp_path):
    lengths = {"train": [20, 30, 40, 10, 20], "validation": [9] * 12}
    other = write_dataset(tmp_path / "data", lengths, rows_per_file=2, rows_per_group=1)
    hub.add("org/tokens", publishable(other), repo_type="dataset")
    facts = main(arguments("org/tokens", tmp_path / "run", max_eval_windows=3, **STREAM))
    fetched = {request.partition("windows/validation-")[2] for request in hub.requests} - {""}
    assert fetched == {"00000-of-00006.parquet", "00005-of-00006.parquet"}
    assert facts["validation_tokens"] == 4 * 9


@pytest.mark.parametrize(
    "fault", [{"status": 503}, {"cut": 100}, {"reset": 100}, {"drop": True}], ids=["503", "cut", "reset", "dropped"]
)
def test_a_fault_while_streaming_is_retried_and_changes_nothing(hub, published, tmp_path, monkeypatch, fault):
    for name in ("STREAMING_READ_RETRY_INTERVAL", "STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL"):
        monkeypatch.setattr(datasets.config, name, 0)
    main(arguments("org/tokens", tmp_path / "calm", **STREAM))
    ordered = hub.fault(r"GET .*windows/train-00001", times=1, skip=2, **fault)
    main(arguments("org/tokens", tmp_path / "stormy", **STREAM))
    assert ordered.fired == 1
    assert same_tensors(weights(tmp_path / "calm"), weights(tmp_path / "stormy"))


@pytest.mark.parametrize("times", [1, 2])
def test_a_file_that_came_with_a_wrong_byte_is_fetched_anew_once(hub, published, tmp_path, capsys, times):
    main(arguments("org/tokens", tmp_path / "calm", max_steps=1))
    for file in (Path(HF_HUB_CACHE) / "datasets--org--tokens" / "snapshots").rglob("train-00001*"):
        file.resolve().unlink(missing_ok=True)  # revisions of other tests share it
        file.unlink()
    ordered = hub.fault(r"GET .*windows/train-00001", times=times, corrupt=-2000)
    words = arguments("org/tokens", tmp_path / "run", max_steps=1)
    if times == 1:
        main(words)
        assert same_tensors(weights(tmp_path / "calm"), weights(tmp_path / "run"))
    else:
        assert run(words) == 1
        assert "windows/train-00001-of-00003.parquet has other bytes than the Hub states" in capsys.readouterr().err
    assert ordered.fired == times


@pytest.mark.parametrize(
    ("config", "column"), [("windows", "tokens.list.element.list.element"), ("models", "num_tokens")]
)
def test_a_wrong_byte_in_what_is_streamed_ends_the_run(hub, folder, tmp_path, capsys, config, column):
    files = publishable(folder)
    name = min(name for name in files if name.startswith(f"{config}/train"))
    data = bytearray((folder / name).read_bytes())
    group = pq.read_metadata(folder / name).row_group(0)
    (place,) = (c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == column)
    data[(place.dictionary_page_offset or place.data_page_offset) + place.total_compressed_size - 1] ^= 1
    hub.add("org/tokens", files | {name: bytes(data)}, repo_type="dataset")
    assert run(arguments("org/tokens", tmp_path / "run", **STREAM)) == 1
    error = capsys.readouterr().err
    assert "CRC checksum verification failed" in error and "Traceback" not in error


def test_a_hub_that_stays_away_ends_the_run_in_one_line(hub, published, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 2)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
    for num_workers in (0, 2):
        hub.faults.clear()
        hub.fault(r"GET .*windows/train-0000[0-3]", times=-1, skip=12, status=404)
        words = arguments("org/tokens", tmp_path / f"run{num_workers}", **STREAM, num_workers=num_workers)
        capsys.readouterr()
        assert run(words) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert line.startswith("error: split 'train', file train-0000") and "--resume_from_checkpoint latest" in line
        assert "Traceback" not in line


def test_a_damaged_row_ends_the_run_with_its_model_named(tmp_path, capsys):
    def damage(row):
        if row["num_tokens"] == 90:
            row.update(num_tokens=91)

    data = write_dataset(tmp_path / "data", LENGTHS, rows_per_file=2, edit=damage)
    options = {**STREAM, "num_workers": 2, "baseline_tokens": 0, "model": {"linear_path": False}}
    assert run(arguments(data, tmp_path / "run", **options)) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "(model 'train/model-2'): 90 tokens but num_tokens gives 91" in line and "Traceback" not in line


def test_positions_beyond_a_learned_table_are_refused_when_they_come(folder, tmp_path, capsys):
    model = {"position_encoding": "learned", "max_positions": "[99, 9, 9]"}
    assert run(arguments(folder, tmp_path / "run", model=model, **STREAM)) == 1
    assert "has positions up to k = " in capsys.readouterr().err


def test_several_crops_of_a_window_read_the_dataset_less_often(hub, published, tmp_path):
    sent = {}
    for crops in (1, 4):
        hub.clear_log()
        options = {**STREAM, "crops_per_window": crops, "max_steps": 0, "num_train_epochs": 8, "eval_steps": 0}
        facts = main(arguments("org/tokens", tmp_path / str(crops), **options))
        assert facts["steps"] == 22  # 8 visits of 11 windows, 4 a step
        sent[crops] = sum(entry.sent for entry in hub.log if "windows/train" in entry.path)
    assert sent[4] < 0.5 * sent[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crops_per_window": 2}, "'crops_per_window' is for streams"),
        ({"dataset_revision": "v1"}, "'dataset_revision' is for datasets on the Hub, and .* is a folder"),
    ],
)
def test_options_that_a_dataset_on_the_disk_cannot_have_are_refused(folder, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        main(arguments(folder, tmp_path / "run", **options))


def test_training_goes_on_from_a_backbone_of_the_hub_at_its_revision(hub, folder, tmp_path, capsys):
    for name, seed in (("first", 0), ("second", 1)):
        main(arguments(folder, tmp_path / name, max_steps=1, seed=seed))
    first = hub.add("org/backbone", publishable(tmp_path / "first"))
    hub.find("org/backbone").revisions["v1"] = first
    hub.add("org/backbone", publishable(tmp_path / "second"))
    pinned = (
        {"model_name_or_path": "org/backbone", "model_revision": "v1"},
        {"model_name_or_path": "org/backbone@v1"},
    )
    starts = (*pinned, {"model_name_or_path": tmp_path / "first"}, {"model_name_or_path": "org/backbone"})
    for number, start in enumerate(starts):
        main(arguments(folder, tmp_path / str(number), max_steps=1, **start))
    by_revision, by_name, by_folder, newest = (weights(tmp_path / str(number)) for number in range(4))
    assert same_tensors(by_revision, by_folder) and same_tensors(by_name, by_folder)
    assert not same_tensors(newest, by_folder)
    capsys.readouterr()
    assert run(arguments(folder, tmp_path / "run", model_name_or_path="org/backbone@v9")) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "'model_name_or_path' (org/backbone@v9)" in line and "has no revision 'v9' on the Hub" in line


def test_a_dataset_that_may_not_be_read_is_refused_in_one_line_and_a_token_opens_it(
    hub, folder, tmp_path, monkeypatch, capsys
):
    hub.add("org/private", publishable(folder), repo_type="dataset", private=True)
    hub.add("org/gated", publishable(folder), repo_type="dataset", gated_to=("hf_alice",))
    expected = {
        "org/none": "dataset 'org/none' is neither a local path nor a dataset on the Hub.",
        "org/private": "dataset 'org/private' is neither a local path nor a dataset on the Hub.",
        "org/gated": "dataset 'org/gated' is a gated repository on the Hub. Accept its terms there, then log in",
    }
    for streaming in ("false", "true"):
        for name, message in expected.items():
            assert run(arguments(name, tmp_path / "run", streaming=streaming)) == 1
            (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            assert message in line
            if name != "org/none":
                assert "`hf auth login`, HF_TOKEN" in line
    monkeypatch.setenv("HF_TOKEN", "rubbish")
    assert run(arguments("org/gated", tmp_path / "run")) == 1
    assert "the Hub does not know the access token" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    for name in ("org/private", "org/gated"):
        for streaming in ("false", "true"):
            facts = main(arguments(name, tmp_path / name / streaming, streaming=streaming, max_steps=1))
            assert facts["status"] == "completed"
    assert run(arguments("org/gated", tmp_path / "run", dataset_revision="v9")) == 1
    assert "dataset 'org/gated' has no revision 'v9' on the Hub" in capsys.readouterr().err


def test_a_dataset_without_the_config_of_its_models_or_windows_is_refused(hub, tmp_path, capsys):
    hub.add("org/other", {"data.csv": "a,b\n1,2\n", "preprocessor_config.json": "{}"}, repo_type="dataset")
    for streaming in ("false", "true"):
        assert run(arguments("org/other", tmp_path / "run", streaming=streaming)) == 1
        line = capsys.readouterr().err
        assert "dataset 'org/other' is not one that `hf-wsl tokenize` wrote" in line
