"""Generated models in a stranger's process."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from modeling_wsl.generation.generated_model import GeneratedModel
from modeling_wsl.generation.targets import resolve_target
from trainers.evaluation.loading_check import check_loading


def _saved(target, folder):
    module = target.build(seed=0).eval()
    model = GeneratedModel({name: value.clone() for name, value in module.state_dict().items()}, {}, target)
    model.save_pretrained(folder)
    return model.instantiate()


def test_a_stranger_s_process_finds_the_same_outputs_a_changed_weight_and_a_damaged_folder(tmp_path):
    target = resolve_target("resnet10t", 10, {"stem_width": 8, "channels": [8, 8, 16, 16], "in_chans": 1})
    models = {tmp_path / name: _saved(target, tmp_path / name) for name in ("same", "changed")}
    weights = tmp_path / "changed" / "model.safetensors"
    changed = load_file(weights)
    changed["fc.bias"] += 1
    save_file(changed, weights, metadata={"format": "pt"})
    inputs = torch.randn(2, 1, 32, 32)
    found = check_loading(models, inputs)
    assert found.keys() == {"same", "changed"}
    assert all(facts["loader"] == "timm.create_model" for facts in found.values())
    assert found["same"]["max_difference"] < 1e-5
    assert found["changed"]["max_difference"] == pytest.approx(1, abs=1e-4)
    weights.write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match="cannot be loaded by its own library"):
        check_loading(models, inputs)


def test_a_transformers_model_is_loaded_by_its_own_class(tmp_path):
    config = GPT2Config(
        n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16, architectures=["GPT2LMHeadModel"]
    )
    target = resolve_target(config)
    found = check_loading({tmp_path / "gpt": _saved(target, tmp_path / "gpt")}, torch.randint(0, 64, (2, 16)))
    assert found["gpt"]["loader"] == "GPT2LMHeadModel.from_pretrained"
    assert found["gpt"]["max_difference"] < 1e-5
