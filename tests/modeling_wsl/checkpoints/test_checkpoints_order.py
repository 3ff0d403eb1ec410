"""The order of the tensors: tokens follow it, and safetensors files do not keep it."""

import json
import random

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, BertModel, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

from modeling_wsl.checkpoints.checkpoint import CheckpointError, open_checkpoint
from modeling_wsl.checkpoints.order import natural_key


STATE = {name: torch.full((2,), float(i)) for i, name in enumerate(["z.w", "b.10.w", "b.9.w", "a.w", "b.9.b"])}
NATURAL = ["a.w", "b.9.b", "b.9.w", "b.10.w", "z.w"]


@pytest.fixture
def saved(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    return tmp_path


def order_of(source, **options) -> list[str]:
    return list(open_checkpoint(source, **options).tensors)


def test_natural_order_takes_numbers_as_numbers_however_long():
    names = ["l.10", "l.9", "l.09.x", "l.", "l", "10", "9", "x" + "9" * 5000, "x" + "1" * 5001, "²", "l.9.b"]
    expected = ["9", "10", "l", "l.", "l.9", "l.9.b", "l.09.x", "l.10", "x" + "9" * 5000, "x" + "1" * 5001, "²"]
    for seed in range(5):
        random.Random(seed).shuffle(names)
        assert sorted(names, key=natural_key) == expected


def test_without_any_hint_safetensors_are_in_natural_order_and_torch_files_in_their_own(saved):
    torch.save(STATE, saved / "m.pt")
    assert order_of(saved / "model.safetensors") == order_of(saved / "m.pt", order="natural") == NATURAL
    assert order_of(saved / "m.pt") == order_of(saved / "m.pt", order="file") == order_of(STATE) == list(STATE)
    assert order_of(saved, order="file") == json_order(saved / "model.safetensors")


def json_order(path) -> list[str]:
    data = path.read_bytes()
    return [n for n in json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]) if n != "__metadata__"]


def test_a_model_json_beside_the_weights_gives_the_order_and_extra_names_follow(saved):
    (saved / "model.json").write_text(json.dumps({"id": "x", "tensor_order": ["z.w", "gone", "b.10.w", "a.w"]}))
    expected = ["z.w", "b.10.w", "a.w", "b.9.b", "b.9.w"]
    assert order_of(saved) == order_of(saved / "model.safetensors") == expected
    assert order_of(saved, order="natural") == NATURAL
    (saved / "model.json").write_text(json.dumps({"tensor_order": ["another", "model's"]}))
    assert order_of(saved) == NATURAL
    (saved / "model.json").write_text(json.dumps([{"not": "ours"}]))
    assert order_of(saved) == NATURAL
    (saved / "model.json").write_text(json.dumps({"tensor_order": {"a.w": 1}}))
    with pytest.raises(CheckpointError, match="tensor_order is not a list of tensor names"):
        open_checkpoint(saved)


def test_the_metadata_of_a_safetensors_file_may_give_the_order(tmp_path):
    save_file(STATE, tmp_path / "m.safetensors", metadata={"tensor_order": json.dumps(list(STATE))})
    assert order_of(tmp_path) == list(STATE)
    save_file(STATE, tmp_path / "m.safetensors", metadata={"tensor_order": "[1,"})
    with pytest.raises(CheckpointError, match="metadata entry tensor_order is not valid JSON"):
        open_checkpoint(tmp_path)


def test_a_timm_folder_is_ordered_by_its_architecture(tmp_path):
    model = timm.create_model("resnet18", num_classes=7)
    timm.models.save_for_hf(model, tmp_path, model_config={"num_classes": 7}, safe_serialization=True)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.library == "timm" and checkpoint.config["architecture"] == "resnet18"
    assert list(checkpoint.tensors) == list(model.state_dict())
    assert order_of(tmp_path / "model.safetensors") == list(model.state_dict())
    assert order_of(tmp_path, order="natural") != list(model.state_dict())


def test_a_transformers_folder_is_ordered_by_its_architecture_sharded_or_not(tmp_path):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 30}
    model = BertForMaskedLM(BertConfig(num_hidden_layers=11, max_position_embeddings=8, **sizes))
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    state, there = model.state_dict(), open_checkpoint(tmp_path / "one").tensors
    expected = [name for name in state if name in there]
    for folder in ("one", "many"):
        checkpoint = open_checkpoint(tmp_path / folder)
        assert checkpoint.library == "transformers" and list(checkpoint.tensors) == expected
        for name, tensor in checkpoint.state_dict().items():
            assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("bare", [True, False])
def test_a_base_model_prefix_that_differs_does_not_lose_the_order(bare, tmp_path):
    config = BertConfig(
        hidden_size=16, num_hidden_layers=11, num_attention_heads=2, intermediate_size=16, vocab_size=30
    )
    model = (BertModel if bare else BertForMaskedLM)(config)
    save_file({n: t.clone() for n, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    config.architectures = ["BertForMaskedLM" if bare else "BertModel"]
    config.save_pretrained(tmp_path)
    known = [name for name in model.state_dict() if not name.startswith(("cls.", "pooler."))]
    assert order_of(tmp_path)[: len(known)] == known


def test_files_under_the_names_of_older_releases_are_ordered_by_the_architecture_too(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 11, "num_attention_heads": 2, "intermediate_size": 16}
    vit = ViTModel(ViTConfig(**sizes))
    vit.save_pretrained(tmp_path / "vit")
    checkpoint = open_checkpoint(tmp_path / "vit")
    assert "encoder.layer.0.attention.attention.query.weight" in checkpoint.tensors
    for found, expected in zip(checkpoint.state_dict().values(), vit.state_dict().values(), strict=True):
        assert torch.equal(found, expected)

    bert = BertModel(BertConfig(vocab_size=30, **sizes))
    bert.config.architectures = ["BertForMaskedLM"]
    bert.config.save_pretrained(tmp_path)
    old = [
        "bert." + n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        for n in bert.state_dict()
    ]
    state = dict(zip(old, bert.state_dict().values(), strict=True))
    save_file(state, tmp_path / "model.safetensors")
    assert order_of(tmp_path)[:-2] == [name for name in old if "pooler" not in name]


def test_tied_weights_of_a_transformers_model_are_stored_once(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=8))
    checkpoint = open_checkpoint(model)
    assert checkpoint.tied == {"lm_head.weight": "transformer.wte.weight"} and checkpoint.library == "transformers"
    model.save_pretrained(tmp_path)
    reread = open_checkpoint(tmp_path)
    assert list(reread.tensors) == list(checkpoint.tensors) and reread.sha256() == checkpoint.sha256()


HOSTILE = [
    {"architecture": "hf-hub:org/model"},
    {
        "architecture": "resnet18",
        "model_args": {"checkpoint_path": "/etc/passwd", "pretrained": True, "block": 10**12},
    },
    {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 10**9}},
    {"model_type": "bert", "num_hidden_layers": 10**9},
    {"model_type": "bert", "hidden_size": "x"},
    {"model_type": ["bert"]},
    {"model_type": "unheard-of", "architectures": ["pipeline"]},
    {"model_type": "bert", "architectures": ["pipeline"]},
    {"model_type": "bert", "architectures": {"a": 1}, "auto_map": {"AutoModel": "evil.Model"}},
    {"model_type": "timm_wrapper", "architecture": "hf-hub:org/model"},
    {"model_type": "timm_backbone", "backbone": "hf-hub:org/model", "use_pretrained_backbone": True},
    {"model_type": "detr", "use_timm_backbone": True, "use_pretrained_backbone": True, "backbone": "resnet50"},
    {"model_type": "detr", "use_timm_backbone": True, "backbone": "resnet50", "backbone_kwargs": {"out_indices": [4]}},
    {"model_type": "detr", "use_timm_backbone": False, "backbone": "org/resnet", "backbone_kwargs": {"a": 1}},
    {"model_type": "bert", "x": json.loads("[" * 900 + "]" * 900)},
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_config_that_cannot_be_built_or_would_fetch_something_leaves_natural_order(number, saved, hub):
    (saved / "config.json").write_text(json.dumps(HOSTILE[number]))
    assert order_of(saved) == NATURAL
    with pytest.raises(CheckpointError, match="architecture gives no order"):
        open_checkpoint(saved, order="architecture")
    assert hub.requests == []


def test_an_unknown_order_is_refused(saved):
    with pytest.raises(ValueError, match="order='alphabetic' is unknown. Choose one of auto, file"):
        open_checkpoint(saved, order="alphabetic")
