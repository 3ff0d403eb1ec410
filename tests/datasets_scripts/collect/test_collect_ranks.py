"""A collection on datatrove's executors: ranks share the work, and make the dataset that one process makes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from collect_fixtures import CONFIG, collect_undisturbed, configured, hashes
from hub_models import seed_mixed

from datasets_scripts.collect.collect import collect
from datasets_scripts.collect.ranks import collect_with_ranks, prepare
from datasets_scripts.tokenize_config import TokenizeError
from datasets_scripts.work_folder import WorkFolder


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
RANK = """
import sys
from collect_fixtures import CONFIG
from datasets_scripts.collect.ranks import collect_with_ranks
if __name__ == "__main__":
    output, rank = sys.argv[1:]
    options = {"workers": 1, "local_tasks": 1, "local_rank_offset": int(rank)}
    collect_with_ranks(output, CONFIG, ranks=4, options=options)
"""


@pytest.fixture(scope="module")
def of_one(hub_server, tmp_path_factory):
    """The hashes of the dataset that one process makes."""
    return collect_undisturbed(hub_server, tmp_path_factory.mktemp("one") / "dataset")


def start_rank(output: Path, rank: int) -> subprocess.Popen:
    """Runs one rank of four in a process group of its own, as a machine of a cluster would."""
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("tests/hub", "tests/fixtures", "."))
    return subprocess.Popen(
        [sys.executable, "-c", RANK, str(output), str(rank)],
        env={**os.environ, "PYTHONPATH": paths},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_four_ranks_one_killed_and_rerun_make_the_dataset_of_one_process(hub, of_one, tmp_path):
    seed_mixed(hub)
    output = tmp_path / "ranks"
    for first, count in ((0, 2), (3, 1)):
        options = {"workers": 1, "local_rank_offset": first, "local_tasks": count}
        assert collect_with_ranks(output, CONFIG, ranks=4, options=options) is None
    killed = []

    def kill(server) -> None:
        killed.append(os.killpg(dying.pid, signal.SIGKILL))

    # rank 2 of 4 deals with the models 2, 6, 10 ...: it is killed in the middle of the second one's weights
    hub.fault("GET /timm/beit_base_patch16_224.in22k_ft_in1k/resolve/.*safetensors", times=1, skip=1, do=kill)
    dying = start_rank(output, 2)
    assert dying.wait(timeout=120) == -signal.SIGKILL and killed
    assert not (output / "tokenize.json").exists()
    completed = tmp_path / "ranks.ranks" / "collect" / "completions"
    assert sorted(path.name for path in completed.iterdir()) == ["00000", "00001", "00003"]
    hub.clear_log()
    report = collect_with_ranks(output, CONFIG, ranks=4, options={"workers": 1})
    assert report.outcomes["accepted"] == 27
    assert hashes(output) == of_one
    # ranks that had ended, and the models that rank 2 had dealt with, were not asked for again
    assert not hub.downloaded("timm/resnet18.a1_in1k") and not hub.downloaded("timm/resnet50.a1_in1k")
    assert hub.downloaded("timm/beit_base_patch16_224.in22k_ft_in1k")


def test_a_machine_that_joins_does_not_disturb_the_ranks_of_another(hub, of_one, tmp_path):
    seed_mixed(hub)
    joined = []
    weights = "GET /timm/resnet50.a1_in1k/resolve/.*safetensors"
    hub.fault(weights, skip=1, do=lambda _: joined.append(prepare(WorkFolder(tmp_path / "ranks"), CONFIG, [])))
    collect_with_ranks(tmp_path / "ranks", CONFIG, ranks=2, options={"workers": 1})
    assert len(joined) == 1
    assert hashes(tmp_path / "ranks") == of_one


def test_ranks_stop_when_together_they_have_enough(hub, tmp_path):
    seed_mixed(hub)
    config = configured(num_train=8, num_validation=2)
    collect(tmp_path / "one", config)
    collect_with_ranks(tmp_path / "ranks", config, ranks=2, options={"workers": 1})
    assert hashes(tmp_path / "ranks") == hashes(tmp_path / "one")


def test_unknown_executors_and_options_are_refused(hub, tmp_path):
    seed_mixed(hub)
    with pytest.raises(TokenizeError, match="executor='k8s' is not known; choose one of local, slurm, ray"):
        collect_with_ranks(tmp_path / "a", CONFIG, ranks=2, executor="k8s")
    with pytest.raises(TokenizeError, match="does not take these options"):
        collect_with_ranks(tmp_path / "b", CONFIG, ranks=2, options={"wrokers": 1})
