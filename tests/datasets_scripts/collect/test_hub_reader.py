"""Reading the Hub through every fault that it is known for: the right bytes, or a reason; never other bytes."""

import hashlib
import random
import time
from dataclasses import replace

import pytest
from hub_server import HubServer
from huggingface_hub import constants

from datasets_scripts.collect.hub_reader import HubReader, Pace
from datasets_scripts.collect.task import hub_files
from datasets_scripts.outcomes import RefusedModel


DATA = random.Random(0).randbytes(3_000_000)
CONFIG = b'{"model_type": "net"}'
FILES = r"GET /org/net/resolve/.*safetensors"


@pytest.fixture
def reader(tmp_path):
    return HubReader(Pace(tmp_path / "pace"), retries=3, pause=0.01)


@pytest.fixture
def net(hub, reader):
    """A repository, its commit and its files as the Hub describes them."""
    commit = hub.add("org/net", {"model.safetensors": DATA, "config.json": CONFIG})
    files = hub_files(reader.info("org/net", commit))
    hub.clear_log()
    return commit, files["model.safetensors"], files["config.json"]


def test_the_hub_s_own_sizes_and_hashes_are_known(net):
    _, weights, config = net
    assert (weights.size, weights.sha256) == (len(DATA), hashlib.sha256(DATA).hexdigest())
    assert config.sha256 is None
    assert config.blob_id == hashlib.sha1(b"blob %d\0" % len(CONFIG) + CONFIG).hexdigest()


def test_a_range_is_read_and_no_more_of_the_file(hub, reader, net):
    commit, weights, config = net
    assert reader.read("org/net", commit, weights, 100, 70_100) == DATA[100:70_100]
    assert reader.read("org/net", commit, weights, len(DATA) - 5, len(DATA) + 99) == DATA[-5:]
    assert reader.read("org/net", commit, config) == CONFIG
    assert reader.bytes_read == 70_000 + 5 + len(CONFIG) == hub.totals()["bytes"]


@pytest.mark.parametrize(
    "fault",
    [
        {"cut": 1_000_000},
        {"reset": 1_500_000},
        {"drop": True},
        {"status": 500},
        {"status": 503},
        {"status": 429},
        {"corrupt": 2_999_999},
        {"truncate": 1_000},
        {"extend": 7},
        {"stall_at": 500_000, "stall": 1.0},
    ],
    ids=lambda fault: next(iter(fault)) + str(next(iter(fault.values()))),
)
def test_a_fault_that_passes_leaves_the_right_bytes(hub, reader, net, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    commit, weights, _ = net
    rule = hub.fault(FILES, times=2, **fault)
    reader.download("org/net", commit, weights, tmp_path / "model.safetensors")
    assert rule.fired == (1 if "extend" in fault else 2)  # what comes after the file is not looked at
    assert (tmp_path / "model.safetensors").read_bytes() == DATA


def test_a_file_is_gone_on_with_where_it_was_cut(hub, reader, net, tmp_path):
    commit, weights, _ = net
    hub.fault(FILES, times=3, cut=1_000_000)
    reader.download("org/net", commit, weights, tmp_path / "model.safetensors")
    assert reader.bytes_read < 1.1 * len(DATA)
    assert [entry.range for entry in hub.log] == [f"bytes={start}-2999999" for start in (0, 1_000_000, 2_000_000)]


def test_a_server_without_ranges_gives_the_right_bytes_too(hub, reader, net, tmp_path):
    commit, weights, _ = net
    hub.fault(FILES, times=1, cut=1_000_000)
    hub.fault(FILES, times=-1, ignore_range=True)
    reader.download("org/net", commit, weights, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == DATA
    assert reader.read("org/net", commit, weights, 10, 30) == DATA[10:30]


def test_bytes_that_stay_wrong_are_refused_as_damaged(hub, reader, net, tmp_path):
    commit, weights, _ = net
    rule = hub.fault(FILES, times=-1, corrupt=5)
    with pytest.raises(RefusedModel, match="as the Hub says, in 3 trials") as refusal:
        reader.download("org/net", commit, weights, tmp_path / "model.safetensors")
    assert refusal.value.outcome == "damaged"
    assert rule.fired == 3


def test_a_file_of_another_size_is_refused_as_damaged(hub, reader, net):
    commit, weights, _ = net
    shorter = replace(weights, size=weights.size - 1)
    with pytest.raises(RefusedModel, match="model.safetensors is '3000000' bytes long, not 2999999"):
        reader.read("org/net", commit, shorter)


def test_a_fault_that_stays_ends_after_the_retries(hub, reader, net, tmp_path):
    commit, weights, _ = net
    rule = hub.fault(FILES, times=-1, status=500)
    with pytest.raises(RefusedModel, match="could not be fetched.*500") as refusal:
        reader.download("org/net", commit, weights, tmp_path / "model.safetensors")
    assert (refusal.value.outcome, rule.fired) == ("network", 4)
    assert reader.is_answering()
    hub.fault("GET /api/models", times=-1, drop=True)
    assert not reader.is_answering()


@pytest.mark.parametrize("retries", [0, 2])
def test_metadata_is_retried_like_files(hub, tmp_path, retries):
    hub.add("org/net", {"config.json": CONFIG})
    reader = HubReader(Pace(tmp_path / "pace"), retries=retries, pause=0.01)
    hub.fault("GET /api/models/org/net", times=2, status=502)
    if retries == 2:
        assert reader.info("org/net", "main").id == "org/net"
        return
    with pytest.raises(RefusedModel, match="could not be fetched.*502"):
        reader.info("org/net", "main")


def test_what_the_hub_says_for_good_is_not_asked_again(hub, reader, net):
    commit, weights, _ = net
    hub.add("org/gated", {"model.safetensors": DATA}, gated_to=("hf_friend",))
    hub.add("org/banned", {"model.safetensors": DATA}, disabled=True)
    gated = hub_files(reader.info("org/gated", "main"))["model.safetensors"]
    hub.clear_log()
    for outcome, request in (
        ("gated", lambda: reader.read("org/gated", "main", gated)),
        ("disabled", lambda: reader.info("org/banned", "main")),
        ("vanished", lambda: reader.info("org/none", "main")),
        ("vanished", lambda: reader.info("org/net", "v9")),
    ):
        with pytest.raises(RefusedModel) as refusal:
            request()
        assert refusal.value.outcome == outcome
    assert len(hub.requests) == 4
    hub.remove("org/net")
    with pytest.raises(RefusedModel, match="the Hub answers RepositoryNotFoundError"):
        reader.read("org/net", commit, weights)


def test_a_gated_file_is_read_with_its_token(hub, tmp_path):
    hub.add("org/gated", {"model.safetensors": DATA}, gated_to=("hf_friend",))
    reader = HubReader(Pace(tmp_path / "pace"), token="hf_friend")
    file = hub_files(reader.info("org/gated", "main"))["model.safetensors"]
    assert reader.read("org/gated", "main", file) == DATA


def test_an_old_commit_is_read_after_the_branch_has_moved(hub, reader, net):
    commit, weights, _ = net
    hub.add("org/net", {"model.safetensors": DATA[::-1]})
    assert reader.read("org/net", commit, weights) == DATA


@pytest.mark.parametrize(
    "headers", [{"Retry-After": "0"}, {"RateLimit": '"api";r=0;t=0'}], ids=lambda h: next(iter(h))
)
def test_a_rate_limit_holds_every_worker_of_the_run(hub, tmp_path, net, headers):
    commit, _, config = net
    one = HubReader(Pace(tmp_path / "shared"), retries=3, pause=0.01)
    other = Pace(tmp_path / "shared")
    hub.fault("GET /org/net/resolve", times=1, status=429, headers=headers)
    began = time.time()
    assert one.read("org/net", commit, config) == CONFIG
    assert time.time() - began >= 1  # a second is added to what the Hub says, which counts whole ones
    other.hold(0.3)
    began = time.time()
    one.read("org/net", commit, config)
    assert time.time() - began >= 0.25


def test_a_store_on_another_host_gets_no_token(tmp_path, monkeypatch):
    with HubServer(cdn=True) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        commit = hub.add("org/net", {"model.safetensors": DATA})
        reader = HubReader(Pace(tmp_path / "pace"), token="hf_alice")
        reader._api.endpoint = hub.url
        file = hub_files(reader.info("org/net", commit))["model.safetensors"]
        assert reader.read("org/net", commit, file) == DATA
        at_store = [entry for entry in hub.log if entry.cdn]
        assert at_store and not any(entry.token for entry in at_store)
        assert any(entry.token == "hf_alice" for entry in hub.log if not entry.cdn)
