"""The pretraining command, run for real on datasets of kilobytes."""

import importlib.util
import json
import logging
import os
import signal
import time

import pytest
import torch
from huggingface_hub import HfApi
from pretrain_fixtures import (
    arguments,
    command,
    finish,
    lines_of,
    one_thread_and_a_fresh_accelerator,  # noqa: F401  a fixture
    weights,
)
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForPreTraining
from window_fixtures import same_tensors, write_dataset

from hf_wsl.options import ConfigError
from modeling_wsl.backbone.losses import R2Accumulator
from trainers.checkpointing import CheckpointStateError, last_checkpoint
from trainers.data.windows.crops import tiles
from trainers.data.windows.dataset_source import load_windows
from trainers.data.windows.window_data import WindowDataset
from trainers.data.windows.window_inputs import model_inputs
from trainers.data.windows.window_table import DatasetError
from trainers.pretrain import main, run
from trainers.run_trainer import NonFiniteLossError


pytestmark = pytest.mark.usefixtures("one_thread_and_a_fresh_accelerator")
PLAIN = {"noise_std": 0, "contrastive_weight": 0, "mask_ratio": 0}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    lengths = {"train": [40, 7, 33, 16, 3, 90, 25, 64, 12, 20, 31], "validation": [30, 5, 44]}
    return write_dataset(tmp_path_factory.mktemp("pretrain") / "data", lengths)


def test_a_run_that_sigterm_stopped_and_latest_resumed_equals_an_uninterrupted_one(data, tmp_path):
    options = {"max_steps": 90, "eval_steps": 0, "logging_steps": 1, "gradient_accumulation_steps": 2}
    broken = command(arguments(data, tmp_path / "broken", **options))
    metrics = tmp_path / "broken" / "metrics.jsonl"
    while broken.poll() is None and not (metrics.is_file() and '"loss"' in metrics.read_text()):
        time.sleep(0.005)
    broken.send_signal(signal.SIGTERM)
    output = finish(broken)
    stopped = last_checkpoint(tmp_path / "broken")
    step = int(stopped.name.removeprefix("checkpoint-"))
    assert 0 < step < 90
    assert "SIGTERM; saving, then stopping. Go on with --resume_from_checkpoint latest" in output
    assert json.loads((tmp_path / "broken" / "training_facts.json").read_text())["status"] == "interrupted"
    assert not (tmp_path / "broken" / "model.safetensors").exists()

    main(arguments(data, tmp_path / "broken", "--resume_from_checkpoint", "latest", **options))
    finished = main(arguments(data, tmp_path / "whole", **options))
    for name in ("model.safetensors", "optimizer.safetensors"):
        first, second = (tmp_path / run / "checkpoint-90" / name for run in ("whole", "broken"))
        assert first.read_bytes() == second.read_bytes()
    losses = [
        {line["step"]: line["loss"] for line in lines_of(tmp_path / run) if "loss" in line}
        for run in ("whole", "broken")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 90
    resumed = json.loads((tmp_path / "broken" / "training_facts.json").read_text())
    assert all(finished[name] == resumed[name] for name in ("status", "val_r2", "tokens_seen", "baselines"))


def test_what_a_killed_process_left_behind_does_not_show_in_the_resumed_run(data, tmp_path):
    main(arguments(data, tmp_path / "whole", logging_steps=1))
    main(arguments(data, tmp_path / "killed", logging_steps=1, stop_at_step=3))
    (tmp_path / "killed" / ".checkpoint-5.123.tmp").mkdir()
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    main(arguments(data, tmp_path / "killed", "--resume_from_checkpoint", "latest", logging_steps=1))
    runs = [
        [(line["step"], line.get("loss"), line.get("eval_r2")) for line in lines_of(tmp_path / name)]
        for name in ("whole", "killed")
    ]
    assert runs[0] == runs[1]
    assert not list((tmp_path / "killed").glob(".*"))
    assert same_tensors(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


@pytest.mark.parametrize("normalization", ["token", "none", "window", "layer"])
def test_eight_windows_at_once_equal_eight_accumulated(data, tmp_path, normalization):
    model = {**PLAIN, "loss_normalization": normalization}
    options = {"precision": "float32", "adam_epsilon": 1e-3, "eval_steps": 0, "max_grad_norm": 0, "model": model}
    main(arguments(data, tmp_path / "8x1", **{**options, "batch_size": 8}))
    main(arguments(data, tmp_path / "1x8", **{**options, "batch_size": 1, "gradient_accumulation_steps": 8}))
    start = weights(tmp_path / "8x1")
    for name, tensor in weights(tmp_path / "1x8").items():
        torch.testing.assert_close(
            tensor, start[name], atol=2e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    first, second = lines_of(tmp_path / "8x1"), lines_of(tmp_path / "1x8")
    assert [line["loss"] for line in first if "loss" in line] == pytest.approx(
        [line["loss"] for line in second if "loss" in line], rel=1e-5
    )
    # The mean of the micro-batches' means, the common mistake, is another number on windows of unequal length.
    assert len({line["loss"] for line in first if "loss" in line}) == 3


def test_the_output_folder_loads_and_scores_what_the_log_says(data, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    facts = main(arguments(data, tmp_path / "run", precision="float32", save_steps=4))
    assert facts["status"] == "completed" and facts["steps"] == 6
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    for folder in (tmp_path / "run", last_checkpoint(tmp_path / "run")):
        model = AutoModel.from_pretrained(folder)
        AutoModelForPreTraining.from_pretrained(folder)
        assert AutoFeatureExtractor.from_pretrained(folder).token_size == 24
        held_out = WindowDataset(load_windows(str(data))["validation"])
        score = R2Accumulator()
        for crop in tiles(held_out.num_tokens, 16):
            inputs = model_inputs(held_out.__getitems__([crop]), torch.device("cpu"))
            with torch.no_grad():
                output = model(**inputs)
            score.update(output.reconstruction, inputs["tokens"], inputs["token_mask"])
        assert score.compute() == pytest.approx(facts["val_r2"], abs=1e-6)
    evaluated = [line for line in lines_of(tmp_path / "run") if "eval_r2" in line]
    assert [line["step"] for line in evaluated] == [0, 3, 6]
    assert all({"eval_random_projection_r2", "eval_pca_r2"} <= line.keys() for line in evaluated)
    trained = [line for line in lines_of(tmp_path / "run") if "loss" in line]
    assert all(
        {"loss_reconstruction", "loss_contrastive", "r2", "learning_rate", "tokens_per_s"} <= line.keys()
        for line in trained
    )
    assert any(
        "val R2 0." in text and "| random projection 0." in text and "| PCA 0." in text for text in caplog.messages
    )


def test_the_linear_path_starts_where_pca_stands(data, tmp_path):
    model = {"token_standardization": True, "linear_path": True}
    facts = main(arguments(data, tmp_path / "run", precision="float32", max_steps=1, model=model))
    start = facts["val_r2_history"][0]["val_r2"]
    assert facts["baselines"]["random projection"] < start < facts["baselines"]["PCA"]
    assert start > 0.9  # PCA with two directions fewer: they hold mean and standard deviation


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(data, tmp_path):
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        main(arguments(data, tmp_path / name, seed=seed, save_dtype="bfloat16"))
    first, again, other = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again", "other")
    )
    assert first == again != other
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights(tmp_path / "first").values())


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(data, tmp_path):
    options = {"max_steps": 30, "logging_steps": 7, "save_steps": 1, "eval_steps": 0, "max_grad_norm": 0}
    main(arguments(data, tmp_path / "run", stop_at_step=3, **options))
    good = weights(tmp_path / "run" / "checkpoint-3")
    broken = {**options, "save_steps": 5, "learning_rate": 1e30}
    with pytest.raises(NonFiniteLossError) as error:
        main(arguments(data, tmp_path / "run", "--resume_from_checkpoint", "latest", **broken))
    message = str(error.value)
    assert "not finite" in message and "step 5" in message and str(tmp_path / "run" / "checkpoint-3") in message
    assert "--learning_rate" in message
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-3"
    assert same_tensors(good, weights(tmp_path / "run" / "checkpoint-3"))
    assert all(tensor.isfinite().all() for tensor in good.values())


def test_wall_time_ends_a_run_with_a_finished_model(data, tmp_path, caplog):
    facts = main(arguments(data, tmp_path / "run", max_steps=10**6, max_minutes=0.02, eval_steps=0))
    assert facts["status"] == "out of time" and 0 < facts["steps"] < 10**6
    assert facts["val_r2_history"][-1]["step"] == facts["steps"]
    AutoModel.from_pretrained(tmp_path / "run")
    caplog.clear()
    again = ["--resume_from_checkpoint", "latest"]
    resumed = main(arguments(data, tmp_path / "run", *again, max_steps=10**6, max_minutes=0.02, eval_steps=0))
    assert resumed["status"] == "out of time" and resumed["steps"] == facts["steps"]
    assert resumed["val_r2_history"] == facts["val_r2_history"]
    assert "max_minutes is 0.02: it ends as it is" in caplog.text and "raise --max_minutes" in caplog.text


def test_recomputed_activations_and_reading_workers_change_nothing(data, tmp_path):
    main(arguments(data, tmp_path / "plain", num_workers=0))
    main(arguments(data, tmp_path / "other", "--activation_checkpointing", num_workers=2))
    assert same_tensors(weights(tmp_path / "plain"), weights(tmp_path / "other"))


def test_a_run_that_accelerate_launched_and_a_kill_ended_goes_on_from_its_last_checkpoint(data, tmp_path):
    options = {"max_steps": 60, "eval_steps": 0, "logging_steps": 1, "save_steps": 1, "precision": "float32"}
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "trainers.pretrain")
    killed = command(arguments(data, tmp_path / "killed", **options), launcher, start_new_session=True)
    while killed.poll() is None and last_checkpoint(tmp_path / "killed") is None:
        time.sleep(0.005)
    time.sleep(0.3)  # somewhere between, or within, the next checkpoints
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    last = last_checkpoint(tmp_path / "killed")
    AutoModelForPreTraining.from_pretrained(last)
    main(arguments(data, tmp_path / "killed", "--resume_from_checkpoint", "latest", **options))
    main(arguments(data, tmp_path / "whole", **{**options, "save_steps": 0}))
    for name in ("model.safetensors", "optimizer.safetensors"):
        first, second = (tmp_path / run / "checkpoint-60" / name for run in ("whole", "killed"))
        assert first.read_bytes() == second.read_bytes()


def test_push_to_hub_uploads_checkpoints_and_the_finished_model(hub, data, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    main(arguments(data, tmp_path / "run", "--push_to_hub", hub_model_id="alice/backbone", save_steps=3))
    finished, uploaded = AutoModel.from_pretrained(tmp_path / "run"), AutoModel.from_pretrained("alice/backbone")
    assert same_tensors(dict(finished.state_dict()), dict(uploaded.state_dict()))
    AutoFeatureExtractor.from_pretrained("alice/backbone")
    api = HfApi()
    titles = [commit.title for commit in api.list_repo_commits("alice/backbone")]
    assert titles[:3] == ["End of training", "Training in progress, step 6", "Training in progress, step 3"]
    files = set(api.list_repo_files("alice/backbone"))
    assert {"README.md", "model.safetensors", "preprocessor_config.json"} <= files
    # Nothing that names folders of this machine, no optimizer, no pickle.
    assert not {"training_facts.json", "pretrain_config.yaml", "optimizer.safetensors", "training_args.bin"} & files


def test_trackers_receive_the_metrics(data, tmp_path):
    main(arguments(data, tmp_path / "run", report_to="tensorboard"))
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_installed_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match="wandb is not installed"):
        main(arguments(data, tmp_path / "run", report_to="wandb"))


def test_an_earlier_run_is_neither_mixed_in_nor_deleted_unasked(data, tmp_path):
    main(arguments(data, tmp_path / "run", max_steps=2))
    with pytest.raises(ConfigError, match="holds checkpoint-2. Go on with --resume_from_checkpoint latest"):
        main(arguments(data, tmp_path / "run", max_steps=2))
    main(arguments(data, tmp_path / "run", "--overwrite_output_dir", max_steps=3, stop_at_step=1))
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-1"
    assert not (tmp_path / "run" / "model.safetensors").exists()  # of the run that is no more
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_that_resumes_from_an_older_checkpoint_leaves_none_of_the_abandoned_one(data, tmp_path, caplog):
    main(arguments(data, tmp_path / "run", save_steps=2, save_total_limit=3))
    older = tmp_path / "run" / "checkpoint-2"
    main(arguments(data, tmp_path / "other", max_steps=1))
    with pytest.raises(ConfigError, match="holds checkpoint-1, which .*checkpoint-2 has no part in"):
        main(arguments(data, tmp_path / "other", "--resume_from_checkpoint", str(older)))
    main(arguments(data, tmp_path / "run", "--resume_from_checkpoint", str(older), stop_at_step=3))
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-3"
    assert "checkpoint-6: the run starts over from step 2" in caplog.text


def test_ctrl_c_with_reading_workers_saves_and_stops(data, tmp_path):
    words = arguments(data, tmp_path / "run", max_steps=10**5, eval_steps=0, logging_steps=1, num_workers=2)
    process = command(words, start_new_session=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and '"loss"' in metrics.read_text()):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    assert "SIGINT; saving, then stopping" in finish(process)
    assert last_checkpoint(tmp_path / "run") is not None


def test_the_facts_name_the_size_that_the_model_has(data, tmp_path):
    wide = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "latent_size": 128}
    model = {**wide, "linear_path": False}
    facts = main(arguments(data, tmp_path / "nano", max_steps=2, stop_at_step=1, eval_steps=1, model=model))
    assert facts["size"] == "nano"
    assert facts["val_r2_step"] == 1
    assert facts["best_val_r2_step"] in (0, 1)
    assert facts["best_val_r2"] == max(line["val_r2"] for line in facts["val_r2_history"])
    resume = ["--resume_from_checkpoint", "latest", "--size", "tiny"]
    assert main(arguments(data, tmp_path / "nano", *resume, max_steps=2, model=model))["size"] == "nano"
    assert main(arguments(data, tmp_path / "own", max_steps=1))["size"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name_or_path": "no/such-backbone"}, "'model_name_or_path' (no/such-backbone)"),
        ({"model_name_or_path": "{backbone}", "model": {"noise_std": -1}}, "noise_std must not be negative"),
        ({"model_name_or_path": "{backbone}", "model": {"hidden_size": 64}}, "'model_name_or_path'"),
        ({"dataset": "{backbone}"}, "it has no windows/train-*.parquet"),
    ],
)
def test_what_a_user_can_mend_is_one_line_on_stderr(data, tmp_path, capsys, options, message):
    main(arguments(data, tmp_path / "backbone", max_steps=1))
    options = {k: str(tmp_path / "backbone") if v == "{backbone}" else v for k, v in options.items()}
    capsys.readouterr()
    assert run(arguments(data, tmp_path / "run", **options)) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": {"token_size": 30}}, DatasetError, "the dataset's token_size is 24, the model's 30"),
        ({"model": {"tokenization": "sparse"}}, DatasetError, "the dataset's tokenization is dense"),
        ({"model": {"noise_sd": 0.1}}, ConfigError, "no field 'noise_sd'. Did you mean 'noise_std'?"),
        ({"model": {"noise_std": -1}}, ConfigError, "noise_std must not be negative"),
        ({"model": {"position_encoding": "learned", "max_positions": "[99,9,9]"}}, DatasetError, "up to k ="),
        ({"model": {"latent_size": 64}}, ConfigError, "PCA, which has 24 directions"),
        ({"size": "huge"}, ConfigError, "Unknown size 'huge'"),
        ({"dataset": "nowhere/at-all"}, DatasetError, "neither a local path nor a dataset on the Hub"),
        ({"dataset": ""}, ConfigError, "'dataset' is missing"),
        ({"resume_from_checkpoint": "nowhere"}, CheckpointStateError, "no run_state.json"),
    ],
)
def test_what_cannot_work_is_refused_before_training(data, tmp_path, options, error, message):
    with pytest.raises(error) as raised:
        main(arguments(data, tmp_path / "run", **options))
    assert message in str(raised.value)


def test_a_model_option_that_contradicts_the_checkpoint_is_refused(data, tmp_path):
    main(arguments(data, tmp_path / "run", max_steps=1))
    with pytest.raises(ConfigError, match="'model.noise_std' is 0.3, but .*checkpoint-1 was trained with 0.1"):
        main(arguments(data, tmp_path / "run", "--resume_from_checkpoint", "latest", model={"noise_std": 0.3}))


def test_without_validation_windows_a_run_that_asks_for_r2_is_refused(tmp_path):
    data = write_dataset(tmp_path / "data", {"train": [20, 30], "validation": []})
    with pytest.raises(DatasetError, match="no validation windows, and eval_steps is 3"):
        main(arguments(data, tmp_path / "run"))
    facts = main(arguments(data, tmp_path / "blind", eval_steps=0, max_steps=1))
    assert facts["val_r2"] is None and facts["baselines"] == {}


def test_tokens_without_their_tokenizer_are_refused(tmp_path):
    data = write_dataset(tmp_path / "data", {"train": [20, 30], "validation": [5]})
    (data / "preprocessor_config.json").unlink()
    with pytest.raises(DatasetError, match="could not tokenize"):
        main(arguments(data, tmp_path / "run"))
