"""The script that measures a GPU runs on a CPU too, so that it works when a GPU is at hand."""

import json
import os
import subprocess
import sys
from pathlib import Path


SCRIPT = Path(__file__).parents[2] / "benchmarks/on_gpu.py"


def test_numerics_and_a_step_of_each_size_are_reported(tmp_path):
    output = tmp_path / "on_gpu.json"
    path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(SCRIPT), "--use_cpu", "--output", str(output)]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads(output.read_text())
    assert {"sdpa", "sdpa bfloat16", "FSDP2", "FSDP2 bfloat16"} <= set(report["numerics"])
    assert all(result["ok"] for result in report["numerics"].values()), report["numerics"]
    (step,) = report["steps"]
    assert step["size"] == "nano" and step["tokens_per_s"] > 0 and step["share_of_matmul_limit"] > 0
