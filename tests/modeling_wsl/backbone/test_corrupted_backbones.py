"""A backbone that is damaged, foreign or forged is refused by name before anything is built."""

import json
from pathlib import Path

import pytest
import torch
from command_line import hf_wsl
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from modeling_wsl import CheckpointError, WSLConfig, WSLFeatureExtractor, WSLModel
from modeling_wsl.loading import load_pipeline


@pytest.fixture
def backbone(tmp_path) -> Path:
    config = WSLConfig(token_size=16, window_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    folder = tmp_path / "backbone"
    WSLModel(config).save_pretrained(folder)
    WSLFeatureExtractor(token_size=16).save_pretrained(folder)
    return folder


def changed(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    first = sorted(name for name in tensors if tensors[name].dim() == 2)[0]
    change(tensors, first)
    path.unlink()
    save_file(tensors, path)


DAMAGE = {
    "lacks the tensor": lambda tensors, name: tensors.pop(name),
    "holds NaN or infinity": lambda tensors, name: tensors[name].view(-1)[:1].fill_(torch.nan),
    "is of int32, no weights": lambda tensors, name: tensors.update({name: tensors[name].int()}),
    "its config says": lambda tensors, name: tensors.update({name: torch.zeros(3, 5)}),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_backbone_with_wrong_tensors_is_refused_by_name(backbone, tmp_path, message):
    changed(backbone, DAMAGE[message])
    for load in (AutoModel.from_pretrained, lambda folder: load_pipeline("weight-embedding", folder)):
        with pytest.raises(CheckpointError, match=message):
            load(backbone)
    save_file({"fc.weight": torch.ones(9, 9)}, tmp_path / "model.safetensors")
    result = hf_wsl(
        "embed", backbone, tmp_path / "model.safetensors", "--output_file", tmp_path / "t.parquet", "--quiet"
    )
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert message in result.stderr


@pytest.mark.parametrize(
    "content", [b"\x80\x04cos\nsystem\n(X\x04\x00\x00\x00true\x85R.", b"", b"\x10\0\0\0\0\0\0\0{"]
)
def test_a_truncated_or_pickled_backbone_is_refused(backbone, content):
    (backbone / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
        AutoModel.from_pretrained(backbone)


@pytest.mark.parametrize(
    ("layers", "message"), [(10_000_000, "num_hidden_layers must be at most 1,000"), (3, "lacks")]
)
def test_more_layers_than_there_are_are_refused_before_any_is_built(backbone, layers, message):
    path = backbone / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": layers}))
    with pytest.raises(Exception, match=message):
        AutoModel.from_pretrained(backbone)
    result = hf_wsl("embed", backbone, backbone / "model.safetensors", "--output_file", backbone / "t.parquet")
    assert result.exit_code == 1
    assert message in result.stderr


def test_a_config_nested_too_deeply_is_refused(backbone):
    (backbone / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        load_pipeline("weight-embedding", backbone)
