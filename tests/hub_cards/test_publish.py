"""Publishing to the Hub and loading back by id, through the real client and the real command."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import datasets
import pyarrow as pa
import pytest
import timm
import torch
from command_line import hf_wsl
from fresh_process import run_fresh
from huggingface_hub import ModelCard
from publish_fixtures import (
    WITHHELD,
    ZOO,
    change_json,
    make_anchor,
    make_backbone,
    make_dataset,
    make_generated,
)
from safetensors.torch import save
from transformers import AutoModel, PreTrainedModel

from datasets_scripts.collect.collect import collect
from datasets_scripts.collect.config import CollectConfig
from hub_cards.errors import PublishError, UploadError
from hub_cards.publication import CHANGED, NEW, OUTDATED, STAGING, UNCHANGED, readable_size
from hub_cards.publish import plan_publication, publish
from modeling_wsl import WSLConfig, WSLFeatureExtractor, WSLForPreTraining
from modeling_wsl.generation.generated_model import GeneratedModel
from modeling_wsl.generation.targets import resolve_target
from modeling_wsl.hub_card import is_ours
from modeling_wsl.remote_code import code_files


@pytest.fixture(autouse=True)
def alice(monkeypatch):
    """Logged in as alice, who may write to `alice` and `org`."""
    monkeypatch.setenv("HF_TOKEN", "hf_alice")


@pytest.fixture(scope="module")
def made_dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("publish"))


@pytest.fixture(scope="module")
def made_backbone(made_dataset):
    return make_backbone(made_dataset.parent, made_dataset)


@pytest.fixture(scope="module")
def anchor_files(tmp_path_factory):
    return make_anchor(tmp_path_factory.mktemp("anchor"))


@pytest.fixture
def dataset(made_dataset, tmp_path):
    return shutil.copytree(made_dataset, tmp_path / "tokens")


@pytest.fixture
def backbone(made_backbone, tmp_path):
    return shutil.copytree(made_backbone, tmp_path / "backbone")


@pytest.fixture
def generated(hub, backbone, anchor_files, tmp_path):
    hub.add("lab/anchor", anchor_files)
    return make_generated(backbone, "lab/anchor", tmp_path / "generated")


def files_of(hub, repo_id, repo_type="model", revision="main"):
    """Contents of a repository on the tests' Hub, by path."""
    return {path: file.read() for path, file in hub.find(repo_id, repo_type).at(revision).files.items()}


def sent_by(hub):
    """How many large files' bytes were put on the Hub."""
    return [request for request in hub.requests if request.startswith("PUT /lfs-store/")]


def commits_of(hub, repo_id, repo_type="model"):
    return [commit.title for commit in hub.find(repo_id, repo_type).commits.values()]


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- datasets


def test_a_dataset_is_published_without_the_weights_that_may_not_be_shared_and_loads_back(hub, dataset, monkeypatch):
    before = snapshot(dataset)
    here = {name: datasets.load_dataset(str(dataset), name) for name in ("windows", "models")}
    result = publish(dataset, "org/tokens")
    assert result.commit_url.startswith(f"{hub.url}/datasets/org/tokens/commit/")
    assert set(result.plan.publication.withheld) == set(WITHHELD)
    assert snapshot(dataset) == before  # the dataset here is whole, and nothing is left beside it

    there = {name: datasets.load_dataset("org/tokens", name) for name in ("windows", "models")}
    for split, rows in here["windows"].items():
        kept = rows.filter(lambda row: row["model_id"] not in WITHHELD)
        assert len(kept) < len(rows) or split == "validation"
        assert there["windows"][split].features == rows.features
        assert there["windows"][split].to_list() == kept.to_list()
    assert not set(there["windows"]["train"]["model_id"]) & set(WITHHELD)
    assert not [name for name in files_of(hub, "org/tokens", "dataset") if "-local-" in name]
    for split, rows in here["models"].items():  # all models are listed, with whether their weights may be passed on
        assert there["models"][split].to_list() == rows.to_list()
    hidden = {row["model_id"] for rows in there["models"].values() for row in rows if not row["redistributable"]}
    assert hidden >= set(WITHHELD)
    reasons = result.plan.publication.withheld
    assert "cc-by-nc-nd-4.0 does not let others share adapted copies" in reasons["cyd-net"]
    assert "no license is stated" in reasons["dan-net"]
    assert "has the weights of cyd-net, bit for bit" in reasons["eve-copy-of-cyd"]


def test_card_picture_and_report_of_a_published_dataset_are_those_of_what_is_in_it(hub, dataset):
    withheld = publish(dataset, "org/tokens").plan.publication.withheld
    files = files_of(hub, "org/tokens", "dataset")
    card = files["README.md"].decode()
    front = ModelCard(card).data.to_dict()
    assert front["license"] == ["apache-2.0", "cc-by-nc-4.0", "mit"]
    assert "The weights of 3 trained neural networks" in card
    assert 'load_dataset("org/tokens", "windows"' in card
    for name, reason in withheld.items():
        assert f"| {name} | {reason} |" in card
    counts = json.loads(files["tokenize.json"])["counts"]
    rows = datasets.load_dataset("org/tokens", "windows")
    assert (counts["accepted"], counts["withheld"]) == (3, 3)
    assert counts["num_windows"] == sum(len(split) for split in rows.values())
    assert counts["num_tokens"] == sum(sum(split["num_tokens"]) for split in rows.values())
    assert counts["tokens_by_split"] == {name: sum(split["num_tokens"]) for name, split in rows.items()}
    assert files["composition.png"] != (dataset / "composition.png").read_bytes()


def test_the_properties_of_a_zoo_are_published_as_they_are(hub, tmp_path):
    splits = dict(zip(ZOO, ("train", "test", "train", "validation", "train", "train"), strict=True))
    columns = {"model_id": list(splits), "split": list(splits.values()), "test_accuracy": [0.1 * i for i in range(6)]}
    dataset = make_dataset(tmp_path, properties=pa.table(columns))
    here = datasets.load_dataset(str(dataset), "properties")
    publish(dataset, "org/tokens")
    there = datasets.load_dataset("org/tokens", "properties")
    assert {split: rows.to_list() for split, rows in there.items()} == {s: rows.to_list() for s, rows in here.items()}
    models = datasets.load_dataset("org/tokens", "models")
    assert there["train"]["model_id"] == models["train"]["model_id"]
    tokens = {
        split: sum(row["num_tokens"] for row in rows if row["model_id"] not in WITHHELD)
        for split, rows in models.items()
    }
    counts = json.loads(files_of(hub, "org/tokens", "dataset")["tokenize.json"])["counts"]
    assert counts["tokens_by_split"] == tokens and tokens["validation"] == 0
    assert set(datasets.load_dataset("org/tokens", "windows")) == {"train", "test"}
    (dataset / "properties" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(PublishError, match="5 rows of properties are there, and 6 should be"):
        publish(dataset, "org/tokens")


def test_parquet_files_go_as_they_are_and_those_of_withheld_models_stay_here(hub, dataset):
    publish(dataset, "org/tokens")
    files = files_of(hub, "org/tokens", "dataset")
    parquet = {path.relative_to(dataset).as_posix(): path for path in dataset.rglob("*.parquet")}
    stay = {name for name in parquet if "-local-" in name}
    assert stay and {name for name in files if name.endswith(".parquet")} == set(parquet) - stay
    for name in set(parquet) - stay:
        assert files[name] == parquet[name].read_bytes()
    plan = plan_publication(dataset, "org/tokens")
    assert "windows/" not in plan.publication.left  # only some of it stays, and the plan says of which models


def test_a_dataset_whose_families_have_files_of_their_own_keeps_its_configs(hub, tmp_path):
    dataset = make_dataset(tmp_path, split_files_by_family=True, max_shard_size="1MB")
    publish(dataset, "org/tokens")
    rows = datasets.load_dataset("org/tokens", "windows-unknown", split="train")
    assert rows.to_list() == datasets.load_dataset("org/tokens", "windows", split="train").to_list()
    assert not set(rows["model_id"]) & set(WITHHELD)


def test_a_dataset_that_may_be_shared_whole_is_published_file_by_file(hub, tmp_path):
    dataset = make_dataset(tmp_path, {"ada-net": "mit", "bob-net": "apache-2.0"}, max_shard_size="1MB")
    plan = plan_publication(dataset, "org/tokens")
    assert not plan.publication.withheld
    publish(dataset, "org/tokens")
    files = files_of(hub, "org/tokens", "dataset")
    for path in dataset.rglob("*.parquet"):
        assert files[path.relative_to(dataset).as_posix()] == path.read_bytes()
    assert all(all(rows["redistributable"]) for rows in datasets.load_dataset("org/tokens", "models").values())


def test_a_collected_dataset_is_published_with_the_story_of_its_collection(hub, tmp_path):
    for number, license in enumerate(("mit", "apache-2.0", "llama3")):
        weights = save({"layer.weight": torch.randn(20, 30, generator=torch.Generator().manual_seed(number))})
        card = f"---\nlicense: {license}\npipeline_tag: image-classification\n---\n"
        hub.add(f"lab{number}/net", {"model.safetensors": weights, "README.md": card})
    config = CollectConfig(
        tasks="image-classification", num_train=3, num_validation=0, check="readable", token_size=16
    )
    collect(tmp_path / "tokens", config)
    result = publish(tmp_path / "tokens", "org/tokens")
    assert list(result.plan.publication.withheld) == ["lab2/net"]
    assert result.plan.publication.notes == ()  # the card here is told to be the run's own
    files = files_of(hub, "org/tokens", "dataset")
    assert "hf-wsl collect --output_dir DIR" in files["README.md"].decode()
    assert json.loads(files["tokenize.json"])["outcomes"] == {"accepted": 2, "withheld": 1}
    assert set(datasets.load_dataset("org/tokens", "windows", split="train")["model_id"]) == {"lab0/net", "lab1/net"}


def test_a_dataset_s_own_card_keeps_its_text_and_gets_a_front_matter_that_fits(hub, dataset):
    own = (dataset / "README.md").read_text().replace("# Tokenized model weights", "# Our lab's models\n\nThanks!")
    (dataset / "README.md").write_text(own)
    result = publish(dataset, "org/tokens")
    assert any("your own" in note for note in result.plan.publication.notes)
    card = files_of(hub, "org/tokens", "dataset")["README.md"].decode()
    assert "# Our lab's models\n\nThanks!" in card
    assert (dataset / "README.md").read_text() == own
    assert set(datasets.load_dataset("org/tokens", "models")) == {"train", "validation"}


# --- backbones


def test_a_published_backbone_loads_by_id_with_the_library_and_without_it(hub, backbone, tmp_path):
    result = hf_wsl("publish", backbone, "org/backbone", "--license", "apache-2.0", "--yes")
    assert result.exit_code == 0, result.output
    assert f"{hub.url}/org/backbone/commit/" in result.output
    tokens = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(0))
    expected = AutoModel.from_pretrained(backbone).eval()(tokens).latents
    script = """
import sys
sys.modules["modeling_wsl"] = None  # makes every import of the library fail, installed or not
import torch
from transformers import AutoFeatureExtractor, AutoModel, pipeline
trust = {"trust_remote_code": True}
tokens = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(0))
remote = AutoModel.from_pretrained("org/backbone", **trust).eval()
assert type(remote).__module__.startswith("transformers_modules."), type(remote)
assert AutoFeatureExtractor.from_pretrained("org/backbone", **trust).token_size == 24
embedding = pipeline("weight-embedding", model="org/backbone", **trust)({"w": torch.ones(8, 24)})["embedding"]

del sys.modules["modeling_wsl"]
import modeling_wsl
model = AutoModel.from_pretrained("org/backbone").eval()
assert type(model) is modeling_wsl.WSLModel
assert type(AutoFeatureExtractor.from_pretrained("org/backbone")) is modeling_wsl.WSLFeatureExtractor
latents = {"remote": remote(tokens).latents.detach(), "library": model(tokens).latents.detach()}
torch.save({**latents, "embedding": torch.as_tensor(embedding)}, sys.argv[1])
"""
    run_fresh(script, tmp_path / "found.pt", folder=tmp_path, HF_HOME=str(tmp_path / "home"))
    found = torch.load(tmp_path / "found.pt")
    torch.testing.assert_close(found["remote"], expected)
    torch.testing.assert_close(found["library"], expected)
    assert found["embedding"].shape == (8,)


def test_a_backbone_goes_up_without_checkpoints_and_without_the_publisher_s_folders(hub, backbone):
    result = publish(backbone, "org/backbone", license="apache-2.0")
    files = files_of(hub, "org/backbone")
    expected = {"config.json", "preprocessor_config.json", "model.safetensors", "training_facts.json", "README.md"}
    code = {name for name in files if name.endswith(".py")}
    assert set(files) - code == {*expected, ".gitattributes"}
    assert {"wsl.py", "generation_draws.py"} <= code <= set(code_files())  # what only commands use is not reached
    assert {"checkpoint-2/", "checkpoint-4/", "metrics.jsonl"} <= set(result.plan.publication.left)
    training = json.loads((backbone / "training_facts.json").read_text())
    assert os.path.isabs(training["config"]["dataset"])
    published = json.loads(files["training_facts.json"])
    assert published["config"]["dataset"] == "tokens"
    assert published["val_r2_history"] == training["val_r2_history"]
    for content in files.values():
        assert str(backbone.parent).encode() not in content


def test_a_backbone_s_card_has_the_figures_of_its_run_and_the_licenses_of_its_training_models(hub, backbone):
    publish(backbone, "org/backbone", license="apache-2.0")
    card = files_of(hub, "org/backbone")["README.md"].decode()
    assert is_ours(card)
    assert (backbone / "README.md").read_text() == card
    training = json.loads((backbone / "training_facts.json").read_text())
    found = {result.metric_name: result.metric_value for result in ModelCard(card).data.eval_results}
    assert found["PCA of the same size (baseline)"] == pytest.approx(training["baselines"]["PCA"], abs=1e-5)
    assert found["backbone, these weights (step 4)"] == pytest.approx(training["val_r2"], abs=1e-5)
    for line in ("| MIT | 2 |", "| cc-by-nc-nd-4.0 | 1 |", "| not stated | 1 |"):
        assert line in card


def test_a_backbone_trained_on_a_dataset_of_the_hub_links_it_at_its_commit(hub, dataset, tmp_path):
    commit = publish(dataset, "org/tokens").commit_url.rsplit("/", 1)[1]
    backbone = make_backbone(tmp_path, "org/tokens")
    with pytest.raises(PublishError, match="apache-2.0, cc-by-nc-4.0, mit. Say under which one"):
        publish(backbone, "org/backbone")  # those that the dataset's card lists
    publish(backbone, "org/backbone", license="cc-by-nc-4.0")
    card = ModelCard(files_of(hub, "org/backbone")["README.md"].decode())
    assert "are under these licenses: apache-2.0, cc-by-nc-4.0, mit." in card.text
    assert card.data.datasets == ["org/tokens"]
    assert {result.dataset_revision for result in card.data.eval_results} == {commit}
    assert card.data.license == "cc-by-nc-4.0"


def test_code_of_an_older_version_is_removed_from_the_repository_and_strangers_files_stay(hub, backbone):
    hub.add(
        "org/backbone", {"old_module.py": "x = 1", "model-00001-of-00002.safetensors": b"old", "notes.txt": "mine"}
    )
    plan = plan_publication(backbone, "org/backbone", license="mit")
    assert {c.path for c in plan.of_state(OUTDATED)} == {"old_module.py", "model-00001-of-00002.safetensors"}
    publish(backbone, "org/backbone", license="mit")
    assert "notes.txt" in files_of(hub, "org/backbone")
    assert not {"old_module.py", "model-00001-of-00002.safetensors"} & set(files_of(hub, "org/backbone"))


# --- generated models


def test_a_published_generated_model_loads_in_timm_by_id_and_names_what_it_was_made_of(hub, generated):
    result = hf_wsl("publish", generated, "org/made", "--license", "cc-by-sa-4.0", answers="y\n")
    assert result.exit_code == 0, result.output
    assert "license: cc-by-sa-4.0" in result.output
    model = timm.create_model("hf-hub:org/made", pretrained=True)
    expected = timm.create_model(f"local-dir:{generated}", pretrained=True).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    files = files_of(hub, "org/made")
    assert set(files) == {"README.md", ".gitattributes", "config.json", "model.safetensors", "provenance.json"}
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == ["lab/anchor"]
    assert (card.data.library_name, card.data.pipeline_tag) == ("timm", "image-classification")
    assert "[lab/anchor](https://huggingface.co/lab/anchor) | commit" in card.text
    assert "| sampled | drawn by the backbone |" in card.text
    provenance = json.loads(files["provenance.json"])
    assert provenance["backbone"]["name"] == "backbone"
    assert provenance["tensors"] == json.loads((generated / "provenance.json").read_text())["tensors"]


def test_a_generated_model_s_license_is_the_one_that_all_its_parts_share_or_the_publisher_s_word(
    hub, backbone, anchor_files
):
    hub.add("lab/anchor", anchor_files)
    publish(backbone, "org/backbone", license="cc-by-nc-4.0")
    made = make_generated("org/backbone", "lab/anchor", backbone.parent / "made")
    with pytest.raises(PublishError, match="its anchors and backbone: cc-by-nc-4.0, cc-by-sa-4.0. .*--license ID"):
        plan_publication(made, "org/made")
    assert plan_publication(made, "org/made", license="cc-by-nc-sa-4.0").publication.license == "cc-by-nc-sa-4.0"
    publish(backbone, "org/backbone", license="cc-by-sa-4.0")
    made = make_generated("org/backbone", "lab/anchor", backbone.parent / "again")
    assert plan_publication(made, "org/made").publication.license == "cc-by-sa-4.0"


def test_what_was_made_of_an_anchor_that_may_not_be_passed_on_stays_here_whatever_license_is_given(
    hub, backbone, anchor_files
):
    card = anchor_files["README.md"].replace("cc-by-sa-4.0", "cc-by-nc-nd-4.0")
    hub.add("lab/anchor", {**anchor_files, "README.md": card})
    made = make_generated(backbone, "lab/anchor", backbone.parent / "made")
    with pytest.raises(PublishError, match="lab/anchor: license cc-by-nc-nd-4.0 does not let others share"):
        publish(made, "org/made", license="cc-by-nc-nd-4.0")
    assert hub.find("org/made") is None


def test_push_to_hub_of_a_generated_model_uploads_what_save_pretrained_writes(hub):
    state = {"weight": torch.arange(6.0).reshape(2, 3)}
    model = GeneratedModel(state, {"tensors": {"weight": "sampled"}}, resolve_target(state))
    commit = model.push_to_hub("org/pushed", private=True, commit_message="Mine")
    assert commit.commit_url.startswith(f"{hub.url}/org/pushed/commit/")
    assert set(files_of(hub, "org/pushed")) == {".gitattributes", "model.safetensors", "provenance.json"}
    assert hub.find("org/pushed").private
    assert "Mine" in commits_of(hub, "org/pushed")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained", "save_pretrained onto an earlier save"])
def test_whatever_is_pushed_takes_the_code_along_that_it_needs_without_the_library(hub, name, way, tmp_path):
    config = WSLConfig(token_size=16, window_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    pushed = WSLForPreTraining(config) if name == "model.safetensors" else config
    if name == "preprocessor_config.json":
        pushed = WSLFeatureExtractor(token_size=16)
    if way == "push_to_hub":
        pushed.push_to_hub("org/pushed")
    else:
        if "earlier" in way:
            pushed.save_pretrained(tmp_path / "saved")
        pushed.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="org/pushed")
    files = files_of(hub, "org/pushed")
    assert {name, *code_files()} <= set(files)
    for path, text in code_files().items():
        assert files[path] == text.encode()


# --- what is sent, and what is not


def test_nothing_is_sent_twice_and_a_change_sends_what_changed(hub, backbone):
    publish(backbone, "org/backbone", license="mit")
    before = commits_of(hub, "org/backbone")
    hub.clear_log()
    again = publish(backbone, "org/backbone", license="mit")
    assert again.sent == ()
    assert {c.state for c in again.plan.changes} == {UNCHANGED}
    assert not [request for request in hub.requests if not request.startswith(("GET", "HEAD"))]
    assert commits_of(hub, "org/backbone") == before
    assert again.commit_url.endswith(hub.find("org/backbone").commit)

    changed = publish(backbone, "org/backbone", license="apache-2.0")
    assert changed.sent == ("README.md",)
    assert sent_by(hub) == []


@pytest.mark.parametrize("failing", [r"POST /api/datasets/org/tokens/commit/", r"PUT /lfs-store/"])
def test_an_upload_that_fails_goes_on_with_what_is_missing(hub, dataset, failing):
    total = [c for c in plan_publication(dataset, "org/tokens").changes if c.path.endswith((".parquet", ".png"))]
    commit = failing.startswith("POST")
    fault = hub.fault(failing, skip=0 if commit else 3, times=1 if commit else -1, status=503 if commit else 400)
    with pytest.raises(UploadError, match="Run the same command again: what has arrived is not sent again"):
        publish(dataset, "org/tokens")
    assert fault.fired
    first = {f"PUT {entry.path}" for entry in hub.log if entry.path.startswith("/lfs-store/") and entry.status == 200}
    assert len(first) == (len(total) if commit else 3)
    assert files_of(hub, "org/tokens", "dataset").keys() == {".gitattributes"}
    fault.times = 0
    hub.clear_log()
    publish(dataset, "org/tokens")
    second = sent_by(hub)
    assert not first & set(second)
    assert len(first) + len(second) == len(total)
    assert len(commits_of(hub, "org/tokens", "dataset")) == 2  # the one that made it, and one with all files
    assert datasets.load_dataset("org/tokens", "windows", split="train")
    assert not (dataset / STAGING).exists()


@pytest.mark.slow
def test_a_killed_command_goes_on_with_what_is_missing(hub, dataset):
    fault = hub.fault(r"PUT /lfs-store/", skip=3, times=-1, delay=4)
    command = [sys.executable, "-m", "hf_wsl.cli", "publish", str(dataset), "org/tokens", "--yes"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def arrived() -> set[str]:
        return {f"PUT {entry.path}" for entry in hub.log if entry.method == "PUT" and entry.status == 200}

    while not fault.fired or len(arrived()) < 3:  # they run side by side: the one held up may be earlier
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    fault.times = 0
    assert (dataset / STAGING).is_dir()
    assert hub.find("org/tokens", "dataset").files.keys() == {".gitattributes"}
    before = arrived()
    assert len(before) == 3
    hub.clear_log()
    publish(dataset, "org/tokens")
    assert sent_by(hub)
    assert not before & set(sent_by(hub))
    assert datasets.load_dataset("org/tokens", "windows", split="train")
    assert not (dataset / STAGING).exists()


def test_a_new_version_of_a_repository_appears_in_one_commit_with_outdated_files_gone(hub, dataset, tmp_path):
    publish(dataset, "org/tokens")
    count = len(commits_of(hub, "org/tokens", "dataset"))
    other = make_dataset(tmp_path / "other", {"gil-net": "mit", "hal-net": "mit"}, max_shard_size="1MB")
    publish(other, "org/tokens")
    assert len(commits_of(hub, "org/tokens", "dataset")) == count + 1
    rows = datasets.load_dataset("org/tokens", "windows")
    assert {name for split in rows.values() for name in split["model_id"]} == {"gil-net", "hal-net"}
    assert "bob-net" not in datasets.load_dataset("org/tokens", "models")["train"]["model_id"]


# --- the plan


def test_the_plan_is_shown_before_anything_is_done_and_a_dry_run_or_a_no_does_nothing(hub, dataset):
    before = snapshot(dataset)
    for options in (["--dry-run"], []):
        result = hf_wsl("publish", dataset, "org/tokens", "--private", *options, answers="n\n")
        assert result.exit_code == 0, result.output
        for line in (
            f"to {hub.url}/datasets/org/tokens (dataset, private, will be made)",
            "license: apache-2.0, cc-by-nc-4.0, mit",
            "withheld: dan-net: no license is stated",
            "files to send",
        ):
            assert line in result.output
        assert re.search(r"new +windows/train-00000-of-0000\d.parquet +[\d.]+ kB", result.output)
        assert snapshot(dataset) == before
        assert hub.find("org/tokens", "dataset") is None
        assert not [request for request in hub.requests if not request.startswith(("GET", "HEAD"))]


def test_the_plan_tells_new_changed_and_unchanged_files_apart(hub, backbone):
    publish(backbone, "org/backbone", license="mit")
    change_json(backbone / "training_facts.json", seed=99)
    (backbone / "LICENSE").write_text("MIT License")
    plan = plan_publication(backbone, "org/backbone", license="mit")
    assert [c.path for c in plan.of_state(NEW)] == ["LICENSE"]
    assert {c.path for c in plan.of_state(CHANGED)} == {"training_facts.json", "README.md"}
    assert "exists" in plan.lines()[1]
    assert [readable_size(n) for n in (7, 999, 1234, 56_700_000, 3 * 10**12)] == [
        "7 B",
        "999 B",
        "1.2 kB",
        "56.7 MB",
        "3,000.0 GB",
    ]


def test_private_branch_and_pull_request_are_what_was_asked_for(hub, backbone):
    publish(backbone, "org/backbone", license="mit", private=True, revision="v1", message="First")
    repository = hub.find("org/backbone")
    assert repository.private
    assert "model.safetensors" in files_of(hub, "org/backbone", revision="v1")
    assert "model.safetensors" not in files_of(hub, "org/backbone")
    assert "First" in commits_of(hub, "org/backbone")
    result = publish(backbone, "org/backbone", license="mit", create_pr=True)
    assert result.pull_request_url.endswith("/discussions/1")
    assert "model.safetensors" not in files_of(hub, "org/backbone")
    with pytest.raises(PublishError, match="revision or create_pr, not both"):
        publish(backbone, "org/backbone", license="mit", create_pr=True, revision="v1")


def test_a_card_of_one_s_own_is_kept_here_and_there(hub, backbone):
    own = "---\nlicense: mit\n---\n\n# Ours\n"
    (backbone / "README.md").write_text(own)
    result = publish(backbone, "org/backbone", license="mit")
    assert "README.md is your own" in " ".join(result.plan.publication.notes)
    assert files_of(hub, "org/backbone")["README.md"].decode() == own == (backbone / "README.md").read_text()
    (backbone / "README.md").unlink()
    result = publish(backbone, "org/backbone", license="mit")
    assert "README.md on the Hub is somebody's own" in " ".join(result.plan.publication.notes)
    assert files_of(hub, "org/backbone")["README.md"].decode() == own


def test_a_backbone_pushed_from_python_has_a_card_without_blanks_until_publishing_writes_a_better_one(hub, backbone):
    model = AutoModel.from_pretrained(backbone)
    model.push_to_hub("org/backbone")
    card = files_of(hub, "org/backbone")["README.md"].decode()
    assert "[More Information Needed]" not in card and f"{model.num_parameters():,} parameters" in card
    assert is_ours(card)
    model.push_to_hub("org/backbone")
    assert files_of(hub, "org/backbone")["README.md"].decode() == card
    hub.add("org/own", {"README.md": "---\nlicense: mit\n---\n# Mine\n"})
    model.push_to_hub("org/own")
    assert "# Mine" in files_of(hub, "org/own")["README.md"].decode()
    publish(backbone, "org/backbone", license="mit")
    assert "## Evaluation" in files_of(hub, "org/backbone")["README.md"].decode()


def test_a_template_that_push_to_hub_left_there_is_replaced_and_one_here_is_refused(hub, backbone):
    PreTrainedModel.push_to_hub(AutoModel.from_pretrained(backbone), "org/backbone")
    template = files_of(hub, "org/backbone")["README.md"]
    assert b"[More Information Needed]" in template
    publish(backbone, "org/backbone", license="mit")
    assert is_ours(files_of(hub, "org/backbone")["README.md"].decode())
    (backbone / "README.md").write_bytes(template)
    with pytest.raises(PublishError, match="More Information Needed"):
        publish(backbone, "org/backbone", license="mit")
