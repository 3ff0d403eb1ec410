"""The tests' own Hub against the real clients: what they list, read, write and do about faults."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_dataset
from hub_server import HubServer
from hub_state import HubFile
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_safetensors_metadata,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import save


ALICE = "hf_alice"
MIB = 1024**2
CARD = """---
library_name: timm
license: mit
pipeline_tag: image-classification
datasets: [imagenet-1k]
base_model: timm/base
---
# A net
"""


@pytest.fixture
def api(hub):
    yield HfApi(token=False)
    assert hub.crashes == []


@pytest.fixture
def alice(hub):
    yield HfApi(token=ALICE)
    assert hub.crashes == []


def get(url: str, headers: dict[str, str] | None = None, method: str = "GET") -> tuple[int, bytes, dict[str, str]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}, method=method)) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def add_many(hub, number: int = 30) -> None:
    for index in range(number):
        card = f"---\npipeline_tag: image-classification\ntags: [{'even' if index % 2 == 0 else 'odd'}]\n---\n"
        files = {"README.md": card, "model.safetensors": save({"w": torch.zeros(10**index % 97)})}
        hub.add(f"owner{index % 3}/net-{index:02d}", files, downloads=index % 5, likes=index)


# what is listed


def test_a_listing_comes_in_pages_filtered_and_sorted(hub, api):
    add_many(hub)
    hub.page_size = 7
    hub.add("owner0/a-set", {"README.md": "---\ntask_categories: [other]\n---\n"}, repo_type="dataset")
    assert [model.id for model in api.list_models()] == [f"owner{i % 3}/net-{i:02d}" for i in range(30)]
    assert len([request for request in hub.requests if request == "GET /api/models"]) == 5
    by_downloads = [
        model.downloads for model in api.list_models(sort="downloads", pipeline_tag="image-classification")
    ]
    assert by_downloads == sorted([i % 5 for i in range(30)], reverse=True)
    odd = list(api.list_models(filter=["odd", "safetensors"], author="owner1", limit=3, sort="likes"))
    assert [model.id for model in odd] == ["owner1/net-25", "owner1/net-19", "owner1/net-13"]
    assert [model.id for model in api.list_models(search="NET-07")] == ["owner1/net-07"]
    assert list(api.list_models(filter=["odd", "even"])) == []
    newest = next(iter(api.list_models(sort="created_at", limit=1)))
    assert newest.id == "owner2/net-29"
    assert [found.id for found in api.list_datasets(filter="task_categories:other")] == ["owner0/a-set"]
    hub.add("owner0/a-set", {"README.md": "---\nsdk: gradio\n---\n", "app.py": ""}, repo_type="space")
    assert [found.id for found in api.list_spaces(full=True)] == ["owner0/a-set"]
    assert api.space_info("owner0/a-set").sdk == "gradio"
    assert api.list_repo_files("owner0/a-set", repo_type="space") == ["README.md", "app.py"]


def test_a_listing_holds_the_fields_that_were_asked_for(hub, api):
    hub.add("org/net", {"README.md": CARD, "config.json": '{"model_type": "vit", "architectures": ["ViT"]}'})
    (plain,) = api.list_models()
    assert plain.sha is None and plain.card_data is None and plain.pipeline_tag == "image-classification"
    (full,) = api.list_models(full=True, cardData=True, fetch_config=True)
    assert full.sha == hub.repositories["org/net"].commit and full.card_data.license == "mit"
    assert full.config == {"model_type": "vit", "architectures": ["ViT"]}
    assert [file.rfilename for file in full.siblings] == ["README.md", "config.json"]
    (expanded,) = api.list_models(expand=["gated", "tags"])
    assert expanded.gated is False and "dataset:imagenet-1k" in expanded.tags and expanded.downloads is None
    assert {"license:mit", "base_model:timm/base", "base_model:finetune:timm/base", "timm", "vit"} <= set(full.tags)


def test_pages_stay_right_when_a_model_goes_between_them(hub, api):
    add_many(hub, 9)
    hub.page_size = 3
    gone = hub.fault("cursor=", do=lambda hub: hub.remove("owner2/net-02"))
    assert [model.id[-2:] for model in api.list_models()] == [f"{index:02d}" for index in range(9)]
    assert gone.fired == 1 and hub.find("owner2/net-02") is None


# what is read


def test_infos_and_trees_carry_sizes_and_the_ids_that_git_gives(hub, api):
    weights = save({"w": torch.zeros(3)})
    files = {"hello.txt": "hello\n", "sub/deep/b.txt": "x", "sub.d/c": "y"}
    commit = hub.add("org/net", files | {"model.safetensors": weights})
    hub.repositories["org/net"].revisions["v1"] = commit
    info = api.model_info("org/net", revision="v1", files_metadata=True)
    rows = {file.rfilename: file for file in info.siblings}
    assert (info.sha, info.safetensors.total) == (commit, 3)
    assert rows["hello.txt"].blob_id == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object
    assert rows["hello.txt"].lfs is None
    lfs = rows["model.safetensors"].lfs
    assert (lfs.size, lfs.sha256) == (len(weights), hashlib.sha256(weights).hexdigest())
    hub.page_size = 2
    tree = {row.path: row for row in api.list_repo_tree("org/net", recursive=True, expand=True)}
    assert set(tree) == {*files, "model.safetensors", "sub", "sub/deep", "sub.d"}
    assert tree["sub"].tree_id == "e1b77fd2cc63d80f4915645e3d1f246795a04bc7"  # git write-tree
    hub.add("org/tree", files)
    root = hub.repositories["org/tree"].head.trees[""]
    assert root == "9658100e818288f10c126756a19d5a54ebe5402c"  # git write-tree
    assert [row.path for row in api.list_repo_tree("org/net", "sub")] == ["sub/deep"]
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree("org/net", "none"))
    paths = api.get_paths_info("org/net", ["hello.txt", "none", "sub"])
    assert [row.path for row in paths] == ["hello.txt", "sub"]


def test_an_old_commit_stays_while_the_branch_moves_on(hub, api):
    old = hub.add("org/net", {"a.txt": "old", "b.txt": "same"}, title="first")
    new = hub.add("org/net", {"a.txt": "new", "b.txt": "same"}, title="second")
    assert api.model_info("org/net").sha == new
    for revision, text in ((old, "old"), (new, "new"), ("main", "new")):
        assert Path(hf_hub_download("org/net", "a.txt", revision=revision)).read_text() == text
    assert [commit.title for commit in api.list_repo_commits("org/net")] == ["second", "first"]
    last = {row.path: row.last_commit.title for row in api.list_repo_tree("org/net", expand=True)}
    assert last == {"a.txt": "second", "b.txt": "first"}
    moves = hub.fault("GET /api/models/org/net$", skip=1, move="org/net")
    assert api.model_info("org/net").sha == new
    assert api.model_info("org/net").sha not in (old, new)
    assert moves.fired == 1
    with pytest.raises(RevisionNotFoundError):
        api.model_info("org/net", revision="none")


def test_ranges_are_answered_from_memory_and_from_disk(hub, tmp_path):
    data = bytes(range(256)) * 1024
    (tmp_path / "w.bin").write_bytes(data)
    commit = hub.add("org/net", {"a/w.bin": data, "disk.bin": tmp_path / "w.bin", "text.txt": data.hex()})
    for name, whole in (("a/w.bin", data), ("disk.bin", data), ("text.txt", data.hex().encode())):
        url = f"{hub.url}/org/net/resolve/main/{name}"
        status, body, headers = get(url)
        assert (status, body, headers["X-Repo-Commit"]) == (200, whole, commit)
        for text, start, end in (("0-0", 0, 1), ("5-70000", 5, 70001), ("200000-", 200000, None), ("-3", -3, None)):
            status, body, headers = get(url, {"Range": f"bytes={text}"})
            assert (status, body) == (206, whole[start:end])
            assert headers["Content-Range"].endswith(f"/{len(whole)}")
        assert get(url, {"Range": f"bytes={len(whole)}-"})[0] == 416
    linked = get(f"{hub.url}/org/net/resolve/main/disk.bin", method="HEAD")[2]
    assert linked["X-Linked-Size"] == str(len(data))
    assert linked["ETag"] == linked["X-Linked-ETag"] == f'"{hashlib.sha256(data).hexdigest()}"'
    assert hub.log[-1].sent == 0 and hub.log[0].sent == len(data)


def test_a_sparse_file_of_a_terabyte_is_served_in_pieces(hub, api, tmp_path):
    with (tmp_path / "huge").open("wb") as stream:
        stream.truncate(10**12)
    hub.add("org/huge", {"model.safetensors": HubFile(tmp_path / "huge", sha256="0" * 64)})
    (file,) = api.model_info("org/huge", files_metadata=True).siblings
    assert (file.size, file.lfs.sha256) == (10**12, "0" * 64)
    last = get(f"{hub.url}/org/huge/resolve/main/model.safetensors", {"Range": "bytes=999999999990-"})
    assert last[:2] == (206, bytes(10))


def test_a_second_origin_gets_no_credentials(tmp_path):
    with HubServer(cdn=True) as hub:
        data = save({"w": torch.arange(9)})
        commit = hub.add("org/net", {"model.safetensors": data, "config.json": "{}"}, gated_to=(ALICE,))
        path = snapshot_download("org/net", endpoint=hub.url, token=ALICE, cache_dir=tmp_path)
        assert (Path(path) / "model.safetensors").read_bytes() == data
        from_cdn = [entry for entry in hub.log if entry.cdn]
        assert [entry.path for entry in from_cdn] == [f"/org/net/resolve/{commit}/model.safetensors"]
        assert from_cdn[0].token == "" and from_cdn[0].sent == len(data)
        assert hub.downloaded("org/net") == ["config.json", "model.safetensors"]


def test_a_safetensors_header_is_read_by_ranges(hub, api):
    hub.add("org/net", {"model.safetensors": save({"w": torch.zeros(50, 1000)})})
    metadata = get_safetensors_metadata("org/net")
    assert metadata.files_metadata["model.safetensors"].tensors["w"].shape == [50, 1000]
    assert sum(entry.sent for entry in hub.log) == 100001


# who may read


def test_gated_private_disabled_and_vanished_repositories_are_refused_by_name(hub, api, alice):
    hub.add("lab/gated", {"config.json": "{}"}, gated_to=("hf_bob",))
    hub.add("org/secret", {"config.json": "{}"}, private=True)
    hub.add("lab/off", {"config.json": "{}"}, disabled=True)
    hub.add("lab/gone", {"config.json": "{}"}, vanished=True)
    assert api.model_info("lab/gated").gated == "auto"
    for token in (False, ALICE):
        with pytest.raises(GatedRepoError):
            hf_hub_download("lab/gated", "config.json", token=token)
    with pytest.raises(GatedRepoError):
        api.auth_check("lab/gated")
    assert Path(hf_hub_download("lab/gated", "config.json", token="hf_bob")).read_text() == "{}"
    assert alice.model_info("org/secret").private
    for repo_id, client in (("org/secret", api), ("org/secret", HfApi(token="hf_bob")), ("lab/gone", alice)):
        with pytest.raises(RepositoryNotFoundError):
            client.model_info(repo_id)
    with pytest.raises(DisabledRepoError):
        api.model_info("lab/off")
    assert [model.id for model in api.list_models()] == ["lab/gated", "lab/off", "lab/gone"]
    assert [model.id for model in alice.list_models(gated=False)] == ["org/secret", "lab/off", "lab/gone"]
    hub.remove("lab/gated")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("lab/gated")


def test_an_account_is_known_by_its_token(hub, alice):
    assert alice.whoami()["name"] == "alice" and alice.whoami()["orgs"][0]["name"] == "org"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="nonsense").whoami()
    hub.add_account("secret", "carol", orgs=("lab",), role="read")
    assert HfApi(token="secret").whoami()["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(token="secret").create_repo("lab/net")
    with pytest.raises(HfHubHTTPError, match="403"):
        alice.create_repo("lab/net")


# faults


def test_a_download_that_is_cut_goes_on_where_it_was(hub, api):
    data = os.urandom(21 * MIB)
    hub.add("org/net", {"w.bin": data})
    cut = hub.fault(r"GET /org/net/resolve/.*w\.bin", cut=15 * MIB)
    assert Path(hf_hub_download("org/net", "w.bin")).read_bytes() == data
    ranges = [entry.range for entry in hub.log if entry.method == "GET"]
    assert cut.fired == 1 and ranges == ["", f"bytes={10 * MIB}-"]
    assert hub.totals()["bytes"] == 15 * MIB + 11 * MIB


def test_a_body_is_spoiled_as_ordered(hub):
    data = bytes(range(200)) * 2000
    hub.add("org/net", {"w.bin": data})
    url = f"{hub.url}/org/net/resolve/main/w.bin"
    for action, spoiled in (
        ({"truncate": 1000}, data[:1000]),
        ({"extend": 5}, data + bytes(5)),
        ({"corrupt": 70000}, data[:70000] + bytes([data[70000] ^ 1]) + data[70001:]),
        ({"corrupt": -1}, data[:-1] + bytes([data[-1] ^ 1])),
        ({"stall_at": 100, "stall": 0.01}, data),
        ({"throttle": 1e8}, data),
        ({"delay": 0.01}, data),
    ):
        fault = hub.fault("GET .*w.bin", **action)
        assert get(url)[1] == spoiled
        assert fault.fired == 1
        assert get(url)[1] == data
    ignored = hub.fault("GET .*w.bin", ignore_range=True)
    assert get(url, {"Range": "bytes=0-9"})[:2] == (200, data)
    hub.fault("HEAD", cut=1)
    assert get(url, method="HEAD")[0] == 200
    assert ignored.fired == 1 and hub.faults[-1].fired == 0


def test_a_connection_is_dropped_or_reset_as_ordered(hub):
    hub.add("org/net", {"w.bin": bytes(100000)})
    url = f"{hub.url}/org/net/resolve/main/w.bin"
    dropped, reset = hub.fault("w.bin", drop=True), hub.fault("w.bin", reset=70000)
    with pytest.raises(ConnectionError):
        get(url)
    with pytest.raises(ConnectionResetError):
        get(url)
    assert dropped.fired == reset.fired == 1 and hub.log[0].status == 0


def test_rate_limits_and_outages_are_waited_for_where_the_client_does(hub, api):
    hub.page_size = 1
    for name in ("org/net", "org/next"):
        hub.add(name, {"config.json": "{}"})
    # from the second page on: the first one is retried by newer clients alone
    limited = hub.fault(r"GET /api/models\?", status=429, headers={"RateLimit": '"api";r=0;t=0'})
    down = hub.fault(r"GET /api/models\?", status=503)
    assert {model.id for model in api.list_models()} == {"org/net", "org/next"}
    assert limited.fired == down.fired == 1
    for status in (429, 500):
        fault = hub.fault("GET /api/models/org/net", status=status)
        with pytest.raises(HfHubHTTPError, match=str(status)):
            api.model_info("org/net")
        assert fault.fired == 1
    hub.failures["/api/models/org"] = 502
    with pytest.raises(HfHubHTTPError, match="502"):
        api.model_info("org/net")


def test_the_client_does_not_see_a_flipped_bit_but_sees_a_wrong_size(hub, api):
    data = save({"w": torch.zeros(100)})
    hub.add("org/flipped", {"w.safetensors": data})
    hub.add("org/stated", {"w.safetensors": HubFile(data, sha256="1" * 64)})
    hub.add("org/short", {"w.safetensors": data})
    hub.fault("GET /org/flipped/", corrupt=-1)
    assert Path(hf_hub_download("org/flipped", "w.safetensors")).read_bytes() != data
    path = Path(hf_hub_download("org/stated", "w.safetensors"))
    assert path.resolve().name == "1" * 64 and path.read_bytes() == data
    hub.fault("GET /org/short/", truncate=50)
    with pytest.raises(OSError, match="Consistency check failed"):
        hf_hub_download("org/short", "w.safetensors")


def test_the_most_requests_at_once_are_counted(hub):
    hub.add("org/net", {"a.txt": "text"})
    url, meeting = f"{hub.url}/org/net/resolve/main/a.txt", threading.Barrier(3, timeout=30)
    hub.fault("a.txt", times=3, do=lambda hub: meeting.wait())  # each waits until all three are there
    with ThreadPoolExecutor(3) as pool:
        assert [status for status, _, _ in pool.map(get, [url] * 3)] == [200] * 3
    get(url)
    assert hub.totals() == {"requests": 4, "bytes": 16, "peak": 3}
    hub.clear_log()
    assert hub.totals() == {"requests": 0, "bytes": 0, "peak": 0}


# what is written


def test_a_folder_is_uploaded_and_loaded_back(hub, alice, tmp_path):
    (tmp_path / "sub").mkdir()
    weights = save({"w": torch.arange(5.0)})
    (tmp_path / "sub" / "model.safetensors").write_bytes(weights)
    (tmp_path / "README.md").write_text(CARD)
    url = alice.create_repo("org/new", private=True)
    assert url.repo_id == "org/new" and alice.create_repo("org/new", exist_ok=True) == url
    with pytest.raises(HfHubHTTPError, match="409"):
        alice.create_repo("org/new")
    first = alice.upload_folder(repo_id="org/new", folder_path=tmp_path)
    info = alice.model_info("org/new", files_metadata=True)
    assert info.private and info.sha == first.oid and info.library_name == "timm"
    assert {row.rfilename: row.lfs is not None for row in info.siblings} == {
        ".gitattributes": False,
        "README.md": False,
        "sub/model.safetensors": True,
    }
    hub.clear_log()
    alice.upload_folder(repo_id="org/new", folder_path=tmp_path)
    assert hub.find("org/new").commit == first.oid  # the client saw that nothing is new
    assert not any(request.startswith("PUT") for request in hub.requests)
    back = snapshot_download("org/new", token=ALICE, local_dir=tmp_path / "back")
    assert (Path(back) / "sub" / "model.safetensors").read_bytes() == weights
    with pytest.raises(ValueError, match="Invalid metadata"):
        alice.upload_file(repo_id="org/new", path_in_repo="README.md", path_or_fileobj=b"---\na: [\n---\n")


def test_commits_branches_tags_and_pull_requests_are_kept(hub, alice):
    alice.create_repo("alice/net")
    start = alice.model_info("alice/net").sha
    adds = [CommitOperationAdd(name, name.encode()) for name in ("a.txt", "old/b.txt", "old/c.txt", "w.bin")]
    first = alice.create_commit("alice/net", adds, commit_message="first", parent_commit=start)
    with pytest.raises(HfHubHTTPError, match="412"):
        alice.create_commit(
            "alice/net", [CommitOperationAdd("a.txt", b"")], commit_message="late", parent_commit=start
        )
    alice.create_tag("alice/net", tag="v1", revision=first.oid)
    alice.create_branch("alice/net", branch="dev")
    with pytest.raises(HfHubHTTPError, match="409"):
        alice.create_branch("alice/net", branch="dev")
    operations = [CommitOperationDelete("old/", is_folder=True), CommitOperationDelete("a.txt")]
    alice.create_commit("alice/net", operations, commit_message="less", revision="dev")
    pull = alice.upload_file(
        repo_id="alice/net", path_in_repo="p.txt", path_or_fileobj=b"p", create_pr=True, commit_message="please"
    )
    assert pull.pr_num == 1
    files = {name: set(alice.list_repo_files("alice/net", revision=name)) for name in ("v1", "dev", "refs/pr/1")}
    assert files["v1"] == {".gitattributes", "a.txt", "old/b.txt", "old/c.txt", "w.bin"}
    assert files["dev"] == {".gitattributes", "w.bin"}
    assert files["refs/pr/1"] == {*files["v1"], "p.txt"}
    references = alice.list_repo_refs("alice/net", include_pull_requests=True)
    assert {branch.name for branch in references.branches} == {"main", "dev"}
    assert [tag.target_commit for tag in references.tags] == [first.oid]
    assert [pr.ref for pr in references.pull_requests] == ["refs/pr/1"]
    alice.delete_tag("alice/net", tag="v1")
    alice.delete_branch("alice/net", branch="dev")
    assert set(hub.find("alice/net").revisions) == {"main", "refs/pr/1"}
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token="hf_bob").delete_repo("alice/none")
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(token="hf_bob").upload_file(repo_id="alice/net", path_in_repo="x", path_or_fileobj=b"x")
    alice.update_repo_settings("alice/net", gated="manual")
    assert alice.model_info("alice/net").gated == "manual"
    alice.delete_repo("alice/net")
    assert not alice.repo_exists("alice/net")


def test_a_large_file_is_uploaded_in_parts_and_a_broken_upload_is_refused(tmp_path):
    data = os.urandom(2 * MIB + 5)
    with HubServer(multipart=MIB) as hub:
        api = HfApi(endpoint=hub.url, token=ALICE)
        api.create_repo("alice/parts", repo_type="dataset")
        wanted = {"repo_id": "alice/parts", "repo_type": "dataset", "path_in_repo": "x.parquet"}
        api.upload_file(path_or_fileobj=data, **wanted)
        assert sum("/part/" in request for request in hub.requests) == 3
        path = hf_hub_download(
            "alice/parts", "x.parquet", repo_type="dataset", endpoint=hub.url, cache_dir=tmp_path, token=False
        )
        assert Path(path).read_bytes() == data
        url = f"{hub.url}/lfs-store/{'0' * 64}"
        request = urllib.request.Request(url, data=b"other bytes", method="PUT")
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(request)
        assert hub.crashes == []


def test_a_dataset_is_pushed_and_loaded_by_id_whole_and_streaming(hub, alice, tmp_path):
    rows = {"number": list(range(30)), "name": [f"row {index}" for index in range(30)]}
    Dataset.from_dict(rows).push_to_hub("alice/numbers", token=ALICE, num_shards=3)
    assert (
        len([name for name in alice.list_repo_files("alice/numbers", repo_type="dataset") if ".parquet" in name]) == 3
    )
    loaded = load_dataset("alice/numbers", split="train", cache_dir=tmp_path)
    assert loaded.to_dict() == rows
    streamed = load_dataset("alice/numbers", split="train", streaming=True)
    assert [row["number"] for row in streamed] == rows["number"]
    assert hub.find("alice/numbers", "dataset").head.author == "alice"


# models of the libraries, by id


def test_timm_and_transformers_load_their_models_by_id(hub, api, tmp_path):
    import timm
    from transformers import AutoModel, BertConfig, BertModel

    net = timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(4, 8, 8, 8), stem_width=4, num_classes=3)
    timm.models.save_for_hf(net, tmp_path / "net", safe_serialization=True)
    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    bert.save_pretrained(tmp_path / "bert")
    for name in ("net", "bert"):
        hub.add(f"org/{name}", {path.name: path for path in (tmp_path / name).iterdir()})
    for prefix in ("hf-hub:", "hf_hub:"):
        loaded = timm.create_model(f"{prefix}org/net", pretrained=True)
        assert torch.equal(loaded.state_dict()["fc.weight"], net.state_dict()["fc.weight"])
    old, state = hub.find("org/bert").commit, bert.state_dict()
    bert.embeddings.word_embeddings.weight.data.zero_()
    bert.save_pretrained(tmp_path / "new")
    hub.add("org/bert", {path.name: path for path in (tmp_path / "new").iterdir()})
    name = "embeddings.word_embeddings.weight"
    assert not AutoModel.from_pretrained("org/bert").state_dict()[name].any()
    before = AutoModel.from_pretrained("org/bert", revision=old).state_dict()[name]
    assert before.any() and before.shape == state[name].shape
    assert sorted(hub.downloaded("org/bert")) == ["config.json", "model.safetensors"]


# the server as a process of its own


def test_another_process_seeds_spoils_and_reads_the_log(tmp_path):
    script = Path(__file__).parent / "hub_server.py"
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().strip()

            def control(method: str, route: str, **body):
                data = json.dumps(body).encode() if body else None
                request = urllib.request.Request(f"{url}/__test__/{route}", data=data, method=method)
                with urllib.request.urlopen(request) as answer:
                    return json.load(answer)

            (tmp_path / "w.bin").write_bytes(b"weights")
            files = {"a.txt": "text", "b.bin": {"base64": "AAE="}, "w.bin": {"path": str(tmp_path / "w.bin")}}
            commit = control("POST", "add", repo_id="org/net", files=files, downloads=3)["commit"]
            control("POST", "faults", match="GET /org/net", status=418)
            assert get(f"{url}/org/net/resolve/main/b.bin")[0] == 418
            assert get(f"{url}/org/net/resolve/{commit}/b.bin")[1] == b"\0\1"
            assert get(f"{url}/org/net/resolve/main/w.bin")[1] == b"weights"
            assert [fault["fired"] for fault in control("GET", "faults")] == [1]
            assert control("POST", "move", repo_id="org/net")["commit"] != commit
            log = control("GET", "log")
            assert [entry["status"] for entry in log["log"]] == [418, 200, 200] and log["crashes"] == []
            assert log["totals"]["bytes"] == 2 + 7 + len('{"error": "failure on request of the test"}')
            control("POST", "reset")
            assert get(f"{url}/api/models")[1] == b"[]"
        finally:
            process.terminate()
