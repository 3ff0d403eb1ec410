"""Every file of the Hub is checked once: wrong bytes are fetched again, and never read nor kept."""

import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from modeling_wsl.checkpoints import downloads
from modeling_wsl.checkpoints.checkpoint import CheckpointError, open_checkpoint


STATE = {"b.weight": torch.arange(40.0), "a.weight": torch.zeros(3, 5)}
FILES = {"model.safetensors": save(STATE), "config.json": '{"architecture": "resnet0"}'}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of this test alone, where nothing is verified yet."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(downloads, "_verified", set())
    return tmp_path / "cache"


def kept(cache: Path, name: str) -> list[Path]:
    """What the cache keeps of a file: its links in the snapshots, and their blobs."""
    links = list(cache.glob(f"models--*/snapshots/*/{name}"))
    return links + [link.resolve() for link in links if link.exists()]


def times_fetched(hub, name: str) -> int:
    return sum(request.startswith("GET ") and request.endswith(name) for request in hub.requests)


def damage(file: Path) -> None:
    blob = file.resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    os.utime(blob, ns=(0, blob.stat().st_mtime_ns + 1))  # clocks of some disks are coarse


@pytest.mark.parametrize("name", FILES)
def test_wrong_bytes_are_fetched_again(hub, name):
    hub.add("org/model", FILES)
    fault = hub.fault(f"GET .*{name}", corrupt=-1)
    with open_checkpoint("org/model") as checkpoint:
        assert torch.equal(checkpoint.read("b.weight"), STATE["b.weight"]) and checkpoint.library == "timm"
    assert fault.fired == 1 and times_fetched(hub, name) == 2


@pytest.mark.parametrize("name", FILES)
def test_bytes_that_are_wrong_twice_are_refused_and_not_kept(hub, cache, name):
    hub.add("org/model", FILES)
    fault = hub.fault(f"GET .*{name}", times=2, corrupt=-1)
    with pytest.raises(CheckpointError, match=f"org/model: {name} has other bytes .* fetched twice"):
        open_checkpoint("org/model")
    assert fault.fired == 2 and kept(cache, name) == []
    assert open_checkpoint("org/model").num_parameters == 55  # the third time they are right


def test_one_bad_shard_is_fetched_again_alone(hub):
    index = '{"weight_map": {"a.weight": "s1.safetensors", "b.weight": "s2.safetensors"}}'
    shards = {f"s{n}.safetensors": save({k: STATE[k]}) for n, k in ((1, "a.weight"), (2, "b.weight"))}
    hub.add("org/big", shards | {"model.safetensors.index.json": index})
    hub.fault("GET .*s2.safetensors", corrupt=-1)
    assert open_checkpoint("org/big").sha256() == open_checkpoint(STATE).sha256()
    assert [times_fetched(hub, name) for name in shards] == [1, 2]


def test_a_file_is_hashed_once_and_again_when_it_changed(hub, cache, monkeypatch):
    hub.add("org/model", FILES)
    open_checkpoint("org/model")
    hashed = []
    digest_of = downloads.new_digest
    monkeypatch.setattr(downloads, "new_digest", lambda *about: hashed.append(about) or digest_of(*about))
    open_checkpoint("org/model")
    assert hashed == []
    damage(kept(cache, "model.safetensors")[0])
    hub.requests.clear()
    with open_checkpoint("org/model") as checkpoint:
        assert torch.equal(checkpoint.read("b.weight"), STATE["b.weight"])
    assert hub.downloaded("org/model") == ["model.safetensors"]


def test_without_the_hub_the_cache_is_checked_too(hub, cache):
    hub.add("org/model", FILES)
    open_checkpoint("org/model")
    hub.failures["/org/model"] = 500
    assert open_checkpoint("org/model").num_parameters == 55
    damage(kept(cache, "model.safetensors")[0])
    with pytest.raises(CheckpointError, match="has other bytes .* in the cache, and cannot be fetched again now"):
        open_checkpoint("org/model")
    hub.failures.clear()
    assert open_checkpoint("org/model").sha256() == open_checkpoint(STATE).sha256()


def test_on_a_disk_without_links_the_hub_is_asked_for_the_digest(hub, cache, monkeypatch):
    from huggingface_hub import file_download

    monkeypatch.setattr(file_download, "are_symlinks_supported", lambda *_: False)
    hub.add("org/model", FILES)
    fault = hub.fault("GET .*model.safetensors", corrupt=-1)
    with open_checkpoint("org/model") as checkpoint:
        assert torch.equal(checkpoint.read("b.weight"), STATE["b.weight"])
    assert fault.fired == 1 and not kept(cache, "model.safetensors")[0].is_symlink()


def test_a_cache_that_cannot_be_written_to_is_read_and_its_bad_files_are_named(hub, cache):
    hub.add("org/model", FILES)
    cache.mkdir()
    (cache / "models--org--model").mkdir()
    (cache / "models--org--model" / downloads.NOTES).write_text("in the way of every note")
    open_checkpoint("org/model")
    assert len(downloads._verified) == 2  # this process hashes them once
    damage(kept(cache, "model.safetensors")[0])
    (cache / ".locks" / "models--org--model").rename(cache / "locks")
    (cache / ".locks" / "models--org--model").write_text("in the way of every lock")
    with pytest.raises(CheckpointError, match="the cache cannot be changed .* Delete .*blobs"):
        open_checkpoint("org/model")


@pytest.mark.parametrize("times", [1, 2])
def test_wrong_bytes_of_xet_are_fetched_again(hub, cache, monkeypatch, times):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.xet = True
    hub.add(f"org/model{times}", FILES)
    fault = hub.fault("GET /xorbs/", times=times, corrupt=-1)
    if times == 1:
        assert open_checkpoint("org/model1").sha256() == open_checkpoint(STATE).sha256()
    else:
        with pytest.raises(CheckpointError, match="model.safetensors has other bytes .* fetched twice"):
            open_checkpoint("org/model2")
        assert kept(cache, "model.safetensors") == []
    assert fault.fired == times and hub.downloaded(f"org/model{times}") == ["config.json"][: 2 - times]
