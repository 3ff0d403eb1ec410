"""What is not published, and why: nothing is sent before everything has been checked."""

import shutil

import pyarrow.parquet as pq
import pytest
from command_line import hf_wsl
from publish_fixtures import change_json, make_anchor, make_backbone, make_dataset, make_generated

from hub_cards import upload
from hub_cards.errors import PublishError, UploadError
from hub_cards.publish import plan_publication, publish


@pytest.fixture(autouse=True)
def alice(monkeypatch):
    """Logged in as alice, who may write to `alice` and `org`."""
    monkeypatch.setenv("HF_TOKEN", "hf_alice")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a dataset, `tokens`, and a backbone trained on it."""
    folder = tmp_path_factory.mktemp("refused")
    make_backbone(folder, make_dataset(folder))
    return folder


@pytest.fixture
def dataset(made, tmp_path):
    return shutil.copytree(made / "tokens", tmp_path / "tokens")


@pytest.fixture
def backbone(made, tmp_path):
    return shutil.copytree(made / "backbone", tmp_path / "backbone")


def break_nothing(folder):
    shutil.rmtree(folder)


def keep_one_file(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "notes.txt").write_text("x")


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_architecture(folder):
    change_json(folder / "config.json", hidden_size=64)


def without(*names):
    def remove(folder):
        for name in names:
            (folder / name).unlink()

    return remove


def with_folder(name):
    return lambda folder: (folder / name).mkdir()


def interrupted(folder):
    change_json(folder / "training_facts.json", status="interrupted")


def truncated_facts(folder):
    (folder / "training_facts.json").write_text('{"status": "comp')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_nothing, "is no folder"),
        (keep_one_file, "is nothing that can be published"),
        (cut_weights, "is not complete"),
        (other_architecture, "in the weights and .* by config.json"),
        (without("model.safetensors"), "has no model.safetensors"),
        (without("preprocessor_config.json"), "cannot be read"),
        (without("training_facts.json"), "no training_facts.json"),
        (without("generation_draws.py"), "lacks code that others need"),
        (with_folder(".partial-model"), "which a run left that has not ended"),
        (interrupted, "interrupted at step 4"),
        (truncated_facts, "cannot be read"),
    ],
)
def test_a_backbone_that_is_not_whole_is_refused_before_anything_is_sent(hub, backbone, damage, message):
    damage(backbone)
    with pytest.raises(PublishError, match=message):
        publish(backbone, "org/backbone", license="mit")
    assert hub.find("org/backbone") is None


def test_checkpoints_and_folders_of_generated_models_are_refused_with_what_to_publish_instead(hub, backbone, tmp_path):
    with pytest.raises(PublishError, match="Publish the folder of its run"):
        publish(backbone / "checkpoint-4", "org/backbone")
    (tmp_path / "out" / "000").mkdir(parents=True)
    (tmp_path / "out" / "000" / "provenance.json").write_text("{}")
    with pytest.raises(PublishError, match="holds 1 generated models; a repository holds one"):
        publish(tmp_path / "out", "org/made")


def remove_window_file(folder):
    sorted((folder / "windows").iterdir())[0].unlink()


def cut_window_file(folder):
    path = sorted((folder / "windows").iterdir())[0]
    path.write_bytes(path.read_bytes()[:-20])


def drop_windows(folder):
    path = sorted((folder / "windows").iterdir())[0]
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)


def add_stranger(folder):
    (folder / "windows" / "train-copy.parquet").write_bytes(b"")


def misplace_local_windows(folder):
    local = sorted((folder / "windows").glob("*-local-*"))
    for path in [p for p in (folder / "windows").iterdir() if p not in local and p.name.startswith("train")]:
        path.unlink()
    for path in local:
        path.rename(path.with_name(path.name.replace("-local", "")))


def older_format(folder):
    change_json(folder / "tokenize.json", format=1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_window_file, r"of windows/train-\*.parquet \d of \d files are there"),
        (cut_window_file, "is damaged"),
        (drop_windows, "windows are there, and .* should be"),
        (add_stranger, "is none of the dataset's files"),
        (misplace_local_windows, "holds windows of a model that must not be passed on"),
        (older_format, "is of format 1"),
        (without("preprocessor_config.json"), "lacks preprocessor_config.json"),
        (with_folder(".tokenize"), "Run the same command again to finish it"),
    ],
)
def test_a_dataset_that_is_not_whole_is_refused_before_anything_is_sent(hub, dataset, damage, message):
    damage(dataset)
    with pytest.raises(PublishError, match=message):
        publish(dataset, "org/tokens")
    assert hub.find("org/tokens", "dataset") is None


def test_a_dataset_of_which_nothing_may_be_shared_is_refused(hub, tmp_path):
    dataset = make_dataset(tmp_path, {"ada-net": None, "bob-net": "cc-by-nd-4.0"})
    with pytest.raises(PublishError, match="no model.s weights may be shared; ada-net: no license"):
        publish(dataset, "org/tokens")


def test_a_license_is_asked_for_where_none_follows_and_refused_for_datasets(hub, dataset, backbone, tmp_path):
    hub.add("lab/anchor", make_anchor(tmp_path / "anchor"))
    generated = make_generated(backbone, "lab/anchor", tmp_path / "generated")
    with pytest.raises(PublishError, match="models it was trained on: .*MIT.*not stated.*--license ID"):
        publish(backbone, "org/backbone")
    with pytest.raises(PublishError, match="its anchors and backbone: cc-by-sa-4.0, not stated"):
        publish(generated, "org/made")
    with pytest.raises(PublishError, match="stay under their own licenses"):
        publish(dataset, "org/tokens", license="mit")


def test_accounts_names_and_visibility_are_checked_before_anything_is_read(hub, backbone, monkeypatch):
    def refused(repo_id, **options):
        with pytest.raises((PublishError, UploadError)) as error:
            publish(backbone, repo_id, license="mit", **options)
        return str(error.value)

    assert "names no owner" in refused("backbone")
    assert "is no name of a repository" in refused("org/back bone")
    assert "you are logged in as alice, who may write to alice, org" in refused("bob/backbone")
    assert "no pull request can be made" in refused("org/backbone", create_pr=True)
    hub.add("org/public", {"a.txt": "a"})
    assert "exists and is public" in refused("org/public", private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert "the token needs write access" in refused("reader/backbone")
    monkeypatch.setenv("HF_TOKEN", "nonsense")
    assert "hf auth whoami" in refused("org/backbone")
    monkeypatch.delenv("HF_TOKEN")
    assert "Nobody is logged in" in refused("org/backbone")


def test_a_repository_that_changes_meanwhile_is_left_alone(hub, backbone):
    publish(backbone, "org/backbone", license="mit")
    plan = plan_publication(backbone, "org/backbone", license="apache-2.0")
    hub.move("org/backbone")
    with pytest.raises(UploadError, match="somebody else changed the repository"):
        upload.carry_out(plan)
    publish(backbone, "org/backbone", license="apache-2.0")
    assert "moved.txt" in hub.find("org/backbone").files


def test_the_command_s_refusal_is_one_line(hub, tmp_path):
    refused = hf_wsl("publish", tmp_path, "org/x")
    assert refused.exit_code == 1 and refused.stderr.count("\n") == 1
    assert refused.stderr.startswith(f"error: {tmp_path} is nothing that can be published")
