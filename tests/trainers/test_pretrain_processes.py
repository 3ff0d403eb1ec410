"""Pretraining on several processes: data-parallel, sharded, streaming, and what `trainers/accelerate/*.yaml` set up.

FSDP2 runs on two CPU processes with the environment that `accelerate launch` makes of the shipped file; only the list
of devices that accelerate shards is overruled (`several_runs.py`). On GPUs, over NCCL, the tests run nothing.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from filelock import FileLock
from pretrain_fixtures import (
    TORCHRUN,
    arguments,
    command,
    finish,
    lines_of,
    one_thread_and_a_fresh_accelerator,  # noqa: F401  a fixture
    weights,
)
from safetensors.torch import load_file
from transformers import AutoModelForPreTraining
from window_fixtures import same_tensors, write_dataset

import trainers
from hf_wsl.options import ConfigError
from trainers.distribution import check_distribution
from trainers.pretrain import main, run
from trainers.pretraining.pretrain_config import PretrainConfig
from trainers.pretraining.pretrain_options import PretrainOptions
from trainers.training_options import RECIPES


pytestmark = pytest.mark.usefixtures("one_thread_and_a_fresh_accelerator")
SETUPS = Path(trainers.__file__).parent / "accelerate"
LENGTHS = {"train": [40, 7, 33, 16, 3, 90, 25, 64, 12, 20, 31], "validation": [30, 5, 44]}
PLAIN = {"noise_std": 0, "contrastive_weight": 0, "mask_ratio": 0, "loss_normalization": "token"}
LINEAR = {"token_standardization": True, "linear_path": True, "num_hidden_layers": 2}
LEARNED = {"position_encoding": "learned", "max_positions": "[200, 9, 200]", "projection": "flat"}
LATEST = ("--resume_from_checkpoint", "latest")


def launched(setup):
    """The options of `accelerate launch --config_file`, checked by its own code."""
    words = ["--config_file", str(SETUPS / setup), "-m", "trainers.pretrain"]
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, worker_id):
    """The runs on two processes, made by the first of pytest's workers that needs them."""
    if worker_id == "master":
        return run_on_two_processes(tmp_path_factory.mktemp("processes"))
    folder = tmp_path_factory.getbasetemp().parent / "processes"
    with FileLock(f"{folder}.lock"):
        return folder if folder.exists() else run_on_two_processes(folder)


def run_on_two_processes(folder):
    """All runs, one after the other in one launch: a launch takes longer than all of them."""
    data = write_dataset(folder / "data", LENGTHS, rows_per_file=3)
    shared = {"batch_size": 2, "logging_steps": 1, "adam_epsilon": 1e-3}
    equal = {**shared, "gradient_accumulation_steps": 2, "precision": "float32", "model": PLAIN}
    clipped = {**shared, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "max_eval_windows": 1}
    exact = {**clipped, "precision": "float32", "model": LINEAR}
    rounded = {**clipped, "precision": "bfloat16", "save_dtype": "bfloat16", "model": LEARNED}
    stream = {**shared, "streaming": "true", "shuffle_buffer": 3, "num_workers": 1, "eval_steps": 0, "max_steps": 8}
    data_parallel = [
        arguments(data, folder / "two", **equal),
        arguments(data, folder / "global", **{**equal, "batch_size": 4}, global_batch_size=8),
        arguments(data, folder / "whole-exact", **exact),
        arguments(data, folder / "whole-rounded", **rounded),
        arguments(data, folder / "stream", **stream),
        arguments(data, folder / "stopped-stream", stop_at_step=3, **stream),
        arguments(data, folder / "stopped-stream", *LATEST, **stream),
    ]
    sharded = [
        arguments(data, folder / "sharded-exact", **exact),
        arguments(data, folder / "sharded-rounded", **rounded),
        arguments(data, folder / "stopped-sharded", "--activation_checkpointing", stop_at_step=3, **exact),
        arguments(data, folder / "stopped-sharded", *LATEST, **exact),
    ]
    environment = prepare_multi_gpu_env(launched("fsdp2_8_gpus.yaml"))
    environment = {name: v for name, v in environment.items() if name.startswith(("ACCELERATE_USE", "FSDP_"))}
    runs = [{"words": list(map(str, words)), "environment": {}} for words in data_parallel]
    runs += [{"words": list(map(str, words)), "environment": environment} for words in sharded]
    (folder / "runs.json").write_text(json.dumps(runs))
    script = str(Path(__file__).parents[1] / "fixtures" / "several_runs.py")
    output = finish(command([str(folder / "runs.json")], (*TORCHRUN, "2", script), {"PYTHONPATH": "."}))
    assert output.count("2 process(es) on cpu") == len(runs)
    return folder


def figures(folder, name):
    return [line[name] for line in lines_of(folder) if name in line]


def passes_of(facts):
    return tuple(facts["config"][name] for name in ("per_device_train_batch_size", "gradient_accumulation_steps"))


def facts_of(folder):
    return json.loads((folder / "training_facts.json").read_text())


def test_two_processes_equal_one(folder, tmp_path):
    options = {"batch_size": 8, "logging_steps": 1, "adam_epsilon": 1e-3, "precision": "float32", "model": PLAIN}
    main(arguments(folder / "data", tmp_path / "one", **options))
    expected = weights(tmp_path / "one")
    for name, tensor in weights(folder / "two").items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-6, rtol=1e-4)
    for name in ("loss", "eval_r2", "eval_pca_r2", "eval_random_projection_r2"):
        assert figures(folder / "two", name) == pytest.approx(figures(tmp_path / "one", name), rel=1e-5)
    assert facts_of(folder / "two")["windows_per_step"] == 8


def test_a_global_batch_is_the_same_on_one_process_and_on_two(folder, tmp_path):
    options = {"batch_size": 4, "logging_steps": 1, "adam_epsilon": 1e-3, "precision": "float32", "model": PLAIN}
    alone = main(arguments(folder / "data", tmp_path / "one", global_batch_size=8, **options))
    shared = facts_of(folder / "global")
    assert alone["windows_per_step"] == shared["windows_per_step"] == 8
    assert passes_of(alone) == (4, 2)
    assert passes_of(shared) == (4, 1)
    assert figures(folder / "global", "loss") == pytest.approx(figures(tmp_path / "one", "loss"), rel=1e-5)


@pytest.mark.parametrize("kind", ["exact", "rounded"])
def test_fsdp2_trains_as_data_parallel_processes_do_and_saves_the_whole_model(folder, kind):
    whole, sharded = folder / f"whole-{kind}", folder / f"sharded-{kind}"
    for name in ("loss", "loss_contrastive", "r2", "eval_r2", "eval_pca_r2"):
        assert figures(sharded, name) == pytest.approx(figures(whole, name), rel=1e-5)
    assert (facts_of(whole)["distribution"], facts_of(sharded)["distribution"]) == ("MULTI_CPU", "FSDP")
    assert len(figures(sharded, "loss")) == 6 and len(figures(sharded, "eval_r2")) == 3
    for file in ("checkpoint-6/model.safetensors", "checkpoint-6/optimizer.safetensors"):
        expected, found = load_file(whole / file), load_file(sharded / file)
        assert expected.keys() == found.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-7, rtol=1e-4)
    for checkpoint in ("", "checkpoint-6"):
        assert (sharded / checkpoint / "config.json").read_text() == (whole / checkpoint / "config.json").read_text()
        names = [sorted(path.name for path in (run / checkpoint).iterdir()) for run in (whole, sharded)]
        assert names[0] == names[1]
    model = AutoModelForPreTraining.from_pretrained(sharded)
    assert model.dtype == (torch.bfloat16 if kind == "rounded" else torch.float32)
    assert same_tensors(dict(model.state_dict()), weights(sharded))
    assert weights(sharded).keys() == load_file(sharded / "checkpoint-6" / "model.safetensors").keys()


def test_a_sharded_run_that_was_stopped_and_resumed_equals_an_uninterrupted_one(folder):
    for name in ("model.safetensors", "optimizer.safetensors"):
        first, second = (folder / run / "checkpoint-6" / name for run in ("sharded-exact", "stopped-sharded"))
        assert first.read_bytes() == second.read_bytes()
    assert figures(folder / "sharded-exact", "loss") == figures(folder / "stopped-sharded", "loss")
    assert facts_of(folder / "stopped-sharded")["status"] == "completed"


def test_two_processes_stream_and_resume_as_if_uninterrupted(folder):
    for name in ("model.safetensors", "optimizer.safetensors"):
        first, second = (folder / run / "checkpoint-8" / name for run in ("stream", "stopped-stream"))
        assert first.read_bytes() == second.read_bytes()
    assert figures(folder / "stream", "loss") == figures(folder / "stopped-stream", "loss")
    state = json.loads((folder / "stream" / "checkpoint-8" / "run_state.json").read_text())
    assert [len(place) for place in state["stream"]] == [4, 4]


@pytest.mark.parametrize(
    ("setup", "kind", "processes", "machines"),
    [
        ("one_gpu.yaml", "NO", 1, 1),
        ("ddp_8_gpus.yaml", "MULTI_GPU", 8, 1),
        ("ddp_2_nodes.yaml", "MULTI_GPU", 16, 2),
        ("fsdp2_8_gpus.yaml", "FSDP", 8, 1),
        ("fsdp2_2_nodes.yaml", "FSDP", 16, 2),
    ],
)
def test_accelerate_reads_its_setups(setup, kind, processes, machines):
    config = load_config_from_file(str(SETUPS / setup))
    assert isinstance(config, ClusterConfig) and config.distributed_type == kind
    launch = launched(setup)
    assert (launch.num_processes, launch.num_machines, launch.mixed_precision) == (processes, machines, "bf16")
    assert (launch.use_fsdp, launch.multi_gpu) == (kind == "FSDP", kind == "MULTI_GPU")
    assert "accelerate launch" in (SETUPS / setup).read_text() or "started as" in (SETUPS / setup).read_text()
    if kind == "FSDP":
        environment = prepare_multi_gpu_env(launch)
        assert (environment["FSDP_VERSION"], environment["FSDP_CPU_RAM_EFFICIENT_LOADING"]) == ("2", "true")


def test_every_setup_is_tested():
    assert len(list(SETUPS.iterdir())) == 5


@pytest.mark.parametrize(
    ("recipe", "windows"), [("hf_small", 64), ("hf_small_300", 64), ("hf_large", 128), ("sane", 32)]
)
@pytest.mark.parametrize("processes", [1, 8, 16])
def test_the_papers_recipes_keep_their_batch_on_any_setup(recipe, windows, processes, monkeypatch):
    monkeypatch.setattr(PretrainConfig, "world_size", processes)
    options = PretrainOptions.from_yaml(RECIPES / f"{recipe}.yaml", use_cpu=True, precision="float32")
    config = PretrainConfig(**options.to_dict())
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps * processes == windows
    assert config.per_device_train_batch_size <= options.per_device_train_batch_size
    if processes == 1:
        assert config.gradient_accumulation_steps == options.gradient_accumulation_steps


@pytest.mark.parametrize(("options", "processes"), [({}, 3), ({}, 128), ({"batch_size": 48}, 1)])
def test_a_global_batch_that_cannot_be_shared_is_refused(options, processes, monkeypatch):
    monkeypatch.setattr(PretrainConfig, "world_size", processes)
    options = PretrainOptions.from_yaml("hf_small", use_cpu=True, precision="float32", **options)
    with pytest.raises(ConfigError, match=f"'global_batch_size' is 64, which {processes} process"):
        PretrainConfig(**options.to_dict())


@pytest.mark.parametrize(
    ("kind", "plugin", "message"),
    [
        (DistributedType.FSDP, {"fsdp_version": 1}, "set fsdp_version: 2"),
        (DistributedType.FSDP, {"fsdp_version": 2, "cpu_ram_efficient_loading": False}, "training needs true"),
        (DistributedType.MEGATRON_LM, None, "set to MEGATRON_LM, which training does not run on"),
    ],
)
def test_a_distribution_that_training_cannot_run_on_is_refused_with_the_remedy(kind, plugin, message):
    accelerator = Accelerator(cpu=True)
    AcceleratorState._shared_state["distributed_type"] = kind
    if plugin is not None:
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(**plugin)
    with pytest.raises(ConfigError, match=message):
        check_distribution(accelerator)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_deepspeed_without_its_package_is_refused_in_one_line(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert run(list(map(str, arguments(folder / "data", tmp_path / "run")))) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "pip install deepspeed" in line and "fsdp2_8_gpus.yaml" in line
