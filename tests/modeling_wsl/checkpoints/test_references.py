"""One line of text names a model and what of it is meant, in Python and in every command."""

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from command_line import hf_wsl
from safetensors.torch import save_file

from datasets_scripts.sources import expand_sources
from modeling_wsl import CheckpointError, open_checkpoint
from modeling_wsl.checkpoints.reference import Reference, parse_reference


def state(seed: int = 0, rows: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"fc.weight": torch.randn(rows, 8, generator=generator), "fc.bias": torch.randn(rows, generator=generator)}


@pytest.fixture
def several(tmp_path) -> Path:
    """A training checkpoint with a model and its moving average."""
    torch.save({"state_dict": state(0), "state_dict_ema": state(1), "epoch": 3}, tmp_path / "run.pt")
    return tmp_path / "run.pt"


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("org/name", Reference("org/name")),
        ("timm/resnet18.a1_in1k@main", Reference("timm/resnet18.a1_in1k", revision="main")),
        ("org/name:unet#a.b@v1", Reference("org/name", "unet", "a.b", "v1")),
        ("org/name@v1:unet#a.b", Reference("org/name", "unet", "a.b", "v1")),
        ("org/name@refs/pr/1", Reference("org/name", revision="refs/pr/1")),
        ("nowhere/file.pt#ema%3Amodel%23%40%25", Reference("nowhere/file.pt", key="ema:model#@%")),
        ("nowhere/file.pt#", Reference("nowhere/file.pt", key="")),
    ],
)
def test_a_reference_is_taken_apart_and_written_again(text, reference):
    assert parse_reference(text) == reference
    assert parse_reference(str(reference)) == reference


def test_a_path_that_exists_wins_over_what_its_name_could_mean(several):
    odd = several.with_name("run.pt#state_dict_ema")
    torch.save(state(2), odd)
    assert parse_reference(str(odd)) == Reference(str(odd))
    assert torch.equal(open_checkpoint(str(odd)).read("fc.bias"), state(2)["fc.bias"])
    named = open_checkpoint(f"{several}#state_dict")
    assert torch.equal(named.read("fc.bias"), state(0)["fc.bias"])
    assert named.source == f"{several}#state_dict"


def test_options_that_contradict_the_reference_are_refused(several):
    with pytest.raises(CheckpointError, match="names the key 'state_dict', and 'state_dict_ema' is asked for"):
        open_checkpoint(f"{several}#state_dict", key="state_dict_ema")
    assert open_checkpoint(f"{several}#state_dict", key="state_dict").tensors
    with pytest.raises(CheckpointError, match="names a key twice"):
        open_checkpoint(f"{several}#a#b")
    with pytest.raises(CheckpointError, match="has no revision 'v1', for it is no Hub id"):
        open_checkpoint(f"{several}@v1")
    with pytest.raises(CheckpointError, match=r"is an address of the web\. Pass the Hub id"):
        open_checkpoint("https://huggingface.co/org/name")


def test_several_state_dicts_are_listed_as_references_that_can_be_pasted(several):
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(several)
    listed = [word for word in str(refused.value).split() if "#" in word and word.startswith(str(several))]
    assert [open_checkpoint(one).num_parameters for one in listed] == [144, 144]
    assert "(2 tensors, 144 entries: 'fc.weight' [16, 8], 'fc.bias' [16])" in str(refused.value)
    with pytest.raises(CheckpointError, match=r"run\.pt#state_dict; .*#state_dict_ema.*embed and search read each"):
        open_checkpoint(f"{several}#all")


def test_lists_of_agents_and_gans_are_read_by_key(tmp_path):
    torch.save([state(0), state(1)], tmp_path / "agents.pt")
    torch.save({"generator": state(2), "discriminator": state(3)}, tmp_path / "gan.pt")
    assert torch.equal(open_checkpoint(f"{tmp_path}/agents.pt#1").read("fc.bias"), state(1)["fc.bias"])
    ids = [model.model_id for model in expand_sources([f"{tmp_path}/gan.pt#all", f"{tmp_path}/agents.pt#all"])]
    assert ids == ["gan.pt#generator", "gan.pt#discriminator", "agents.pt#0", "agents.pt#1"]


def test_a_subfolder_is_named_behind_a_colon_and_leads_not_out(tmp_path):
    (tmp_path / "pipe" / "unet").mkdir(parents=True)
    save_file(state(), tmp_path / "pipe" / "unet" / "model.safetensors")
    assert open_checkpoint(f"{tmp_path}/pipe:unet").num_parameters == 144
    (model,) = expand_sources([f"{tmp_path}/pipe:unet"])
    assert (model.model_id, model.path) == ("pipe:unet", tmp_path / "pipe" / "unet")
    with pytest.raises(CheckpointError, match=r"has no folder '\.\./other' inside"):
        open_checkpoint(f"{tmp_path}/pipe:../other")


def test_lists_take_references_and_comments_begin_behind_white_space(several, tmp_path):
    (tmp_path / "list.txt").write_text("# models\nrun.pt#state_dict_ema  # the average\norg/name:unet#ema@v1\n")
    (tmp_path / "list.json").write_text(json.dumps([{"source": "run.pt#all", "model_id": "run"}]))
    assert [model.model_id for model in expand_sources([tmp_path / "list.txt"])] == [
        "run.pt#state_dict_ema",
        "org/name:unet#ema",
    ]
    assert expand_sources([tmp_path / "list.txt"])[1].revision == "v1"
    assert [model.model_id for model in expand_sources([tmp_path / "list.json"])] == [
        "run#state_dict",
        "run#state_dict_ema",
    ]


def test_the_fingerprint_of_a_source_tells_its_state_dicts_apart(several):
    one, other = expand_sources([f"{several}#all"])
    assert one.fingerprint() != other.fingerprint()


def test_commands_take_references(several, tmp_path):
    tokens, table = tmp_path / "tokens", tmp_path / "table.parquet"
    result = hf_wsl("tokenize", f"{several}#all", "--output_dir", tokens)
    assert result.exit_code == 0, result.output
    assert "2 models" in result.stdout
    result = hf_wsl("embed", "pooled-statistics", f"{several}#all", "--output_file", table)
    assert result.exit_code == 0, result.output
    assert pq.read_table(table)["model_id"].to_pylist() == ["run.pt#state_dict", "run.pt#state_dict_ema"]
    result = hf_wsl("search", table, f"{several}#state_dict_ema", "--top", 1)
    assert (result.exit_code, result.stdout.split()[-1]) == (0, "run.pt#state_dict_ema"), result.output
    result = hf_wsl("inspect", f"{several}#state_dict")
    assert result.exit_code == 0, result.output
    result = hf_wsl("inspect", several)
    assert result.exit_code == 1
    assert f"{several}#state_dict_ema" in result.stderr


@pytest.mark.parametrize("name", ["a\0b", "new\nline.pt", "\udc80.pt", "x" * 4000, "../" * 40 + "nowhere", "a\x1b[2J"])
def test_names_that_no_file_has_are_refused_in_one_line(name):
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(name)
    assert str(refused.value).isprintable() or "\udc80" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_broken_link_and_a_folder_called_like_a_file_are_told(tmp_path):
    os.symlink(tmp_path / "gone", tmp_path / "link.pt")
    with pytest.raises(CheckpointError, match=r"link\.pt: is no file or folder \(a broken link\)"):
        open_checkpoint(tmp_path / "link.pt")
    (tmp_path / "x.pt").mkdir()
    with pytest.raises(CheckpointError, match="holds no weights that can be read; there is nothing"):
        open_checkpoint(tmp_path / "x.pt")
