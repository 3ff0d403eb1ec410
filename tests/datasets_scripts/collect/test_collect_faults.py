"""A collection ends with the same bytes with one worker and several, killed at any moment, and under every fault."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from collect_fixtures import CONFIG, collect_undisturbed, configured, hashes, model_rows
from command_line import hf_wsl
from hub_models import seed_mixed
from interrupted_runs import run_and_die

from datasets_scripts.collect.collect import collect
from datasets_scripts.collect.hub_reader import HubReader


@pytest.fixture(scope="module")
def undisturbed(hub_server, tmp_path_factory):
    """The hashes of the dataset that one worker makes without any fault."""
    return collect_undisturbed(hub_server, tmp_path_factory.mktemp("undisturbed") / "dataset")


def test_transient_faults_leave_the_same_dataset(hub, undisturbed, tmp_path):
    seed_mixed(hub)
    healthy = r"(?!.*(ghost|bad-disk))"
    limited = {"status": 429, "headers": {"RateLimit": '"api";r=0;t=0'}}
    faults = [
        hub.fault(r"GET /api/models\?", times=1, status=503),
        hub.fault(rf"^{healthy}GET /api/models/", times=2, skip=7, **limited),
        hub.fault(rf"^{healthy}GET /api/models/", times=2, skip=13, status=500),
        hub.fault(rf"^{healthy}GET .*config.json", times=2, skip=3, drop=True),
        hub.fault(rf"^{healthy}GET .*safetensors", times=3, skip=2, cut=3_000),
        hub.fault(rf"^{healthy}GET .*safetensors", times=2, skip=9, reset=20_000),
        hub.fault(rf"^{healthy}GET .*safetensors", times=2, skip=14, corrupt=-1),
        hub.fault(rf"^{healthy}GET .*safetensors", times=2, skip=20, truncate=10),
        hub.fault(rf"^{healthy}GET .*\.bin", times=2, status=502),
    ]
    collect(tmp_path / "faulty", CONFIG)
    assert all(fault.fired for fault in faults), [fault for fault in faults if not fault.fired]
    assert hashes(tmp_path / "faulty") == undisturbed


@pytest.mark.slow
def test_four_workers_make_the_dataset_of_one(hub, undisturbed, tmp_path):
    seed_mixed(hub)
    slow = hub.fault("GET .*safetensors", times=8, delay=0.5)  # so that requests overlap
    collect(tmp_path / "four", configured(num_workers=4))
    assert slow.fired
    assert hashes(tmp_path / "four") == undisturbed
    assert hub.totals()["peak"] > 1


@pytest.mark.slow
@pytest.mark.parametrize(("place", "steps"), [("rename", (1, 30, 40, 20)), ("answer", (1, 30, 40, 20))])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(hub, undisturbed, tmp_path, place, steps):
    seed_mixed(hub)
    for at in steps:  # counted anew in every run, which has less left to do
        assert collect_and_die(tmp_path / "killed", at, place)
        assert not (tmp_path / "killed" / "tokenize.json").exists()
    collect(tmp_path / "killed", CONFIG)
    assert hashes(tmp_path / "killed") == undisturbed


def collect_and_die(output: Path, at: int, place: str) -> bool:
    """Collects in a process that kills itself at the `at`-th rename, or answer about a file; tells whether it did."""
    places = {"rename": (os, "replace"), "answer": (HubReader, "_heed")}
    return run_and_die(lambda: collect(output, CONFIG), at, [places[place]])


def test_what_was_done_is_not_asked_for_again(hub, undisturbed, tmp_path):
    seed_mixed(hub)
    assert collect_and_die(tmp_path / "killed", 80, "rename")
    hub.clear_log()
    collect(tmp_path / "killed", CONFIG)
    assert not hub.downloaded("timm/resnet18.a1_in1k")
    assert not any(request.startswith("GET /api/models?") for request in hub.requests)
    assert hashes(tmp_path / "killed") == undisturbed


def test_the_listing_of_an_unfinished_run_stays_as_it_was(hub, undisturbed, tmp_path):
    seed_mixed(hub)
    assert collect_and_die(tmp_path / "killed", 20, "rename")
    hub.add("new/model", {"config.json": "{}"}, downloads=10**6, labels=("image-classification",))
    collect(tmp_path / "killed", CONFIG)
    assert "new/model" not in model_rows(tmp_path / "killed")
    assert hashes(tmp_path / "killed") == undisturbed


@pytest.mark.slow
def test_the_command_collects_prints_the_outcomes_and_plans_without_collecting(hub, undisturbed, tmp_path):
    seed_mixed(hub)
    recipe = tmp_path / "collect.yaml"
    recipe.write_text("".join(f"{key}: {value}\n" for key, value in CONFIG.settings().items() if value is not None))
    command = ["-q", "collect", "--config", recipe, "--retries", "1", "--retry-pause", "0.01"]
    first = hf_wsl(*command, "--output_dir", tmp_path / "out")
    assert first.exit_code == 0, first.stderr
    assert "27 accepted" in first.stdout and "3 duplicate" in first.stdout and "1 network" in first.stdout
    assert hashes(tmp_path / "out") == undisturbed
    # In a process of its own: what the shell starts.
    words = [sys.executable, "-m", "hf_wsl.cli", *map(str, command), "--output_dir", str(tmp_path / "no"), "--dry-run"]
    plan = subprocess.run(words, capture_output=True, text=True)
    assert plan.returncode == 0, plan.stderr
    assert "models listed: 60" in plan.stdout and not (tmp_path / "no").exists()
