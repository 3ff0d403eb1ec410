"""The options of pretraining: recipes, the command line, and TrainingArguments underneath."""

import dataclasses
import importlib.util
import typing

import pytest
import torch
import yaml
from transformers import TrainingArguments, get_scheduler

from hf_wsl.command_line import parse
from hf_wsl.options import ConfigError
from modeling_wsl import WSLConfig
from trainers.optimization import OneCycle, move_to_step, one_cycle, schedule_state
from trainers.pretraining.pretrain_config import PretrainConfig
from trainers.pretraining.pretrain_options import PretrainOptions
from trainers.training_options import RECIPES, names_of_training_arguments, plain_hint, with_training_arguments


def from_command_line(arguments):
    return parse(PretrainOptions, arguments, program="hf-wsl pretrain")


def recipes_with(option):
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if option in yaml.safe_load(path.read_text()))


def test_every_recipe_is_either_of_pretraining_or_of_fine_tuning():
    pretraining, finetuning = set(recipes_with("size")), set(recipes_with("task"))
    assert not pretraining & finetuning
    assert pretraining | finetuning == {path.stem for path in RECIPES.glob("*.yaml")}


@pytest.mark.parametrize("recipe", recipes_with("size"))
def test_every_recipe_is_read_whole_and_names_a_size(recipe):
    config = PretrainOptions.from_yaml(recipe)
    WSLConfig.from_size(config.size, **config.model)
    for name, value in yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text()).items():
        assert getattr(config, name) == value


@pytest.mark.parametrize(
    ("recipe", "epochs", "batch_size", "accumulation"),
    [("hf_small", 100, 64, 1), ("hf_small_300", 300, 64, 1), ("hf_large", 300, 64, 2), ("sane", 60, 32, 1)],
)
def test_the_papers_recipes_are_its_table_4(recipe, epochs, batch_size, accumulation):
    config = PretrainOptions.from_yaml(recipe)
    assert (config.num_train_epochs, config.gradient_accumulation_steps) == (epochs, accumulation)
    assert config.per_device_train_batch_size == batch_size
    assert (config.learning_rate, config.weight_decay, config.lr_scheduler_type) == (2e-5, 3e-9, "onecycle")
    assert config.precision == "auto" and config.max_grad_norm == 0


def test_the_command_line_outranks_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "learning_rate: 2e-5\nbatch_size: 8\ntorch_compile: yes\nmodel:\n  noise_std: 0\n  denoise: true\n"
    )
    arguments = ["--config", str(file), "--batch_size=16", "--model.noise_std", "0.2", "--max-steps", "7"]
    config = from_command_line(arguments)
    assert (config.learning_rate, config.per_device_train_batch_size, config.max_steps) == (2e-5, 16, 7)
    assert config.torch_compile is True
    assert config.model == {"noise_std": 0.2, "denoise": True}
    assert config.seed == PretrainOptions().seed


def test_a_written_config_reads_back_the_same(tmp_path):
    config = PretrainOptions(dataset="data", learning_rate=3e-4, model={"noise_std": 0.0}, resume_from_checkpoint=None)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert PretrainOptions.from_yaml(tmp_path / "config.yaml") == config


def test_numbers_of_a_model_that_yaml_reads_as_text_are_numbers(tmp_path):
    (tmp_path / "config.yaml").write_text("model:\n  noise_std: 1e-2\n  denoise: true\n  max_positions: [9, 9, 9]\n")
    expected = {"noise_std": 0.01, "denoise": True, "max_positions": [9, 9, 9]}
    assert PretrainOptions.from_yaml(tmp_path / "config.yaml").model == expected


@pytest.mark.parametrize("name", ["learning_rate", "max_grad_norm"])
def test_a_number_that_is_none_is_refused_from_python_too(name):
    with pytest.raises(ConfigError, match=f"'{name}' must"):
        PretrainOptions(**{name: float("nan")})


def test_a_flag_needs_no_value():
    assert from_command_line(["--torch_compile", "--seed", "3"]).torch_compile is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rte", "1e-3"], "unknown option '--learning_rte'. Did you mean '--learning_rate'?"),
        (["--batch_size", "many"], "takes a whole number, not 'many'"),
        (["--batch_size", "2.5"], "takes a whole number"),
        (["--batch_size", "0"], "'per_device_train_batch_size' must be above 0"),
        (["--torch_compile", "perhaps"], "unexpected argument 'perhaps'"),
        (["--torch_compile=perhaps"], "takes true or false"),
        (["--precision", "fp8"], "choose one of auto, float32, bfloat16"),
        (["--epochs", "3"], "It is '--num_train_epochs' now"),
        (["--seed", "-1"], "must not be negative"),
        (["--batch_size", "nan"], "takes a whole number, not 'nan'"),
        (["--max_steps", "inf"], "takes a whole number, not 'inf'"),
        (["--max_steps", "9" * 400], "takes a whole number"),
        (["--learning_rate", "nan"], "takes a number, not 'nan'"),
        (["--model.noise_std", "nan"], "'noise_std' takes a finite number"),
        (["--model.max_positions", "[1,"], "'--model.max_positions' cannot be read from '[1,'"),
        (["--num_train_epochs", "0"], "set one of them"),
        (["--model.noise_std"], "needs a value"),
        (["--batch_size"], "needs a value"),
        (["data"], "unexpected argument 'data'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["--config", "tinny"], "Did you mean 'tiny'? The recipes are hf_large, hf_small, "),
    ],
)
def test_an_option_that_cannot_be_read_is_refused_with_the_remedy(arguments, message):
    with pytest.raises(ConfigError) as error:
        from_command_line(arguments)
    assert message in str(error.value)


def test_an_unknown_key_in_a_file_is_refused_with_the_file_and_the_nearest_option(tmp_path):
    file = tmp_path / "typo.yaml"
    file.write_text("lerning_rate: 1e-3\n")
    with pytest.raises(ConfigError, match="typo.yaml: unknown option 'lerning_rate'. Did you mean 'learning_rate'?"):
        PretrainOptions.from_yaml(file)


def test_help_shows_every_option_with_an_example(capsys):
    with pytest.raises(SystemExit):
        from_command_line(["--help"])
    text = capsys.readouterr().out
    assert "--gradient_accumulation_steps" in text and "--model.KEY" in text and "--config tiny --dataset DIR" in text
    assert "--eval_delay" not in text
    with pytest.raises(SystemExit):
        from_command_line(["--help_all"])
    text = capsys.readouterr().out
    assert all(f"--{field.name}" in text for field in dataclasses.fields(TrainingArguments))


def test_the_options_of_the_help_are_those_of_training_arguments_where_the_names_are_the_same():
    ours = {field.name: field for field in dataclasses.fields(PretrainOptions)}
    theirs = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    both = ours.keys() & theirs.keys()
    assert both >= {
        "learning_rate",
        "num_train_epochs",
        "per_device_train_batch_size",
        "optim",
        "report_to",
        "deepspeed",
    }
    config = PretrainConfig(output_dir="out", use_cpu=True, precision="float32")
    hints, their_hints = typing.get_type_hints(PretrainOptions), typing.get_type_hints(TrainingArguments)
    plain = with_training_arguments(PretrainOptions)
    for name in theirs:  # each is on the command line, and has a help
        assert name in {field.name for field in dataclasses.fields(plain)} and hasattr(config, name)
    for name in both:  # each of ours takes what theirs does
        kinds = {
            getattr(kind, "__name__", str(kind).split(" | ")[0])
            for kind in (hints[name], plain_hint(their_hints[name], theirs[name].default))
        }
        assert len(kinds) == 1 or name == "report_to", name
    assert names_of_training_arguments() == theirs.keys()


def test_other_options_of_training_arguments_are_taken_from_everywhere(tmp_path):
    assert from_command_line(["--eval_delay", "7", "--batch_size", "3"]).eval_delay == 7
    (tmp_path / "mine.yaml").write_text("logging_first_step: true\nnum_workers: 2\n")
    options = from_command_line(["--config", str(tmp_path / "mine.yaml")])
    assert options.logging_first_step is True and options.dataloader_num_workers == 2
    assert isinstance(PretrainOptions.from_yaml("nano", hub_strategy="end"), with_training_arguments(PretrainOptions))


def test_every_schedule_and_optimizer_of_transformers_works_beside_ours():
    common = {"output_dir": "out", "use_cpu": True, "precision": "float32"}
    assert PretrainConfig(**common).lr_scheduler_type == "onecycle"
    config = PretrainConfig(**common, lr_scheduler_type="cosine", optim="adafactor")
    assert (config.lr_scheduler_type, config.optim) == ("cosine", "adafactor")
    with pytest.raises(ConfigError, match="transformers refuses these options.*nonsense"):
        PretrainConfig(**common, optim="nonsense")


def test_the_precision_is_what_the_machine_is_faster_in(monkeypatch, caplog):
    caplog.set_level("INFO")
    for faster in ("float32", "bfloat16"):
        timed = (faster, {"float32": 1e-3, "bfloat16": 2e-3})
        monkeypatch.setattr("trainers.run_arguments.choose_precision", lambda *arguments, timed=timed: timed)
        config = PretrainConfig(output_dir="out", use_cpu=True)
        assert config.precision == faster and config.bf16 == (faster == "bfloat16")
        assert config.mixed_precision == ("bf16" if config.bf16 else "no")
        assert f"precision: {faster}" in caplog.text and "float32 1.00 ms, bfloat16 2.00 ms" in caplog.text


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_deepspeed_is_an_option_and_the_package_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "zero.json").write_text("{}")
    options = from_command_line(["--deepspeed", str(tmp_path / "zero.json"), "--dataset", "d", "--output_dir", "o"])
    assert options.deepspeed.endswith("zero.json")
    with pytest.raises(ConfigError, match="pip install deepspeed.*fsdp2_8_gpus.yaml"):
        PretrainConfig(output_dir="out", use_cpu=True, deepspeed=options.deepspeed)


@pytest.mark.parametrize("total_steps", [10, 57, 1000])
def test_one_cycle_equals_torchs(total_steps):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=1.0, betas=(0.95, 0.999))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-4, total_steps=total_steps)
    for step in range(total_steps):
        rate, beta1 = one_cycle(step, total_steps, learning_rate=3e-4, beta1=0.95, warmup_fraction=0.3)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-15)
        assert beta1 == pytest.approx(optimizer.param_groups[0]["betas"][0], rel=1e-9)
        optimizer.step()
        if step < total_steps - 1:
            scheduler.step()


@pytest.mark.parametrize("kind", ["onecycle", "cosine"])
def test_a_schedule_that_is_moved_to_a_step_stands_where_one_stands_that_came_to_it(kind):
    def made():
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3, betas=(0.95, 0.999))
        cosine = {"num_warmup_steps": 3, "num_training_steps": 20}
        return OneCycle(optimizer, 20, 0.3) if kind == "onecycle" else get_scheduler("cosine", optimizer, **cosine)

    walked = made()
    for step in range(1, 21):
        walked.optimizer.step()
        walked.step()
        moved = made()
        move_to_step(moved, step, schedule_state(walked))
        for name in ("lr", "betas"):
            assert moved.optimizer.param_groups[0][name] == walked.optimizer.param_groups[0][name]
