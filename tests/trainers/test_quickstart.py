"""The quickstart in miniature, through the functions of the real one."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch.utils.data import Subset

from trainers.data.images.digits import digits_splits
from trainers.evaluation.evaluate_config import ARMS, ON_REQUEST
from trainers.finetuning.finetune_options import FinetuneOptions
from trainers.finetuning.measure import measure
from trainers.quickstart.figures import FIGURES
from trainers.quickstart.quickstart import QuickstartConfig, quickstart
from trainers.zoo.digits_zoo import ARCHITECTURES, DigitsZooConfig


MINIATURE = QuickstartConfig(
    zoo=DigitsZooConfig(families=("resnet", "efficientnet"), members_per_family=2, epochs=1, batch_size=64),
    validation_fraction=0.4,
    pretrain={"max_steps": 3, "eval_steps": 2, "batch_size": 2, "precision": "float32"},
    finetune=FinetuneOptions(num_train_epochs=1, per_device_train_batch_size=64, use_cpu=True),
    finetune_seeds=1,
    num_candidates=2,
)


@pytest.fixture(scope="module", autouse=True)
def no_precision_from_another_test():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    return folder, quickstart(folder, seed=1, config=MINIATURE)


def test_every_stage_leaves_its_output_and_a_record(run):
    folder, results = run
    for name in ("zoo", "dataset", "backbone", "generated/drawn", "generated/reconstructed", "arms"):
        assert (folder / name).is_dir()
    assert list(results["seconds"]) == ["zoo", "tokenize", "pretrain", "embed", "generate", "finetune"]
    assert json.loads((folder / "results.json").read_text()) == results
    assert not list(folder.rglob("*.tmp"))


def test_the_held_out_model_is_in_neither_split_and_is_the_anchor(run):
    results = run[1]
    assert results["zoo"]["held_out"] == results["generate"]["anchor"] == "resnet_01"
    splits = results["tokenize"]["models"]
    assert sorted(splits["train"] + splits["validation"]) == ["efficientnet_00", "efficientnet_01", "resnet_00"]
    assert splits["validation"]


def test_the_backbone_is_measured_from_step_zero_beside_both_lines(run):
    pretrain = run[1]["pretrain"]
    assert [point["step"] for point in pretrain["val_r2_history"]] == [0, 2, 3]
    assert set(pretrain["baselines"]) == {"PCA", "random projection"}


def test_every_control_is_run_and_what_is_left_out_has_a_reason(run):
    finetune = run[1]["finetune"]
    assert set(finetune["arms"]) | set(finetune["skipped"]) == set(ARMS) - set(ON_REQUEST)
    assert set(finetune["skipped"]) <= {"inherited only"}
    for found in finetune["arms"].values():
        assert [len(r["history"]) for r in found["runs"]] == [2]
    anchor = finetune["arms"]["anchor"]["runs"][0]["history"][0]["metrics"]["accuracy"]
    member = timm.create_model(f"local-dir:{run[0] / 'zoo' / 'resnet_01'}", pretrained=True)
    validation = digits_splits(ARCHITECTURES["resnet"].image_size)["validation"]
    reported = Subset(validation, range(1, len(validation), 2))
    assert anchor == pytest.approx(measure(member, reported, use_cpu=True)["accuracy"], abs=1e-6)


def test_timm_loads_the_generated_model_with_the_digits_preprocessing(run):
    model = timm.create_model(f"local-dir:{run[0] / 'generated' / 'drawn'}", pretrained=True)
    assert model(torch.zeros(2, 1, 16, 16)).shape == (2, 10)
    assert tuple(model.pretrained_cfg["mean"]) == (0.5,)


def test_the_report_is_one_page_with_its_pictures_inside_and_no_hole_in_the_text(run):
    folder, results = run
    page = (folder / "report.html").read_text()
    assert not re.search(r"\$\w|\bnan\b|None|https?://(?!www\.w3)", re.sub(r"base64,[^\"]*", "", page))
    assert page.count("data:image/png;base64,") == len(FIGURES)
    for name in FIGURES:
        with Image.open(folder / f"{name}.png") as picture:
            assert min(picture.size) > 500
    assert f"<b>{results['pretrain']['val_r2']:.3f}</b>" in page
    open_tags = []

    class Balanced(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img"):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Balanced().feed(page)
    assert not open_tags


def test_a_stopped_quickstart_goes_on_with_the_same_numbers_and_asks_the_hub_for_nothing(run, tmp_path, hub):
    folder, results = run
    copy = shutil.copytree(folder, tmp_path / "quickstart")
    for stage in ("embed", "generate", "finetune"):
        (copy / "stages" / f"{stage}.json").unlink()
    shutil.rmtree(copy / "generated")
    for outcome in list((copy / "arms" / "runs").glob("*.json"))[:3]:
        outcome.unlink()
    resumed = quickstart(copy, seed=1, config=replace(MINIATURE, num_workers=2))
    for stage in ("embed", "generate", "finetune"):
        again, before = resumed[stage], results[stage]
        assert {**again, "seconds": 0} == {**before, "seconds": 0}
    assert not hub.requests


def test_a_folder_with_other_settings_is_refused_and_says_which(run):
    with pytest.raises(ValueError, match="seed was 1, now 2"):
        quickstart(run[0], seed=2, config=MINIATURE)


def test_a_family_that_is_not_in_the_zoo_cannot_be_held_out():
    with pytest.raises(ValueError, match="held_out_family='swin'"):
        replace(MINIATURE, held_out_family="swin")
