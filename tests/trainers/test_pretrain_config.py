import pytest
import torch
import yaml

from hf_wsl.options import ConfigError, parse
from modeling_wsl import WSLConfig
from trainers.optimization import constant, one_cycle
from trainers.pretraining.pretrain_config import RECIPES, PretrainConfig


def options_of(arguments):
    return parse(PretrainConfig, arguments, program="hf-wsl pretrain")


def recipes_with(option):
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if option in yaml.safe_load(path.read_text()))


def test_every_recipe_is_either_of_pretraining_or_of_fine_tuning():
    pretraining, finetuning = set(recipes_with("size")), set(recipes_with("task"))
    assert not pretraining & finetuning
    assert pretraining | finetuning == {path.stem for path in RECIPES.glob("*.yaml")}


@pytest.mark.parametrize("recipe", recipes_with("size"))
def test_every_recipe_is_read_whole_and_names_a_size(recipe):
    config = PretrainConfig.from_yaml(recipe)
    WSLConfig.from_size(config.size, **config.model)
    for name, value in yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text()).items():
        assert getattr(config, name) == value


@pytest.mark.parametrize(
    ("recipe", "epochs", "batch_size", "accumulation"),
    [("hf_small", 100, 64, 1), ("hf_small_300", 300, 64, 1), ("hf_large", 300, 64, 2), ("sane", 60, 32, 1)],
)
def test_the_papers_recipes_are_its_table_4(recipe, epochs, batch_size, accumulation):
    config = PretrainConfig.from_yaml(recipe)
    assert (config.epochs, config.batch_size, config.gradient_accumulation_steps) == (epochs, batch_size, accumulation)
    assert (config.learning_rate, config.weight_decay, config.lr_schedule) == (2e-5, 3e-9, "onecycle")
    assert config.mixed_precision == "bf16" and config.max_grad_norm == 0


def test_the_command_line_outranks_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "learning_rate: 2e-5\nbatch_size: 8\ntorch_compile: yes\nmodel:\n  noise_std: 0\n  denoise: true\n"
    )
    arguments = ["--config", str(file), "--batch_size=16", "--model.noise_std", "0.2", "--max-steps", "7"]
    config = options_of(arguments)
    assert (config.learning_rate, config.batch_size, config.max_steps) == (2e-5, 16, 7)
    assert config.torch_compile is True
    assert config.model == {"noise_std": 0.2, "denoise": True}
    assert config.seed == PretrainConfig().seed


def test_a_written_config_reads_back_the_same(tmp_path):
    config = PretrainConfig(dataset="data", learning_rate=3e-4, model={"noise_std": 0.0}, resume_from_checkpoint=None)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert PretrainConfig.from_yaml(tmp_path / "config.yaml") == config


def test_numbers_of_a_model_that_yaml_reads_as_text_are_numbers(tmp_path):
    (tmp_path / "config.yaml").write_text("model:\n  noise_std: 1e-2\n  denoise: true\n  max_positions: [9, 9, 9]\n")
    expected = {"noise_std": 0.01, "denoise": True, "max_positions": [9, 9, 9]}
    assert PretrainConfig.from_yaml(tmp_path / "config.yaml").model == expected


@pytest.mark.parametrize("name", ["learning_rate", "max_grad_norm"])
def test_a_number_that_is_none_is_refused_from_python_too(name):
    with pytest.raises(ConfigError, match=f"'{name}' must"):
        PretrainConfig(**{name: float("nan")})


def test_a_flag_needs_no_value():
    assert options_of(["--torch_compile", "--seed", "3"]).torch_compile is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rte", "1e-3"], "unknown option '--learning_rte'. Did you mean '--learning_rate'?"),
        (["--batch_size", "many"], "takes a whole number, not 'many'"),
        (["--batch_size", "2.5"], "takes a whole number"),
        (["--batch_size", "0"], "'batch_size' must be above 0"),
        (["--torch_compile", "perhaps"], "takes true or false"),
        (["--lr_schedule", "cosine"], "choose one of onecycle, constant"),
        (["--report_to", "tensorbord"], "names 'tensorbord'"),
        (["--seed", "-1"], "must not be negative"),
        (["--batch_size", "nan"], "takes a whole number, not 'nan'"),
        (["--max_steps", "inf"], "takes a whole number, not 'inf'"),
        (["--max_steps", "9" * 400], "takes a whole number"),
        (["--learning_rate", "nan"], "takes a number, not 'nan'"),
        (["--model.noise_std", "nan"], "'noise_std' takes a finite number"),
        (["--model.max_positions", "[1,"], "'--model.max_positions' cannot be read from '[1,'"),
        (["--epochs", "0"], "set one of them"),
        (["--model.noise_std"], "needs a value"),
        (["--batch_size"], "option '--batch_size' needs a value"),
        (["data"], "unexpected argument 'data'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["--config", "tinny"], "Did you mean 'tiny'? The recipes are hf_large, hf_small, "),
    ],
)
def test_an_option_that_cannot_be_read_is_refused_with_the_remedy(arguments, message):
    with pytest.raises(ConfigError) as error:
        options_of(arguments)
    assert message in str(error.value)


def test_an_unknown_key_in_a_file_is_refused_with_the_file_and_the_nearest_option(tmp_path):
    file = tmp_path / "typo.yaml"
    file.write_text("lerning_rate: 1e-3\n")
    with pytest.raises(ConfigError, match="typo.yaml: unknown option 'lerning_rate'. Did you mean 'learning_rate'?"):
        PretrainConfig.from_yaml(file)


def test_help_shows_every_option_with_an_example(capsys):
    with pytest.raises(SystemExit):
        options_of(["--help"])
    text = capsys.readouterr().out
    assert "--gradient_accumulation_steps" in text and "--model.KEY" in text and "--config tiny --dataset DIR" in text


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


def test_a_constant_schedule_warms_up_and_stays():
    rates = [constant(step, 100, learning_rate=1.0, beta1=0.9, warmup_fraction=0.1)[0] for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:] == [1.0] * 91
