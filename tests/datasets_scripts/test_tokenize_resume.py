"""A run that is killed, at any moment, and started again ends with the bytes of one that was left alone."""

import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from interrupted_runs import hashes, run_and_die
from zoo_fixtures import add_model, add_refused, make_zoo, tiny_state

import datasets_scripts.model_task
from datasets_scripts.tokenize import tokenize
from datasets_scripts.tokenize_config import TokenizeConfig
from datasets_scripts.work_folder import WorkFolder
from hf_wsl.run_folder import RunFolderError


CONFIG = TokenizeConfig(
    token_size=16, window_size=24, validation_fraction=0.5, max_shard_size="2KB", max_row_group_size="1KB"
)
COMMAND = """
import sys
from datasets_scripts.tokenize import tokenize
from datasets_scripts.tokenize_config import TokenizeConfig
if __name__ == "__main__":
    tokenize(sys.argv[1], sys.argv[2], TokenizeConfig(token_size=16, window_size=24, num_workers=2))
"""


@pytest.fixture
def small_zoo(tmp_path):
    """Two models of two owners and a refused one."""
    add_model(tmp_path / "zoo", "one", tiny_state(1, width=20), owner="ada")
    add_model(tmp_path / "zoo", "two", tiny_state(2, width=20), owner="bob")
    add_model(tmp_path / "zoo", "bad", {"weight": torch.full((3, 3), float("nan"))}, owner="eve")
    return tmp_path / "zoo"


def tokenize_and_die(zoo: Path, output: Path, at: int, places: list[tuple[object, str]]) -> bool:
    return run_and_die(lambda: tokenize(zoo, output, CONFIG), at, places)


def test_a_run_killed_before_any_of_its_renames_resumes_to_the_same_bytes(small_zoo, tmp_path):
    tokenize(small_zoo, tmp_path / "whole", CONFIG)
    expected = hashes(tmp_path / "whole")
    assert sum(name.startswith("windows/") for name in expected) > 2
    at = 1
    while tokenize_and_die(small_zoo, tmp_path / f"killed-{at}", at, [(os, "replace")]):
        assert "tokenize.json" not in hashes(tmp_path / f"killed-{at}")
        tokenize(small_zoo, tmp_path / f"killed-{at}", CONFIG)
        assert hashes(tmp_path / f"killed-{at}") == expected, f"killed before rename {at}"
        at += 1
    assert at > 12  # settings, two parts, three records, plan, Parquet files, the report


@pytest.mark.parametrize(
    ("place", "at"),
    [
        ((datasets_scripts.model_task, "window_row"), 2),  # a part with one window
        ((pq.ParquetWriter, "write_table"), 2),  # a Parquet file with one row group
    ],
    ids=["part", "parquet"],
)
def test_half_written_files_are_written_again(small_zoo, tmp_path, place, at):
    tokenize(small_zoo, tmp_path / "whole", CONFIG)
    assert tokenize_and_die(small_zoo, tmp_path / "killed", at, [place])
    tokenize(small_zoo, tmp_path / "killed", CONFIG)
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


def test_a_run_killed_twice_resumes_to_the_same_bytes(small_zoo, tmp_path):
    tokenize(small_zoo, tmp_path / "whole", CONFIG)
    for at in (4, 3, 6):
        assert tokenize_and_die(small_zoo, tmp_path / "killed", at, [(os, "replace")])
    tokenize(small_zoo, tmp_path / "killed", CONFIG)
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


def descendants(pid: int) -> set[int]:
    children = [
        int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()
    ]
    return set(children).union(*(descendants(child) for child in children))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the process table of Linux")
def test_two_workers_killed_from_outside_leave_no_process_and_resume_with_one(tmp_path):
    make_zoo(tmp_path / "zoo")
    add_refused(tmp_path / "zoo")
    for number in range(30):
        add_model(tmp_path / "zoo", f"more-{number}", tiny_state(100 + number), owner=f"owner-{number % 7}")
    options = {"token_size": 16, "window_size": 24}
    tokenize(tmp_path / "zoo", tmp_path / "whole", TokenizeConfig(**options))
    (tmp_path / "run.py").write_text(COMMAND)
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "zoo"), str(tmp_path / "killed")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    records = tmp_path / "killed" / ".tokenize" / "records"
    while process.poll() is None and len(list(records.glob("*.json")) if records.is_dir() else []) < 3:
        time.sleep(0.002)
    workers = descendants(process.pid)
    process.kill()
    process.wait()
    assert len(workers) >= 2
    deadline = time.monotonic() + 30
    while (alive := {p for p in workers if is_running(p)}) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive
    assert not (tmp_path / "killed" / "tokenize.json").exists()
    tokenize(tmp_path / "zoo", tmp_path / "killed", TokenizeConfig(**options))
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_two_workers_write_the_bytes_of_one(small_zoo, tmp_path):
    tokenize(small_zoo, tmp_path / "one", CONFIG)
    tokenize(small_zoo, tmp_path / "two", TokenizeConfig(**CONFIG.settings(), num_workers=2))
    assert hashes(tmp_path / "two") == hashes(tmp_path / "one")


def test_a_finished_dataset_is_recognized_and_left_alone(small_zoo, tmp_path):
    first = tokenize(small_zoo, tmp_path / "dataset", CONFIG)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "dataset").rglob("*")}
    second = tokenize(small_zoo, tmp_path / "dataset", CONFIG)
    assert (first.already_complete, second.already_complete) == (False, True)
    assert second.tokens_by_split == first.tokens_by_split
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "dataset").rglob("*")} == times


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_other_settings_and_other_models_are_refused_and_named(small_zoo, tmp_path, finished):
    output = tmp_path / "dataset"
    if finished:
        tokenize(small_zoo, output, CONFIG)
    else:
        assert tokenize_and_die(small_zoo, output, 5, [(os, "replace")])
    other = TokenizeConfig(**{**CONFIG.settings(), "token_size": 32, "seed": 1})
    with pytest.raises(RunFolderError, match="token_size was 16, now 32; seed was 0, now 1"):
        tokenize(small_zoo, output, other)
    add_model(small_zoo, "new", tiny_state(9))
    with pytest.raises(RunFolderError, match=r"1 models more \(new\)"):
        tokenize(small_zoo, output, CONFIG)


def test_a_source_that_changed_is_read_again_or_named(small_zoo, tmp_path):
    def change(seed):
        state = {name: t for name, t in tiny_state(seed).items() if name != "head.weight"}
        safetensors.torch.save_file(state, small_zoo / "one" / "model.safetensors")

    assert tokenize_and_die(small_zoo, tmp_path / "dataset", 11, [(os, "replace")])  # some Parquet files are there
    assert list((tmp_path / "dataset" / "windows").glob("*.parquet"))
    change(11)
    tokenize(small_zoo, tmp_path / "dataset", CONFIG)
    tokenize(small_zoo, tmp_path / "anew", CONFIG)
    assert hashes(tmp_path / "dataset") == hashes(tmp_path / "anew")
    change(12)
    with pytest.raises(RunFolderError, match=r"1 models changed since \(one\)"):
        tokenize(small_zoo, tmp_path / "dataset", CONFIG)


def test_a_folder_of_other_files_is_not_written_into(small_zoo, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match=r"other files \(thesis.tex\)"):
        tokenize(small_zoo, tmp_path / "home", CONFIG)
    assert hashes(tmp_path / "home").keys() == {"thesis.tex"}


def test_two_runs_do_not_write_into_one_folder(small_zoo, tmp_path):
    work = WorkFolder(tmp_path / "dataset")
    with (
        work.open(CONFIG.settings()),
        pytest.raises(RunFolderError, match="another run is writing here"),
    ):
        tokenize(small_zoo, tmp_path / "dataset", CONFIG)


def test_another_dataset_in_a_folder_of_the_same_name_is_not_read_from_the_cache(tmp_path):
    for number in (1, 2):
        add_model(tmp_path / str(number) / "zoo", "one", tiny_state(number))
        tokenize(tmp_path / str(number) / "zoo", tmp_path / str(number) / "dataset", CONFIG)
    first, second = (datasets.load_dataset(str(tmp_path / n / "dataset"), "windows")["train"] for n in ("1", "2"))
    assert first["tokens"][:] != second["tokens"][:]


def test_a_dataset_of_other_settings_is_refused_and_overwritten_where_that_is_asked_for(tmp_path):
    safetensors.torch.save_file(
        {"a.weight": torch.ones(20, 30), "a.bias": torch.ones(20)}, tmp_path / "net.safetensors"
    )
    output = tmp_path / "tokens"
    tokenize(tmp_path / "net.safetensors", output)
    before = {path.relative_to(output) for path in output.rglob("*") if path.is_file()}
    (output / ".gitattributes").write_text("of the user")
    with pytest.raises(RunFolderError, match="token_size was 230, now 100.*--overwrite_output_dir"):
        tokenize(tmp_path / "net.safetensors", output, TokenizeConfig(token_size=100))
    report = tokenize(tmp_path / "net.safetensors", output, TokenizeConfig(token_size=100), overwrite=True)
    assert (report.accepted, report.num_tokens) == (1, 7)
    after = {path.relative_to(output) for path in output.rglob("*") if path.is_file()}
    assert after == {*before, Path(".gitattributes")}
