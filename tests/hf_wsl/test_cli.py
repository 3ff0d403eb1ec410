"""The command line: what it says, what it writes, and how it refuses."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from importlib import metadata

import pyarrow.parquet as pq
import pytest
import timm
import torch
from command_line import hf_wsl
from safetensors.torch import save_file

from datasets_scripts.embedding import embed_config
from datasets_scripts.tokenize_config import TokenizeConfig
from hf_wsl import cli
from hf_wsl.errors import run_for_shell
from hf_wsl.files import replacing, replacing_folder
from modeling_wsl import WSLConfig, WSLFeatureExtractor, WSLModel
from modeling_wsl.embedding import pooling
from trainers import finetune
from trainers.data.data_config import DATA
from trainers.probing import probe_config, probes


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


def error_of(*arguments):
    """The one line that a command ends with."""
    refused = hf_wsl(*arguments)
    assert refused.exit_code == 1 and refused.stdout == "" and refused.stderr.count("\n") == 1, refused.output
    return refused.stderr


def test_every_command_shows_an_example_its_types_and_its_general_options():
    for command in cli.COMMANDS:
        shown = hf_wsl(command.name, "--help")
        assert shown.exit_code == 0
        assert f"Example:\n  hf-wsl {command.name}" in shown.stdout, command.name
        assert "--config FILE" in shown.stdout and " VALUE " not in shown.stdout.replace("KEY VALUE", "")
        assert command.summary in " ".join(shown.stdout.split())


def test_the_overview_names_every_command_with_its_summary(capsys):
    text = " ".join(hf_wsl("--help").stdout.split())
    for command in cli.COMMANDS:
        assert f"{command.name} {command.summary}" in text
    assert hf_wsl().stdout == hf_wsl("--help").stdout


def test_help_is_wrapped_to_the_terminal_and_never_cut(monkeypatch):
    texts = []
    for columns in ("50", "100"):
        monkeypatch.setenv("COLUMNS", columns)
        shown = [hf_wsl(command.name, "--help").stdout.partition("Example:")[0] for command in cli.COMMANDS]
        for line in "".join(shown).splitlines():
            # A name with its choices is one word, which is never broken.
            assert len(line) < int(columns) or line.strip().startswith("-"), line
        texts.append(["".join(text.split()) for text in shown])
    assert texts[0] == texts[1]


def test_tokenize_offers_every_option_of_its_configuration_with_its_own_help():
    text = " ".join(hf_wsl("tokenize", "--help").stdout.split())
    for field in dataclasses.fields(TokenizeConfig):
        assert f"--{field.name}" in text
        assert field.metadata["help"].split(".")[0][:30] in text


def test_groups_show_their_options_with_types_and_help():
    text = " ".join(hf_wsl("evaluate", "--help").stdout.split())
    assert "--data.image_size INT pixels a side of what the model sees (default: 224)" in text
    assert "--finetune.lr_scheduler_type TEXT" in text
    assert "--finetune.seed" not in text  # that of each run


def test_tokenize_reads_a_yaml_file_which_the_command_line_outranks(models, tmp_path):
    (tmp_path / "options.yaml").write_text("token_size: 64\nvalidation_fraction: 0.4\nsplit_by: model\n")
    options = ["--config", tmp_path / "options.yaml", "--token-size", 100]
    result = hf_wsl("tokenize", models, "--output_dir", tmp_path / "tokens", *options)
    assert result.exit_code == 0, result.output
    assert "3 models" in result.output
    settings = json.loads((tmp_path / "tokens" / "tokenize.json").read_text())["settings"]
    assert (settings["token_size"], settings["validation_fraction"]) == (100, 0.4)


def test_an_unknown_key_of_a_yaml_file_is_refused_with_the_nearest_known_one(models, tmp_path):
    (tmp_path / "options.yaml").write_text("tokensize: 64\n")
    options = ["--output_dir", tmp_path / "tokens", "--config", tmp_path / "options.yaml"]
    message = error_of("tokenize", models, *options)
    assert "unknown option 'tokensize'. Did you mean 'token_size'?" in message
    assert not (tmp_path / "tokens").exists()


def test_an_error_that_a_user_can_mend_is_one_line(monkeypatch, tmp_path):
    arguments = ["tokenize", tmp_path / "nowhere", "--output_dir", tmp_path / "out"]
    message = error_of(*arguments)
    assert message.startswith("error: ") and "nowhere" in message
    monkeypatch.setenv("HF_WSL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="nowhere"):
        hf_wsl(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokenise"], "unknown command 'tokenise'. Did you mean 'tokenize'?"),
        (["--versoin"], "unknown option '--versoin'. Did you mean '--version'?"),
        (["tokenize", "a", "--otput_dir", "b"], "unknown option '--otput_dir'. Did you mean '--output_dir'?"),
        (["tokenize", "a", "--output", "b"], "unknown option '--output'. It is '--output_dir' now."),
        (["embed", "pca", "a", "--output_dir", "b"], "unknown option '--output_dir'. It is '--output_file' now."),
        (["tokenize", "a", "--out", "b"], "unknown option '--out'."),  # no abbreviations
        (["tokenize", "a", "-x"], "unknown option '-x'. `hf-wsl tokenize --help` lists all."),
        (["tokenize", "--sources", "a"], "It is given by its place: hf-wsl tokenize [options] SOURCES ..."),
        (["tokenize", "a"], "option 'output_dir' (--output_dir ...) is missing"),
        (["generate"], "options 'backbone', 'target', 'output_dir' (--output_dir ...) are missing"),
        (["publish", "a", "org/b", "c"], "unexpected argument 'c'"),
        (["generate", "a", "b", "--output_dir", "c", "--seed", "x"], "option 'seed' takes a whole number, not 'x'"),
        (["generate", "a", "b", "--output_dir", "c", "--seed"], "option '--seed' needs a value"),
        (["generate", "a", "b", "--output_dir", "c", "--noise", "x"], "choose one of shared, independent"),
        (["evaluate", "--data.image", "x"], "unknown option '--data.image'. Did you mean '--data.images'?"),
        (["evaluate", "--data.image_size", "x"], "option 'image_size' takes a whole number, not 'x'"),
        (["collect", "--output_dir", "x", "--executor", "ray"], "add --ranks N"),
        (["publish", "a"], "option 'repo_id' is missing"),
        (["generate", "a", "b", "--output_dir", "c", "--method", "density"], "option 'anchors' is empty"),
        (["generate", "a", "b", "--output_dir", "c", "--method", "prior", "--anchors", "d"], "choose one of density"),
        (["generate", "a", "b", "--output_dir", "c", "--method", "fit", "--anchors", "d"], "needs images (--data"),
        (["generate", "a", "b", "--output_dir", "c", "--labels", "--anchors", "d"], "take --method resize or fit"),
        (["generate", "a", "b", "--output_dir", "c", "--num_samples", "0"], "must be at least 1"),
        (["search", "nowhere.parquet"], "name one model to search for"),
        (["inspect", "a", "--table", "nowhere.parquet"], "there is no file nowhere.parquet"),
    ],
)
def test_arguments_that_cannot_be_read_are_refused_in_one_line(arguments, message):
    assert message in error_of(*arguments)


def test_the_version_is_that_of_the_package():
    assert hf_wsl("--version").stdout == f"hf-wsl {metadata.version('hf-wsl')}\n"


def test_the_level_of_the_log_is_given_before_or_after_the_command(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("hf_wsl.command_line.set_log_level", lambda **levels: asked.append(levels))
    for arguments in (["-q", "inspect", tmp_path], ["inspect", tmp_path, "--verbose"], ["inspect", tmp_path]):
        hf_wsl(*arguments)
    assert asked == [{"quiet": True}, {"verbose": True}, {}]


def test_choices_that_are_written_twice_for_lightness_are_those_of_the_library():
    assert embed_config.POOLINGS == pooling.POOLINGS
    assert tuple(probes.PROBES) == probe_config.PROBES
    assert tuple(DATA) == tuple(finetune.TASKS)


LIGHT = """
import sys
from hf_wsl.cli import COMMANDS, main
for command in COMMANDS:
    assert main([command.name, "--help"]) == 0
    assert main([command.name, "--nonsense"]) == 1
assert main(["--help"]) == main(["--version"]) == 0
assert main(["pretrain", "--config", "nowhere"]) == 1
print(sorted({"torch", "transformers", "datasets", "pyarrow", "huggingface_hub", "numpy"} & set(sys.modules)))
"""


def test_help_and_option_errors_import_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_path_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    inside = tmp_path / "file" / "out"
    for arguments in (
        ("tokenize", "nowhere", "--output_dir", inside),
        ("generate", "nowhere", "resnet18", "--anchors", "x", "--output_dir", inside),
        ("embed", "pca", "nowhere", "--output_file", inside),
        ("pretrain", "--dataset", "nowhere", "--output_dir", inside),
        ("quickstart", "--output_dir", inside),
    ):
        assert f"{tmp_path / 'file'} is a file, so nothing can be written in it" in error_of(*arguments)
    assert "nothing can be written in /proc" in error_of("quickstart", "--output_dir", "/proc/out")


def test_a_file_that_is_there_stays_as_it_is_until_it_is_to_be_overwritten(models, tmp_path):
    table, page = tmp_path / "embeddings.parquet", tmp_path / "page.html"
    for output, arguments in (
        (table, ("embed", "pooled-statistics", models)),
        (page, ("inspect", models / "net0")),
    ):
        output.write_text("mine")
        message = error_of(*arguments, "--output_file", output)
        assert "is there already" in message and "--overwrite_output_file" in message
        assert output.read_text() == "mine"
        assert hf_wsl(*arguments, "--output_file", output, "--overwrite_output_file").exit_code == 0
        assert output.read_bytes() != b"mine"


def test_a_full_disk_is_named_with_the_file_and_the_advice_to_go_on(tmp_path, capsys):
    def full_on_writing():
        with replacing(tmp_path / "tokens.parquet") as temporary:
            temporary.symlink_to("/dev/full")
            temporary.write_text("windows")

    def told_without_a_number():  # as safetensors does
        with replacing_folder(tmp_path / "model"):
            raise RuntimeError(f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")

    for work, name in ((full_on_writing, "tokens.parquet"), (told_without_a_number, "model")):
        assert run_for_shell(work) == 1
        message = capsys.readouterr().err
        assert f"{tmp_path / name} cannot be written: the disk is full" in message
        assert "run the same command again" in message
        assert list(tmp_path.iterdir()) == []


def test_embed_writes_a_row_a_model_and_leaves_out_what_cannot_be_read(backbone, models, tmp_path):
    save_file({"weight": torch.full((4,), torch.nan)}, models / "net0" / "model.safetensors")
    result = hf_wsl("embed", backbone, models, "--output_file", tmp_path / "embeddings.parquet")
    assert result.exit_code == 0, result.output
    assert "2 models embedded, 1 could not be read" in result.output
    table = pq.read_table(tmp_path / "embeddings.parquet").to_pylist()
    assert [row["model_id"].split("/")[-1] for row in table] == ["net1", "net2"]
    assert len(table[0]["embedding"]) == 16
    assert table[0]["x"] == pytest.approx(-table[1]["x"])


@pytest.fixture
def anchor(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", **TINY_VIT)
    timm.models.save_for_hf(model, tmp_path / "anchor", model_args=TINY_VIT, safe_serialization=True)
    return tmp_path / "anchor"


def test_generate_writes_a_folder_a_model_that_timm_loads(backbone, anchor, tmp_path):
    options = ["--anchors", anchor, "--output_dir", tmp_path / "out", "--num-samples", 2]
    result = hf_wsl("generate", backbone, anchor, *options)
    assert result.exit_code == 0, result.output
    for name in ("000", "001"):
        loaded = timm.create_model(f"local-dir:{tmp_path / 'out' / name}", pretrained=True)
        assert loaded(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
        assert (tmp_path / "out" / name / "provenance.json").is_file()


def test_generate_leaves_models_of_the_same_settings_and_refuses_a_folder_of_others(backbone, anchor, tmp_path):
    output = tmp_path / "out"
    command = ["generate", backbone, anchor, "--anchors", anchor, "--output_dir", output]
    assert hf_wsl(*command).exit_code == 0
    made = (output / "000" / "model.safetensors").stat().st_mtime_ns
    again = hf_wsl(*command)
    assert again.exit_code == 0 and "nothing was done" in again.stdout and str(output / "000") in again.stdout
    assert (output / "000" / "model.safetensors").stat().st_mtime_ns == made
    message = error_of(*command, "--seed", 1)
    assert "seed was 0, now 1" in message and "--overwrite_output_dir" in message
    assert hf_wsl(*command, "--seed", 1, "--overwrite_output_dir").exit_code == 0
    assert (output / "000" / "model.safetensors").stat().st_mtime_ns != made
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    assert "holds other files (notes.txt)" in error_of(*command[:-1], tmp_path / "mine", "--overwrite_output_dir")


def test_env_names_the_versions_of_what_matters():
    output = hf_wsl("env").stdout
    assert f"torch: {torch.__version__.split('+')[0]}" in output
    assert "transformers: " in output
