"""What the tests of the pretraining command share: its arguments, and ways to run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from window_fixtures import small_model_arguments


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


@pytest.fixture
def one_thread_and_a_fresh_accelerator():
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def arguments(data, output_dir, *more, model=None, **options):
    defaults = {"config": "nano", "dataset": data, "output_dir": output_dir, "batch_size": 4, "use_cpu": "true"}
    defaults |= {"max_steps": 6, "logging_steps": 2, "eval_steps": 3}
    words = [word for key, value in {**defaults, **options}.items() for word in (f"--{key}", str(value))]
    return [*words, *small_model_arguments(**(model or {})), *more]


def command(words, launcher=("-m", "trainers.pretrain"), environment=None, **options):
    """Starts the command as a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "yes", **(environment or {})}
    return subprocess.Popen(
        [sys.executable, *launcher, *words],
        cwd=Path(__file__).parent.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def finish(process):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def lines_of(output_dir):
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")
