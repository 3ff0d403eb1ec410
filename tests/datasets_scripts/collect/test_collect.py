"""A collection from a Hub of sixty mixed models: what is taken, what is refused and why, what the Hub is asked for."""

import datasets
import numpy as np
import pytest
import torch
from collect_fixtures import CONFIG, configured, hashes, model_rows, window_rows
from hub_models import mixed_models, seed_mixed
from hub_state import HubFile

from datasets_scripts.collect.collect import collect
from datasets_scripts.collect.plan import plan_collection
from datasets_scripts.model_task import feature_extractor
from datasets_scripts.outcomes import OUTCOMES, RefusedModel
from datasets_scripts.tokenize_config import TokenizeError
from hf_wsl.errors import RunError
from hf_wsl.options import nearest
from hf_wsl.run_folder import RunFolderError
from modeling_wsl.hub_card import is_ours


@pytest.fixture(scope="module")
def made(hub_server, tmp_path_factory):
    """The dataset of all sixty, the outcomes due, and the requests that it took."""
    hub_server.reset()
    expected = seed_mixed(hub_server)
    folder = tmp_path_factory.mktemp("collect") / "dataset"
    report = collect(folder, CONFIG)
    return folder, expected, report, list(hub_server.log)


def outcomes_of(folder, names) -> list[str]:
    rows = model_rows(folder)
    return [rows[name]["outcome"] for name in names]


def test_every_model_gets_the_outcome_it_deserves(made):
    folder, expected, report, _ = made
    rows = model_rows(folder)
    assert {name: row["outcome"] for name, row in rows.items()} == expected
    assert set(expected.values()) <= set(OUTCOMES)
    assert sum(report.outcomes.values()) == len(expected) == 60
    assert all(row["reason"] for row in rows.values() if row["status"] == "refused")
    assert all((row["split"] == "refused") == (row["status"] == "refused") for row in rows.values())
    assert rows["zz-backup/gpt2"]["reason"].startswith("has the weights of openai-community/gpt2-tiny")


def test_facts_come_from_config_card_and_tags(made):
    rows = model_rows(made[0])
    resnet, bert = rows["ada/resnet18-cifar10"], rows["google-bert/bert-tiny-uncased"]
    assert (resnet["family"], resnet["architecture"], resnet["library"]) == ("resnet", "resnet18", "timm")
    assert (resnet["task"], resnet["training_data"]) == ("image-classification", "cifar10")
    assert (resnet["owner"], resnet["license"], resnet["base_model"]) == ("ada", "apache-2.0", "timm/resnet18.a1_in1k")
    assert (bert["family"], bert["task"]) == ("language", "fill-mask")
    assert rows["lora-lab/bert-tiny-lora"]["base_model"] == "google-bert/bert-tiny-uncased"
    assert rows["timm/convnext_tiny.in12k_ft_in1k"]["family"] == "convnext"
    assert rows["strict/vit-nc-nd"]["license"] == "cc-by-nc-nd-4.0"


def test_windows_hold_the_weights_of_the_files(made, tmp_path):
    folder, expected, _, _ = made
    windows = window_rows(folder)
    by_id = {model.repo_id: model for model in mixed_models()}
    for name in ("timm/resnet18.a1_in1k", "ada/bert-tiny-sharded", "old-lab/vit-2020", "lora-lab/bert-tiny-lora"):
        place = tmp_path / name.replace("/", "--")
        place.mkdir()
        for path, file in by_id[name].files.items():
            (place / path).write_bytes(file.data)
        mine = sorted((w for w in windows if w["model_id"] == name), key=lambda w: w["window_index"])
        tokens = np.concatenate([np.array(window["tokens"], np.float16) for window in mine])
        assert torch.equal(torch.from_numpy(tokens), feature_extractor(CONFIG)(place)["tokens"].half())
    assert {window["model_id"] for window in windows} == {
        n for n, outcome in expected.items() if outcome == "accepted"
    }


def test_copies_and_owners_stay_on_one_side_and_the_counts_are_kept(made):
    rows = [row for row in model_rows(made[0]).values() if row["status"] == "accepted"]
    validation = [row for row in rows if row["split"] == "validation"]
    assert len(validation) == len(rows) * CONFIG.num_validation // CONFIG.num_models == 2
    for column in ("owner", "near_copy_group", "duplicate_group"):
        sides = {}
        for row in rows:
            sides.setdefault(row[column], set()).add(row["split"])
        assert all(len(split) == 1 for split in sides.values())
    groups = {row["model_id"]: row["near_copy_group"] for row in rows}
    assert groups["grace/resnet18-cifar10"] == groups["ada/resnet18-cifar10"] == "timm/resnet18.a1_in1k"
    assert groups["timm/resnet18.a2_in1k"] == "timm/resnet18.a2_in1k"


def test_it_loads_by_config_and_each_family_is_a_config(made):
    folder = str(made[0])
    whole = datasets.load_dataset(folder, "windows")
    assert sum(len(split) for split in whole.values()) == len(window_rows(made[0]))
    names = datasets.get_dataset_config_names(folder)
    assert {"windows", "models", "windows-resnet", "windows-vit", "windows-language"} <= set(names)
    resnets = datasets.load_dataset(folder, "windows-resnet")
    ids = {name for split in resnets.values() for name in split["model_id"]}
    families = {name: row["family"] for name, row in model_rows(made[0]).items() if row["status"] == "accepted"}
    assert ids == {name for name, family in families.items() if family == "resnet"}


def test_it_asks_for_no_more_than_it_needs(made):
    _, expected, _, log = made
    files = [(entry.path.split("/resolve/")[0].strip("/"), entry) for entry in log if "/resolve/" in entry.path]
    asked = {}
    for name, entry in files:
        asked.setdefault(name, []).append(entry)
    for name in ("lab/vit-gated", "lab/vit-disabled", "strict/vit-nc-nd", "other-formats/vit-onnx"):
        assert name not in asked
    assert not any(entry.path.endswith((".md", ".onnx", ".h5", ".gguf", ".py")) for _, entry in files)
    # a model that its header speaks against is never downloaded: its one request is that for the header
    for name in ("huge/gpt2", "careless/bert-missing", "careless/resnet-shape", "packed/vit-integers"):
        weights = [entry for entry in asked[name] if entry.path.endswith(".safetensors")]
        assert [entry.range for entry in weights] == [weights[0].range]
    copies = [entry for entry in asked["zoe-mirror/resnet18.a1_in1k"] if entry.path.endswith(".safetensors")]
    assert len(copies) == 1
    assert sum(entry.sent for entry in log) < 12_000_000


def test_nothing_is_left_beside_the_dataset(made):
    folder = made[0]
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["README.md", "composition.png", "models", "preprocessor_config.json", "tokenize.json", "windows"]
    )
    assert is_ours((folder / "README.md").read_text())


def test_a_finished_collection_is_recognized_without_asking_the_hub(hub, made):
    folder, _, first, _ = made
    before = hashes(folder)
    again = collect(folder, CONFIG)
    assert again.already_complete and again.outcomes == first.outcomes
    assert hub.requests == [] and hashes(folder) == before
    with pytest.raises(RunFolderError, match="differs: num_train was 90, now 80"):
        collect(folder, configured(num_train=80))


def test_it_stops_at_as_many_as_are_asked_for(hub, made, tmp_path):
    seed_mixed(hub)
    report = collect(tmp_path / "few", configured(num_train=8, num_validation=2))
    assert report.outcomes == {"accepted": 10}
    rows = model_rows(tmp_path / "few")
    assert set(rows) == {model.repo_id for model in mixed_models()[:10]}
    assert [row["split"] for row in rows.values()].count("validation") <= 2
    assert not hub.downloaded("microsoft/resnet-18")


def test_fewer_candidates_and_another_order_are_asked_for(hub, tmp_path):
    seed_mixed(hub)
    collect(tmp_path / "a", configured(max_candidates=4, tasks="image-classification"))
    assert len(model_rows(tmp_path / "a")) == 4
    for name in ("b", "c"):
        collect(tmp_path / name, configured(order="random", seed=3, num_train=4, num_validation=1))
    rows = model_rows(tmp_path / "b")
    assert hashes(tmp_path / "b") == hashes(tmp_path / "c")
    assert set(rows) != {model.repo_id for model in mixed_models()[: len(rows)]}
    collect(tmp_path / "d", configured(tasks="", author="ada"))
    assert {name.split("/")[0] for name in model_rows(tmp_path / "d")} == {"ada"}


def test_licenses_and_gated_models_can_be_asked_for(hub, tmp_path, monkeypatch):
    seed_mixed(hub)
    only = ["strict/vit-nc-nd", "lab/vit-gated", "mobile-lab/mobilenetv2_035.fp16_in1k", "old-lab/resnet18_2021"]
    collect(tmp_path / "a", configured(licenses="MIT, BSD-3-Clause"), only)
    assert outcomes_of(tmp_path / "a", only) == ["license", "gated", "accepted", "accepted"]
    collect(tmp_path / "b", configured(licenses="any", gated="try"), only[:2])
    assert outcomes_of(tmp_path / "b", only[:2]) == ["accepted", "gated"]


def test_gated_and_private_models_are_collected_with_a_token_that_may(hub, tmp_path, monkeypatch):
    seed_mixed(hub)
    model = mixed_models()[0]
    hub.add("org/gated", model.files, gated_to=("hf_reader",))
    hub.add("org/private", mixed_models()[1].files, private=True)
    names = ["org/gated", "org/private"]
    for token, outcomes in (("hf_reader", ["accepted", "vanished"]), ("hf_alice", ["accepted", "accepted"])):
        monkeypatch.setenv("HF_TOKEN", token)
        collect(tmp_path / token, configured(gated="try", tasks="", author="org"))
        rows = model_rows(tmp_path / token)
        assert [rows[name]["outcome"] if name in rows else "vanished" for name in names] == outcomes


def test_named_models_are_taken_at_their_revision(hub, tmp_path):
    model = mixed_models()[0]
    old = hub.add("org/net", model.files)
    new = hub.add("org/net", mixed_models()[1].files)
    collect(tmp_path / "a", CONFIG, [f"org/net@{old}"])
    collect(tmp_path / "b", CONFIG, ["org/net"])
    assert model_rows(tmp_path / "a")["org/net"]["revision"] == old
    assert model_rows(tmp_path / "b")["org/net"]["revision"] == new
    with pytest.raises(RefusedModel, match="org/nte: cannot be read any more"):
        collect(tmp_path / "c", CONFIG, ["org/nte"])
    with pytest.raises(TokenizeError, match="is a local model. `collect` reads the Hub"):
        collect(
            tmp_path / "d", CONFIG, [tmp_path / "a" / "windows" / next((tmp_path / "a" / "windows").iterdir()).name]
        )


def test_files_need_only_be_sound_where_nothing_is_to_be_loaded(hub, tmp_path):
    seed_mixed(hub)
    names = ["odd/remote-code", "nobody/flubber", "careless/bert-missing", "diverged/vit-nan"]
    collect(tmp_path / "a", configured(check="readable"), names)
    assert outcomes_of(tmp_path / "a", names) == ["accepted", "accepted", "accepted", "not_finite"]


def test_the_disk_that_weights_may_take_is_no_setting_of_the_dataset(hub, tmp_path):
    seed_mixed(hub)
    names = ["timm/resnet18.a1_in1k", "ada/bert-tiny-sharded"]
    much = collect(tmp_path / "much", configured(max_download="150KB"), names)
    # the first one is larger than a worker's share, and takes the half that one such model at a time may have
    little = collect(tmp_path / "little", configured(max_disk="300KB", max_download="150KB", num_workers=2), names)
    assert much.numbers() == little.numbers()
    assert window_rows(tmp_path / "much") == window_rows(tmp_path / "little")
    small = collect(tmp_path / "small", configured(max_download="80KB"), [*names, "google-bert/bert-tiny-uncased"])
    assert small.outcomes == {"too_large": 1, "accepted": 2}


def test_a_plan_reads_no_weights_and_writes_nothing(hub, tmp_path):
    expected = seed_mixed(hub)
    plan = plan_collection(CONFIG)
    assert (plan.listed, plan.sampled, plan.examined) == (60, 60, 60)
    told_by_weights = ("not_finite", "overflow", "duplicate")
    hidden = [name for name, outcome in expected.items() if outcome in told_by_weights] + ["evil/pickle"]
    accepted = [name for name, outcome in expected.items() if outcome == "accepted"]
    assert plan.outcomes["accepted"] == plan.downloaded == len(accepted) + len(hidden)
    sizes = {model.repo_id: model.files for model in mixed_models()}
    weights = sum(
        file.size
        for name in accepted + hidden
        for path, file in sizes[name].items()
        if path.endswith((".safetensors", ".bin"))
    )
    assert plan.download_bytes == weights
    assert plan.bytes_per_second > 0 and plan.hours > 0
    sample = plan_collection(CONFIG, sample_size=20)
    assert sample.sampled == 20 and "about" in "\n".join(sample.lines())


def test_options_that_cannot_work_are_refused_before_any_request(hub, tmp_path):
    for options, message in (
        ({"num_train": 0}, "num_train=0"),
        ({"max_download": "10GB", "max_disk": "15GB"}, "less than twice max_download"),
        ({"max_parameters": "many"}, "is not a count"),
        ({"tasks": "", "author": "", "search": "", "library": "", "tags": ""}, "Nothing is asked for"),
        ({"order": "size"}, "order='size' is not known"),
    ):
        with pytest.raises(TokenizeError, match=message):
            configured(**options)
    assert nearest("num_trian", ["num_train"]) == " Did you mean 'num_train'?"
    with pytest.raises(TokenizeError, match="The Hub lists no model for image-classification, author='nobody-here'"):
        collect(tmp_path / "x", configured(tasks="image-classification", author="nobody-here"))
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "thesis.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="holds other files"):
        collect(tmp_path / "y", CONFIG)


def test_a_hub_without_a_sound_model_leaves_the_reasons(hub, tmp_path):
    seed_mixed(hub)
    with pytest.raises(TokenizeError, match="None of the 1 models was accepted: 1 not_finite"):
        collect(tmp_path / "bad", CONFIG, ["diverged/vit-nan"])
    assert model_rows(tmp_path / "bad")["diverged/vit-nan"]["outcome"] == "not_finite"


def test_a_hub_that_goes_away_ends_the_run_and_it_is_gone_on_with(hub, made, tmp_path):
    seed_mixed(hub)
    outage = hub.fault(r"(GET|HEAD) /(?!__test__)(?!api/models\?)", times=-1, skip=40, drop=True)
    listing = hub.fault(r"GET /api/models\?limit=1$", times=-1, status=503)
    with pytest.raises(RunError, match="stopped answering"):
        collect(tmp_path / "out", CONFIG)
    assert listing.fired and outage.fired
    assert (tmp_path / "out" / ".tokenize").is_dir()
    hub.faults.clear()
    seed_mixed(hub)
    collect(tmp_path / "out", CONFIG)
    assert hashes(tmp_path / "out") == hashes(made[0])


def test_a_model_that_moves_on_is_taken_as_it_was_listed(hub, tmp_path):
    seed_mixed(hub)
    name = "timm/resnet18.a1_in1k"
    listed = hub.repositories[name].commit
    hub.fault(rf"GET /{name}/resolve", times=1, move=name)
    collect(tmp_path / "a", configured(num_train=1, num_validation=0))
    assert model_rows(tmp_path / "a")[name]["revision"] == listed != hub.repositories[name].commit


def test_a_model_that_vanishes_between_two_requests_is_a_row(hub, tmp_path):
    seed_mixed(hub)
    name = "timm/resnet18.a1_in1k"
    hub.fault(rf"GET /{name}/resolve", times=1, skip=1, remove=name)
    collect(tmp_path / "a", configured(num_train=1, num_validation=0))
    assert model_rows(tmp_path / "a")[name]["outcome"] == "vanished"


def test_sparse_tokens_and_float32_are_collected_too(hub, tmp_path):
    seed_mixed(hub)
    names = ["diverged/vit-1e6", "microsoft/resnet-18"]
    collect(tmp_path / "a", configured(dtype="float32", tokenization="sparse", token_size=32), names)
    assert outcomes_of(tmp_path / "a", names) == ["accepted", "accepted"]


def test_wrong_bytes_of_the_right_size_never_enter_a_dataset(hub, tmp_path):
    first, second = mixed_models()[0], mixed_models()[1]
    right = first.files["model.safetensors"]
    forged = HubFile(second.files["model.safetensors"].data, sha256=right.sha256)
    assert right.size == forged.size
    hub.add("org/forged", {**first.files, "model.safetensors": forged})
    hub.add("org/right", first.files)
    collect(tmp_path / "a", CONFIG, ["org/forged", "org/right"])
    assert outcomes_of(tmp_path / "a", ["org/forged", "org/right"]) == ["damaged", "accepted"]
