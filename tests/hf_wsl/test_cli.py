"""The command line: what it says, what it writes, and how it refuses."""

import dataclasses
import json

import pyarrow.parquet as pq
import pytest
import timm
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from datasets_scripts.tokenize_config import TokenizeConfig
from hf_wsl import cli
from modeling_wsl import WSLConfig, WSLFeatureExtractor, WSLModel


TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    config = WSLConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, latent_size=16, window_size=32)
    WSLModel(config).save_pretrained(folder)
    WSLFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture
def models(tmp_path):
    for index in range(3):
        torch.manual_seed(index)
        folder = tmp_path / "models" / f"net{index}"
        folder.mkdir(parents=True)
        save_file(torch.nn.Linear(20, 30).state_dict(), folder / "model.safetensors")
    return tmp_path / "models"


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_every_command_shows_an_example():
    for command in cli.app.registered_commands:
        assert "Example: hf-wsl " in command.callback.__doc__, command.callback.__name__


def test_tokenize_offers_every_option_of_its_configuration_with_its_own_help():
    text = " ".join(run("tokenize", "--help").output.split())
    for field in dataclasses.fields(TokenizeConfig):
        assert f"--{field.name.replace('_', '-')}" in text
        assert field.metadata["help"].split(".")[0][:30] in text


def test_tokenize_reads_a_yaml_file_which_the_command_line_outranks(models, tmp_path):
    (tmp_path / "options.yaml").write_text("token_size: 64\nvalidation_fraction: 0.4\nsplit_by: model\n")
    options = ["--config", tmp_path / "options.yaml", "--token-size", 100]
    result = run("tokenize", models, "--output", tmp_path / "tokens", *options)
    assert result.exit_code == 0, result.output
    assert "3 models" in result.output
    settings = json.loads((tmp_path / "tokens" / "tokenize.json").read_text())["settings"]
    assert (settings["token_size"], settings["validation_fraction"]) == (100, 0.4)


def test_an_unknown_key_of_a_yaml_file_is_refused_with_the_nearest_known_one(models, tmp_path):
    (tmp_path / "options.yaml").write_text("tokensize: 64\n")
    result = run("tokenize", models, "--output", tmp_path / "tokens", "--config", tmp_path / "options.yaml")
    assert isinstance(result.exception, ValueError)
    assert "unknown option 'tokensize'. Did you mean 'token_size'?" in str(result.exception)
    assert not (tmp_path / "tokens").exists()


def test_an_error_that_a_user_can_mend_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "sys.argv", ["hf-wsl", "tokenize", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert str(stop.value.code).startswith("error: ")
    assert "nowhere" in stop.value.code


def test_embed_writes_a_row_a_model_and_leaves_out_what_cannot_be_read(backbone, models, tmp_path):
    save_file({"weight": torch.full((4,), torch.nan)}, models / "net0" / "model.safetensors")
    result = run("embed", backbone, models, "--output", tmp_path / "embeddings.parquet")
    assert result.exit_code == 0, result.output
    assert "2 models embedded, 1 could not be read" in result.output
    table = pq.read_table(tmp_path / "embeddings.parquet").to_pylist()
    assert [row["model_id"].split("/")[-1] for row in table] == ["net1", "net2"]
    assert len(table[0]["embedding"]) == 16
    assert table[0]["x"] == pytest.approx(-table[1]["x"])


def test_generate_writes_a_folder_a_model_that_timm_loads(backbone, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", **TINY_VIT)
    timm.models.save_for_hf(model, tmp_path / "anchor", model_args=TINY_VIT, safe_serialization=True)
    target = tmp_path / "anchor"
    result = run("generate", backbone, target, "--anchors", target, "--output", tmp_path / "out", "--num-samples", 2)
    assert result.exit_code == 0, result.output
    for name in ("000", "001"):
        loaded = timm.create_model(f"local-dir:{tmp_path / 'out' / name}", pretrained=True)
        assert loaded(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
        assert (tmp_path / "out" / name / "provenance.json").is_file()


def test_env_names_the_versions_of_what_matters():
    output = run("env").output
    assert f"torch: {torch.__version__.split('+')[0]}" in output
    assert "transformers: " in output
