"""`hf-wsl finetune`: from a model's folder to a trained model that its own library loads."""

import json
import re

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from command_line import hf_wsl
from image_fixtures import image_rows, write_parquet
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from hf_wsl.command_line import parse
from modeling_wsl.generation.targets import resolve_target
from trainers import finetune as finetune_command
from trainers.data.data_config import ImageDataConfig
from trainers.data.images.image_data import load_images
from trainers.finetune import FinetuneCommandOptions, main, run
from trainers.finetuning.measure import measure
from trainers.training_options import RECIPES


@pytest.fixture(autouse=True)
def no_state_from_another_test():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of three classes, a trained model for them, and one for five."""
    folder = tmp_path_factory.mktemp("command")
    parts = {"train": image_rows(48), "validation": image_rows(12, 48), "test": image_rows(12, 60)}
    write_parquet(folder / "images", **parts)
    for classes in (3, 5):
        target = resolve_target("test_vit", num_classes=classes, target_kwargs={"img_size": 32})
        (folder / f"model-{classes}").mkdir()
        target.save(target.build(seed=classes).state_dict(), folder / f"model-{classes}")
    (folder / "book.txt").write_text("".join(f"{i % 7} little ducks went out one day\n" for i in range(1500)))
    return folder


def words(folder, output, *more, **options):
    options = {"model": folder / "model-3", "output_dir": output, "num_train_epochs": 1, "batch_size": 16} | options
    options = {"data.images": folder / "images", "data.image_size": 32, "use_cpu": "true"} | options
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)] + list(more)


def error_of(capsys, *arguments):
    assert run(list(arguments)) == 1
    return capsys.readouterr().err.splitlines()[-1]


def test_a_trained_models_folder_is_trained_on_and_loads_with_its_own_library(folder, tmp_path):
    result = main(words(folder, tmp_path / "out", num_train_epochs=6, learning_rate=0.003))
    stored = json.loads((tmp_path / "out" / "finetuning.json").read_text())
    assert stored == json.loads(json.dumps(result))
    assert [line["epoch"] for line in stored["history"]] == [0, 1, 2, 3, 4, 5, 6]
    assert stored["history"][-1]["metrics"]["loss"] < stored["history"][0]["metrics"]["loss"]
    assert stored["test"]["accuracy"] > 0.6
    assert stored["data"]["sizes"] == {"train": 48, "validation": 12, "test": 12}
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    images = load_images(ImageDataConfig(images=str(folder / "images"), image_size=32))
    assert measure(loaded, images.test, use_cpu=True) == pytest.approx(stored["test"], rel=1e-4)
    start = load_file(folder / "model-3" / "model.safetensors")
    assert not torch.equal(start["head.weight"], loaded.head.weight)


def test_a_run_killed_between_training_and_saving_goes_on_and_ends_the_same(folder, tmp_path, monkeypatch):
    main(words(folder, tmp_path / "whole"))

    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune_command, "save_finetuned", die)
        main(words(folder, tmp_path / "killed"))
    assert not (tmp_path / "killed" / "finetuning.json").exists()
    main(words(folder, tmp_path / "killed"))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_new_head_takes_the_place_of_one_with_other_classes(folder, tmp_path, capsys):
    refusal = error_of(capsys, *words(folder, tmp_path / "out", model=folder / "model-5"))
    assert re.search("model has 5 classes.*has 3.*--new_head", refusal)
    assert not (tmp_path / "out").exists()
    main(words(folder, tmp_path / "out", "--new_head", model=folder / "model-5", num_train_epochs=0))
    saved, start = (load_file(place / "model.safetensors") for place in (tmp_path / "out", folder / "model-5"))
    assert saved["head.weight"].shape[0] == 3
    assert torch.equal(saved["blocks.0.attn.qkv.weight"], start["blocks.0.attn.qkv.weight"])


def test_an_architecture_from_scratch_gets_the_classes_and_channels_of_the_data(folder, tmp_path):
    options = {"model": "test_efficientnet", "data.channels": 1, "num_train_epochs": 0}
    for name in ("one", "two"):
        main(words(folder, tmp_path / name, "--from_scratch", **options))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert first["conv_stem.weight"].shape[1] == 1 and first["classifier.weight"].shape[0] == 3


def test_a_language_model_by_the_shipped_recipe_learns_and_loads_with_transformers(folder, tmp_path):
    options = ["--config", "gpt2_small", "--model", "gpt2", "--from_scratch", "--output_dir", tmp_path / "out"]
    options += ["--data.text", folder / "book.txt", "--data.vocab_size", 300, "--data.block_size", 16]
    options += ["--target_kwargs.n_layer", 1, "--target_kwargs.n_embd", 16, "--target_kwargs.vocab_size", 320]
    options += ["--target_kwargs.n_positions", 16, "--max_steps", 30, "--eval_steps", 10, "--use_cpu", "true"]
    result = main(list(map(str, options)))
    assert [line["step"] for line in result["history"]] == [0, 10, 20, 30]
    assert set(result["test"]) == {"loss", "perplexity", "accuracy", "f1"}
    assert result["test"]["loss"] < result["history"][0]["metrics"]["loss"] - 0.1
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 320 and model.lm_head.weight is model.transformer.wte.weight
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    # transformers stores the tied classifier once: the folder is trained on all the same.
    again = ["--model", tmp_path / "out", "--output_dir", tmp_path / "again", "--task", "causal-language-modeling"]
    again += ["--data.text", folder / "book.txt", "--data.tokenizer", tmp_path / "out", "--data.block_size", 16]
    more = main(list(map(str, [*again, "--max_steps", 1, "--use_cpu", "true"])))
    assert more["history"][0]["metrics"]["loss"] == pytest.approx(result["test"]["loss"], rel=0.2)


def test_what_does_not_fit_is_said_in_one_line_before_any_training(folder, tmp_path, capsys):
    out = tmp_path / "out"
    language = {"task": "causal-language-modeling", "data.text": folder / "book.txt", "data.block_size": 16}
    vocabulary = {"model": "gpt2", "target_kwargs.n_layer": 1, "target_kwargs.n_embd": 12, "data.vocab_size": 300}
    text = [str(word) for name, value in {**language, **vocabulary}.items() for word in (f"--{name}", value)]
    text += ["--from_scratch", "--output_dir", str(out), "--use_cpu", "true"]
    missing = tmp_path / "part"
    missing.mkdir()
    (missing / "config.json").write_text((folder / "model-3" / "config.json").read_text())
    weights = load_file(folder / "model-3" / "model.safetensors")
    save_file({name: value for name, value in weights.items() if "head" not in name}, missing / "model.safetensors")
    for arguments, reason in (
        ([*text, "--target_kwargs.vocab_size", "257"], "tokenizer has .* tokens.*vocabulary 257"),
        ([*text, "--target_kwargs.n_positions", "8"], "Blocks have 16 tokens, the model takes 8"),
        (words(folder, out, model="resnet_eighteen"), "no timm architecture"),
        (words(folder, out, model=missing), "lacks .*head.bias"),
        (words(folder, out, **{"data.image_size": 24}), r"cannot take images of shape \(3, 24, 24\)"),
        (
            words(folder, out, **{"data.imagesize": 24}),
            "unknown option '--data.imagesize'. Did you mean '--data.image_size'",
        ),
        (words(folder, out, **{"data.images": missing}), "part.*neither Parquet files nor images"),
        (words(folder, out, num_train_epochs=-1), "num_train_epochs is -1"),
        (words(folder, ""), "'output_dir' is needed"),
        (words(folder, out, "--new_head", "--from_scratch"), "new head in any case"),
    ):
        assert re.search(reason, error_of(capsys, *arguments)), (reason, arguments)
    assert not out.exists()


@pytest.mark.parametrize("recipe", ["imagenet_finetune", "gpt2", "gpt2_small"])
def test_every_recipe_is_readable(recipe):
    config = parse(
        FinetuneCommandOptions, ["--config", recipe, "--model", "m", "--output_dir", "o"], program="finetune"
    )
    assert (RECIPES / f"{recipe}.yaml").is_file()
    if recipe == "gpt2":  # Table 5 of the paper
        kwargs = config.target_kwargs
        assert (kwargs["vocab_size"], kwargs["n_layer"], kwargs["n_head"], kwargs["n_embd"]) == (50304, 12, 12, 768)
        assert (config.per_device_train_batch_size, config.gradient_accumulation_steps, config.learning_rate) == (
            64,
            8,
            6e-4,
        )


def test_the_command_lists_its_options():
    result = hf_wsl("finetune", "--help")
    assert result.exit_code == 0
    for name in ("--from_scratch", "--data.images", "--learning_rate", "image_size", "block_size"):
        assert name in result.output
