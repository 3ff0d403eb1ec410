"""An evaluation in miniature: real anchors, a real (untrained) backbone, the digits."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from command_line import hf_wsl
from evaluate_fixtures import (
    DATA,
    TARGET,
    TARGET_KWARGS,
    save_backbone,
    save_gpt2,
    tokenize_models,
    train_anchor,
    write_digits,
    write_text,
)
from PIL import Image
from safetensors.torch import load_file

from hf_wsl.options import ConfigError
from hf_wsl.run_folder import RunFolder
from trainers.evaluation import arm_runs
from trainers.evaluation.arm_figure import ARM_STYLES
from trainers.evaluation.arm_runs import summarize
from trainers.evaluation.evaluate import EvaluationOpener, evaluate
from trainers.evaluation.evaluate_config import ARMS, DONOR_ARMS, ON_REQUEST, EvaluateConfig
from trainers.evaluation.evaluate_report import evaluation_figure, evaluation_page
from trainers.evaluation.initial_weights import initial_weights


@pytest.fixture(scope="module", autouse=True)
def no_precision_from_another_test():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with digits, two anchors for them, their tokens and a backbone."""
    folder = tmp_path_factory.mktemp("evaluate")
    images = write_digits(folder / "digits")
    anchors = [train_anchor(folder / f"anchor_{seed}", images, seed) for seed in range(2)]
    tokenize_models(folder / "tokens", anchors)
    save_backbone(folder / "backbone")
    return folder


@pytest.fixture(scope="module")
def init(place):
    """The config of a finished evaluation by the protocol "init", and its results."""
    config = EvaluateConfig(
        backbone=str(place / "backbone"),
        target=TARGET,
        target_kwargs=TARGET_KWARGS,
        anchors=[str(place / "anchor_0")],
        data={"images": str(place / "digits"), **DATA},
        finetune={"num_train_epochs": 1, "batch_size": 64, "use_cpu": True},
        tokens=str(place / "tokens"),
        seeds=2,
        num_candidates=2,
        keep_models=True,
        output_dir=str(place / "init"),
    )
    return config, evaluate(config)


def test_every_arm_is_run_for_every_seed_and_what_is_left_out_has_a_reason(init):
    config, results = init
    assert set(results["arms"]) | set(results["skipped"]) == set(ARMS) - set(ON_REQUEST)
    assert set(results["skipped"]) == {"inherited only"}
    for found in results["arms"].values():
        assert [run["seed"] for run in found["runs"]] == results["seeds"] == [1000, 1001]
        assert [point["epoch"] for point in found["summary"]["by_epoch"]] == [0, 1]
        assert set(found["runs"][0]["test"]) == {"loss", "accuracy", "f1"}
    assert json.loads((config_folder(config) / "evaluation.json").read_text()) == results
    assert not list(config_folder(config).rglob("*.tmp"))


def test_the_anchor_starts_at_the_accuracy_that_its_own_library_gives_it(init, place):
    config, results = init
    model = timm.create_model(f"local-dir:{place / 'anchor_0'}", pretrained=True).eval()
    splits = opened(config).open().splits
    images, labels = zip(*splits.validation.__getitems__(range(1, len(splits.validation), 2)), strict=True)
    with torch.no_grad():
        accuracy = float((model(torch.stack(images)).argmax(1) == torch.tensor(labels)).float().mean())
    for run in results["arms"]["anchor"]["runs"]:
        assert run["history"][0]["metrics"]["accuracy"] == pytest.approx(accuracy, abs=1e-6)


def test_seeds_draw_anew_and_the_best_draw_is_kept(init):
    config, results = init
    first, second = results["arms"]["generated"]["runs"]
    assert first["draw_seed"] != second["draw_seed"]
    comparison = opened(config).open()
    scores = [
        comparison.score(candidate.instantiate())
        for candidate in comparison.draw([0], 1000, num_samples=2, num_candidates=None, rank=None)
    ]
    assert first["score"] == pytest.approx(max(scores))


def test_draws_are_computed_in_the_precision_that_is_asked_for(init):
    for precision, computed_in in (("auto", "float32"), ("bfloat16", "bfloat16")):  # weights stored in float32
        comparison = opened(replace(init[0], precision=precision)).open()
        (model,) = comparison.draw([0], 1000, num_samples=1, num_candidates=None, rank=None)
        assert model.provenance["computed_in"] == computed_in


def test_draws_are_ranked_on_other_examples_than_those_that_are_reported(init):
    comparison = opened(init[0]).open()
    ranked, reported = set(comparison.ranking_examples.indices), set(comparison.validation_examples.indices)
    assert not ranked & reported
    assert ranked | reported == set(range(len(comparison.splits.validation)))


def test_noise_is_as_far_from_the_anchor_as_the_generated_model(init):
    weights = init[1]["weights"]
    for arm in ("anchor + noise", "anchor rotated"):
        for generated, noised in zip(weights["generated"], weights[arm], strict=True):
            assert noised["relative_error"] == pytest.approx(generated["relative_error"], rel=1e-4)
    for generated, turned in zip(weights["generated"], weights["anchor rotated"], strict=True):
        assert turned["cosine"] == pytest.approx(generated["cosine"], rel=1e-3)
    assert set(weights) == {
        "generated",
        "reconstructed",
        "PCA",
        "random projection",
        "anchor + noise",
        "anchor rotated",
        "anchor permuted",
    }
    for models in weights.values():
        assert set(models[0]["agreement"]) == {"same_answer", "kl"}
        assert {"conv", "linear", "norm"} <= set(models[0]["kinds"])


def test_kept_models_are_those_that_were_measured_and_their_library_loads_them(init):
    config, results = init
    folders = sorted((config_folder(config) / "models").iterdir())
    assert [folder.name for folder in folders if "generated" in folder.name] == [
        "generated-1000-0",
        "generated-1001-0",
    ]
    model = timm.create_model(f"local-dir:{folders[0]}", pretrained=True).eval()
    assert set(results["loading"]) == {folder.name for folder in folders}
    assert all(found["max_difference"] < 1e-5 for found in results["loading"].values())
    comparison = opened(config).open()
    assert comparison.measure_validation(model) == results["arms"]["generated"]["runs"][0]["history"][0]["metrics"]


def test_an_interrupted_evaluation_goes_on_with_the_same_numbers_in_two_processes(init, place, hub):
    config, results = init
    copy = shutil.copytree(config.output_dir, place / "resumed")
    shutil.rmtree(copy / "models")
    for name in ("generated-1000", "anchor_plus_noise-1001", "PCA-1000", "scratch-1001"):
        (copy / "runs" / f"{name}.json").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in (copy / "runs").iterdir()}
    again = evaluate(replace(config, output_dir=str(copy), num_workers=2))
    assert again["arms"] == results["arms"]
    assert again["weights"] == results["weights"]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert not list((copy / "weights").iterdir())
    assert not hub.requests


def test_another_seed_is_added_and_other_options_are_refused_by_name(init):
    config, results = init
    more = evaluate(replace(config, seeds=3, arms=["scratch"]))
    assert more["arms"]["scratch"]["runs"][:2] == results["arms"]["scratch"]["runs"]
    assert not more["warnings"]
    assert "2 seed(s) only" in results["warnings"][0]
    with pytest.raises(ValueError, match="bandwidth was 0.2, now 0.3"):
        evaluate(replace(config, bandwidth=0.3))


def test_the_test_split_is_touched_once_at_the_end_of_a_run(init, monkeypatch):
    config, _ = init
    comparison = opened(config).open()
    events = []
    real_splits = comparison.splits

    class Watched:
        train, validation = real_splits.train, real_splits.validation
        batch_norm_images = real_splits.batch_norm_images

        @property
        def test(self):
            events.append("test")
            return real_splits.test

    comparison.splits = Watched()
    finetune = arm_runs.finetune
    monkeypatch.setattr(arm_runs, "finetune", lambda *a, **k: (finetune(*a, **k), events.append("trained"))[0])
    run = RunFolder(config_folder(config), records="runs")
    task = arm_runs.ArmTask(opened(config), run, ("generated",), 1000)
    start = initial_weights(comparison, "generated", 1000, reference=None)
    arm_runs._run(comparison, task, "generated", start)
    assert events == ["trained", "test"]


def test_few_shot_keeps_several_models_of_every_arm_and_measures_their_ensembles(init, place):
    config = replace(
        init[0],
        keep_models=False,
        protocol="few-shot",
        anchors=[str(place / "anchor_0"), str(place / "anchor_1")],
        finetune={"use_cpu": True},
        seeds=None,
        num_candidates=3,
        num_kept=2,
        bootstrap_rounds=1,
        interpolation_points=2,
        arms=["anchor", "generated", "bootstrapped", "interpolated", "anchor + noise", "scratch"],
        output_dir=str(place / "few"),
    )
    results = evaluate(config)
    assert list(results["arms"]) == [
        "anchor",
        "generated",
        "bootstrapped",
        "interpolated",
        "anchor + noise",
        "scratch",
    ]
    for arm, found in results["arms"].items():
        assert len(found["runs"]) == (1 if arm == "scratch" else 2)
        assert all(len(run["history"]) == 1 for run in found["runs"])
        assert ("ensembles" in found) == (arm != "scratch")
    for arm in ("generated", "bootstrapped", "anchor + noise"):
        scores = [run["score"] for run in results["arms"][arm]["runs"]]
        assert scores == sorted(scores, reverse=True)
    weights = [run["weight_of_second_anchor"] for run in results["arms"]["interpolated"]["runs"]]
    assert weights == pytest.approx([1 / 3, 2 / 3])
    page = evaluation_page(results)
    assert "## Ensembles" in page
    assert "None" not in page


def test_a_head_for_other_classes_is_initialized_and_nothing_is_ranked(init, place):
    digits = write_digits(place / "four_digits", classes=4)
    config = replace(
        init[0],
        keep_models=False,
        data={"images": str(digits), **DATA, "max_train": 64},
        arms=["anchor", "generated", "anchor + noise"],
        seeds=1,
        output_dir=str(place / "four"),
    )
    results = evaluate(config)
    assert results["ranked_by"] is None
    assert any("initialized at random" in warning for warning in results["warnings"])
    assert "fc.weight" not in results["weights"]["generated"][0]["layers"]
    assert results["arms"]["anchor + noise"]["runs"][0]["score"] is None
    with pytest.raises(ConfigError, match="no classifier for the 4 classes"):
        evaluate(replace(config, protocol="few-shot", output_dir=str(place / "four_few")))


def test_language_models_are_ranked_by_their_loss_and_measured_by_tokens(place):
    text, tokenizer = write_text(place / "text")
    anchor = save_gpt2(place / "gpt2", tokenizer)
    config = EvaluateConfig(
        backbone=str(place / "backbone"),
        target=str(anchor),
        anchors=[str(anchor)],
        task="causal-language-modeling",
        data={"text": str(text), "tokenizer": str(tokenizer), "block_size": 16},
        finetune={"max_steps": 2, "eval_steps": 1, "batch_size": 4, "use_cpu": True},
        arms=["anchor", "generated", "anchor permuted", "scratch"],
        seeds=1,
        num_candidates=2,
        output_dir=str(place / "language"),
    )
    results = evaluate(config)
    assert (results["metric"], results["tokens_per_example"]) == ("loss", 16)
    run = results["arms"]["generated"]["runs"][0]
    assert -run["score"] == pytest.approx(run["history"][0]["metrics"]["loss"], rel=0.2)  # on other blocks
    assert [point["examples"] for point in run["history"]] == [0, 4, 8]
    assert "perplexity" in results["arms"]["scratch"]["summary"]["test"]["metrics"]
    with pytest.raises(ConfigError, match="fewer than the .* tokens of the vocabulary"):
        evaluate(replace(config, data={"text": str(text), "vocab_size": 400, "block_size": 16}))


def test_an_arm_that_diverges_is_recorded_and_the_others_go_on(init, place):
    finetune = {"num_train_epochs": 1, "batch_size": 64, "learning_rate": 1e30, "use_cpu": True}
    config = replace(
        init[0], finetune=finetune, arms=["anchor", "scratch"], seeds=1, output_dir=str(place / "diverged")
    )
    run = RunFolder(config_folder(config), records="runs")
    settings = json.loads((config_folder(init[0]) / "settings.json").read_text())
    with run.open({**settings, "finetune": asdict(config.finetune_config)}):
        run.write_record("anchor-1000", {"runs": init[1]["arms"]["anchor"]["runs"][:1], "weights": []})
    results = evaluate(config)
    assert list(results["arms"]) == ["anchor"]
    assert "diverged" in results["skipped"]["scratch"]


def test_page_and_picture_are_made_of_the_record_alone(init):
    config, _ = init
    folder = config_folder(config)
    results = json.loads((folder / "evaluation.json").read_text())
    page = evaluation_page(results)
    for arm, found in results["arms"].items():
        assert f"| {arm} | " in page
        assert f"{100 * found['summary']['test']['mean']:.1f}" in page
    with Image.open(folder / "evaluation.png") as picture:
        assert min(picture.size) > 500
    legend = [text.get_text() for text in evaluation_figure(results).legends[0].get_texts()]
    assert legend == [*results["arms"], "guessing"]


def test_every_arm_has_a_style_of_its_own():
    assert set(ARM_STYLES) == {*ARMS, *DONOR_ARMS}
    for arms in (ARMS, DONOR_ARMS):  # of one picture
        assert len({tuple(sorted(map(str, ARM_STYLES[arm].items()))) for arm in arms}) == len(arms)


def test_deviations_are_those_of_a_sample_and_none_for_a_single_run():
    def run(accuracy):
        point = {"step": 0, "epoch": 0.0, "examples": 0, "train_loss": None, "metrics": {"accuracy": accuracy}}
        return {"history": [point], "test": {"accuracy": accuracy}}

    both = summarize([run(0.25), run(0.75)], "accuracy")["test"]
    assert (both["mean"], both["std"]) == (0.5, pytest.approx(0.125**0.5))
    assert summarize([run(0.5)], "accuracy")["by_epoch"][0]["std"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ["generate"]}, "Did you mean 'generated'"),
        ({"target": "resnet10x"}, "Did you mean resnet10t"),
        ({"target_kwargs": {**TARGET_KWARGS, "channels": [4, 8, 8, 8]}}, "does not match the target"),
        ({"target_kwargs": {"num_classes": 7}}, "which follows from the data"),
        ({"anchors": []}, "option 'anchors' is missing"),
        ({"anchors": ["a", "b"]}, "init draws around one"),
        ({"finetune": {"seed": 3}}, "that of each run"),
        ({"finetune": {"epochs": 3}}, "It is 'num_train_epochs' now"),
        ({"data": {"images": "nowhere/at/all"}}, "nowhere/at/all"),
        ({"num_candidates": 2, "num_kept": 3}, "more than the 2 draws"),
        ({"backbone": "anchor_0"}, "is no backbone|neither a folder"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(init, tmp_path, monkeypatch, change, message):
    config, _ = init
    monkeypatch.setattr(arm_runs, "_run_task", None)
    with pytest.raises(ValueError, match=message):
        evaluate(replace(config, output_dir=str(tmp_path / "out"), **change))
    assert not (tmp_path / "out" / "runs").exists()


def test_a_dataset_without_labels_is_refused_before_any_work(init, tmp_path):
    images = write_digits(tmp_path / "unlabeled", labeled=False)
    with pytest.raises(ValueError, match="has no labels"):
        evaluate(replace(init[0], data={"images": str(images), **DATA}, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_the_command_reads_lists_and_groups_and_runs(init, place):
    config, _ = init
    arguments = [
        "evaluate", "--backbone", config.backbone, "--target", TARGET, "--anchors", ",".join(config.anchors),
        *(f"--target_kwargs.{key}={json.dumps(value)}" for key, value in TARGET_KWARGS.items()),
        *(f"--data.{key}={value}" for key, value in {**DATA, "images": place / "digits"}.items()),
        "--finetune.num_train_epochs", "0", "--finetune.use_cpu", "true", "--arms", "anchor,scratch", "--seeds", "1",
        "--output_dir", str(place / "command"),
    ]  # fmt: skip
    outcome = hf_wsl(*arguments)
    assert outcome.exit_code == 0, outcome.output
    assert "2 arms" in outcome.output
    assert list(json.loads((place / "command" / "evaluation.json").read_text())["arms"]) == ["anchor", "scratch"]


def test_pca_is_fitted_once_for_all_evaluations_that_share_a_cache(init, place):
    cached = list((config_folder(init[0]) / "cache").glob("pca-*.safetensors"))
    assert len(cached) == 1
    assert load_file(cached[0])["components"].shape[1] == 230


def config_folder(config):
    return Path(config.output_dir)


def opened(config):
    settings = json.dumps({**vars(config), "cache_dir": f"{config.output_dir}/cache"})
    return EvaluationOpener(settings, config.backbone, None)
