"""The quickstart in miniature, through the functions of the real one, and the arithmetic of its controls."""

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
from torch import nn

from datasets_scripts.zoo import ZooConfig, new_model
from modeling_wsl import WSLFeatureExtractor
from trainers.baselines import random_projection
from trainers.finetune import FinetuneConfig
from trainers.quickstart import QuickstartConfig, quickstart
from trainers.quickstart_controls import ARMS, inherited_only, permuted, projected, with_noise
from trainers.quickstart_figures import ARM_STYLES, FIGURES
from trainers.quickstart_weights import compare_kinds, layer_kinds, relative_error


MINIATURE = QuickstartConfig(
    zoo=ZooConfig(families=("resnet", "efficientnet"), members_per_family=2, epochs=1, batch_size=64),
    validation_fraction=0.4,
    pretrain={"max_steps": 3, "eval_steps": 2, "batch_size": 2, "mixed_precision": "no"},
    finetune=FinetuneConfig(epochs=1, batch_size=64, use_cpu=True),
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
    for name in ("zoo", "dataset", "backbone", "generated/draw_0", "generated/reconstructed", "arms"):
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
    assert set(finetune["arms"]) | set(finetune["skipped"]) == set(ARMS)
    assert list(finetune["skipped"]) == ["inherited only"]
    for found in finetune["arms"].values():
        assert [len(r["history"]) for r in found["runs"]] == [2]
    anchor = finetune["arms"]["anchor"]["runs"][0]["history"][0]["validation_accuracy"]
    member = next(m for m in run[1]["zoo"]["members"] if m["name"] == "resnet_01")
    assert anchor == pytest.approx(member["validation_accuracy"], abs=2 / 360)


def test_timm_loads_the_generated_model_with_the_digits_preprocessing(run):
    model = timm.create_model(f"local-dir:{run[0] / 'generated' / 'draw_0'}", pretrained=True)
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
    for outcome in list((copy / "arms").glob("*.json"))[:3]:
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


def test_noise_is_as_long_as_the_way_to_the_generated_model_tensor_by_tensor():
    anchor = {"a": torch.randn(50), "b": torch.randn(4, 5), "running_mean": torch.ones(3)}
    generated = {"a": anchor["a"] + 0.3, "b": anchor["b"] * 2, "running_mean": torch.zeros(3)}
    noisy = with_noise(anchor, generated, ["a", "b"], seed=0)
    for name in ("a", "b"):
        expected = (generated[name] - anchor[name]).norm()
        torch.testing.assert_close((noisy[name] - anchor[name]).norm(), expected)
    assert torch.equal(noisy["running_mean"], anchor["running_mean"])


def test_permuting_keeps_every_value_and_moves_them():
    anchor = {"a": torch.randn(20, 5), "b": torch.randn(7)}
    shuffled = permuted(anchor, ["a"], seed=0)
    assert torch.equal(shuffled["a"].flatten().sort().values, anchor["a"].flatten().sort().values)
    assert not torch.equal(shuffled["a"], anchor["a"])
    assert torch.equal(shuffled["b"], anchor["b"])


def test_inherited_only_takes_what_generation_took_and_nothing_else():
    generated, scratch = {"w": torch.ones(2), "s": torch.ones(2)}, {"w": torch.zeros(2), "s": torch.zeros(2)}
    state = inherited_only(generated, {"w": "sampled", "s": "inherited: anchor"}, scratch)
    assert (state["w"].sum(), state["s"].sum()) == (0, 2)
    assert inherited_only(generated, {"w": "sampled", "s": "re-estimated"}, scratch) is None


def test_a_projection_onto_all_directions_gives_the_anchor_back():
    anchor = new_model("efficientnet", seed=0).state_dict()
    state = projected(WSLFeatureExtractor(), random_projection(230, 230, seed=0), anchor)
    assert relative_error(state, anchor, [name for name in anchor if "weight" in name]) < 1e-5
    assert torch.equal(state["bn1.running_var"], anchor["bn1.running_var"])


def test_kinds_of_layers_follow_from_the_module_not_from_the_name():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2), nn.PReLU())
    assert layer_kinds(model) == {
        "0.weight": "conv",
        "0.bias": "bias and other",
        "1.weight": "norm",
        "1.bias": "norm",
        "3.weight": "linear",
        "3.bias": "bias and other",
        "4.weight": "bias and other",
    }


def test_kinds_report_no_error_for_equal_weights_and_one_for_a_tensors_mean():
    model = nn.Sequential(nn.Linear(30, 20, bias=False))
    original, origins = {"0.weight": model[0].weight.detach().clone()}, {"0.weight": "sampled"}
    exact = compare_kinds([(model, original, origins)])["linear"]
    assert (exact["r2"], exact["relative_error"]) == (1, 0)
    assert exact["original"] == exact["reconstructed"]
    with torch.no_grad():
        model[0].weight.fill_(float(original["0.weight"].mean()))
    assert compare_kinds([(model, original, origins)])["linear"]["r2"] == pytest.approx(0, abs=1e-6)


def test_every_arm_has_a_style_of_its_own():
    assert set(ARM_STYLES) == set(ARMS)
    assert len({tuple(sorted(map(str, style.items()))) for style in ARM_STYLES.values()}) == len(ARMS)
