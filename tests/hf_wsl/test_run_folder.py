import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hf_wsl.files import remove_folder, remove_leftovers, replacing_folder
from hf_wsl.run_folder import RunFolder, RunFolderError, differences


SETTINGS = {"seed": 0, "sizes": (1, 2), "zoo": {"epochs": 3}}
WORDS = "from pathlib import Path\nfrom hf_wsl import files, run_folder\nimport os, signal, shutil, sys, time\n"
DIE = "os.kill(os.getpid(), signal.SIGKILL)\n"


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name[0] != ".")


def run_and_die(code: str, folder: Path) -> None:
    """Runs Python that kills itself; `folder` is there a RunFolder."""
    code = f"{WORDS}folder = run_folder.RunFolder(Path(sys.argv[1]), 'a zoo')\n{code}"
    found = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert found.returncode == -signal.SIGKILL, found.stderr


def make(folder: Path, settings: dict = SETTINGS) -> RunFolder:
    """A folder of a run that is half done."""
    run = RunFolder(folder, "a zoo")
    with run.open(settings):
        with run.replacing_folder(folder / "models" / "a") as model:
            (model / "weights").write_text("a")
        run.write_record("a", {"accuracy": 0.5})
    return run


def test_a_folder_is_claimed_and_a_run_of_the_same_settings_goes_on(tmp_path):
    run = make(tmp_path / "zoo")
    with run.open(SETTINGS) as settings:
        assert settings == {"seed": 0, "sizes": [1, 2], "zoo": {"epochs": 3}}
        assert run.is_done("a") and not run.is_done("b")
        assert run.read_record("a") == {"accuracy": 0.5} and run.read_record("b") is None
        run.forget("a")
        assert not run.is_done("a")
        assert run.read_report() is None
        run.finish({"models": 1})
    assert run.read_report() == {"models": 1}
    assert visible(tmp_path / "zoo") == ["models", "records", "report.json", "settings.json"]


def test_other_settings_are_refused_and_each_that_differs_is_named(tmp_path):
    make(tmp_path)
    with (
        pytest.raises(
            RunFolderError, match=r"holds a zoo .*seed was 0, now 1; zoo.epochs was 3, now 4\. Give the same"
        ),
        make(tmp_path, {**SETTINGS, "seed": 1, "zoo": {"epochs": 4}}).open({}),
    ):
        pass


def test_differences_compare_lists_of_names_by_what_they_hold():
    assert differences({"models": ["a", "b"]}, {"models": ["b", "c", "d"]}) == [
        "2 models more (c, d)",
        "1 models fewer (a)",
    ]
    assert differences({"models": ["a", "b"]}, {"models": ["b", "a"]}) == ["models come in another order"]
    assert differences({"rates": [1, 2]}, {"rates": [1]}) == ["rates was [1, 2], now [1]"]


def test_an_option_that_only_one_version_knows_was_off_in_the_other():
    assert differences({"new": False}, {}) == differences({}, {"new": None}) == []
    assert differences({}, {"new": 3}) == ["new was None, now 3"]
    assert differences({"check": None}, {"check": False}) == ["check was None, now False"]


def test_foreign_files_are_refused_unless_they_are_hidden_or_ours(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with (
        pytest.raises(RunFolderError, match=r"other files \(thesis.tex\).*new or an empty folder"),
        RunFolder(tmp_path).open(SETTINGS, overwrite=True),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / ".gitattributes").touch()
    with RunFolder(tmp_path).open(SETTINGS, ours=["thesis.tex"]):
        pass
    assert visible(tmp_path) == ["settings.json", "thesis.tex"]


def test_overwriting_clears_a_run_and_is_offered_where_the_command_has_the_option(tmp_path):
    run, other = make(tmp_path), {**SETTINGS, "seed": 1}
    (tmp_path / ".gitattributes").touch()
    with pytest.raises(RunFolderError, match="or delete this one.$"), run.open(other):
        pass
    with pytest.raises(RunFolderError, match="--overwrite_output_dir"), run.open(other, overwrite=False):
        pass
    with run.open(other, overwrite=True):
        assert not run.is_done("a")
    assert visible(tmp_path) == ["settings.json"]
    assert (tmp_path / ".gitattributes").is_file()


def test_a_state_in_a_folder_of_its_own_is_removed_and_the_report_still_tells_of_the_run(tmp_path):
    run = RunFolder(tmp_path / "data", "a dataset", state=".tokenize", report="tokenize.json")
    with run.open(SETTINGS):
        run.write_record("0000000", {})
        run.write_text(run.output / "README.md", "card")
        run.finish({"counts": 1})
        run.remove_state()
    assert [path.name for path in sorted(run.output.iterdir())] == ["README.md", "tokenize.json"]
    with pytest.raises(RunFolderError, match="a dataset that is finished"), run.open(SETTINGS, overwrite=False):
        pass
    with run.open({}, overwrite=True):
        assert visible(run.output) == []


def test_damaged_files_are_named(tmp_path):
    run = make(tmp_path)
    run.record("a").write_text("{")
    with pytest.raises(RunFolderError, match=r"a.json is damaged .*Delete"):
        run.read_record("a")
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(RunFolderError, match="report.json was not written by this command"):
        run.read_report()


def test_a_second_process_is_refused_and_a_killed_one_lets_go(tmp_path):
    code = (
        f"{WORDS}with run_folder.RunFolder(Path(sys.argv[1])).open({{}}):\n print('in', flush=True)\n time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "in\n"
        with pytest.raises(RunFolderError, match="another run is writing here"), RunFolder(tmp_path).open({}):
            pass
    finally:
        process.kill()
        process.wait()
    with RunFolder(tmp_path).open({}) as settings:
        assert settings == {}


def test_a_kill_while_files_and_folders_are_written_leaves_none_of_them(tmp_path):
    make(tmp_path)
    for code in (
        "with folder.replacing(folder.output / 'table') as temporary:\n  temporary.write_text('ha')\n  " + DIE,
        "with folder.replacing_folder(folder.output / 'models' / 'b') as new:\n  (new / 'half').touch()\n  " + DIE,
    ):
        run_and_die("with folder.open({'seed': 0, 'sizes': [1, 2], 'zoo': {'epochs': 3}}):\n " + code, tmp_path)
        assert visible(tmp_path) == ["models", "records", "settings.json"]
        assert visible(tmp_path / "models") == ["a"]
    run = RunFolder(tmp_path, "a zoo")
    with run.open(SETTINGS):
        assert list(run.temporary.iterdir()) == []


def test_a_kill_while_a_folder_is_deleted_leaves_no_half_of_it(tmp_path):
    make(tmp_path)
    half = f"def half(path, **_):\n  os.unlink(path / 'weights')\n  {DIE}shutil.rmtree = half\n"
    run_and_die(half + "files.remove_folder(folder.output / 'models' / 'a')", tmp_path)
    assert visible(tmp_path / "models") == []
    assert len(list((tmp_path / "models").iterdir())) == 1
    remove_leftovers(tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_folder_that_replaces_another_is_there_before_or_after_a_kill(tmp_path):
    make(tmp_path)
    half = f"def half(path, **_):\n  if path.is_dir():\n   {DIE}shutil.rmtree = half\n"
    run_and_die(half + "with files.replacing_folder(folder.output / 'models') as new:\n (new / 'b').touch()", tmp_path)
    assert visible(tmp_path / "models") == ["b"]
    with pytest.raises(ZeroDivisionError), replacing_folder(tmp_path / "models") as new:
        (new / "c").touch()
        1 / 0  # noqa: B018
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".lock", "models", "records", "settings.json"]
    assert visible(tmp_path / "models") == ["b"]


def test_a_kill_while_a_run_is_overwritten_never_leaves_half_of_the_old_one(tmp_path):
    make(tmp_path)
    half = f"def half(path, **_):\n  if path.is_dir():\n   {DIE}shutil.rmtree = half\n"
    run_and_die(half + "with folder.open({'seed': 9}, overwrite=True):\n pass", tmp_path)
    assert visible(tmp_path) != ["settings.json"]
    run = RunFolder(tmp_path, "a zoo")
    with run.open(SETTINGS):  # the very settings that the old one had: its files are gone all the same
        assert visible(tmp_path) == ["settings.json"]


def test_deleting_a_folder_that_is_not_there_does_nothing_and_of_a_link_only_the_link_goes(tmp_path):
    remove_folder(tmp_path / "none")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    remove_folder(tmp_path / "link")
    assert sorted(os.listdir(tmp_path)) == ["real"]


def test_worker_processes_get_the_folder(tmp_path):
    run = pickle.loads(pickle.dumps(make(tmp_path)))
    assert run.read_record("a") == json.loads(run.record("a").read_text())
