"""Folders are decided by what is in them: the weights among variants, twins, leftovers and states of training."""

import json

import pytest
import torch
from safetensors.torch import save_file

from modeling_wsl import open_checkpoint
from modeling_wsl.checkpoints.errors import CheckpointError, NoWeightsError


def state(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((4, 3), value), "b.weight": torch.full((5,), value)}


def value_of(source, **options) -> float:
    with open_checkpoint(source, **options) as checkpoint:
        assert set(checkpoint.tensors) == {"a.weight", "b.weight"}
        return float(checkpoint.read("b.weight")[0])


def save_shards(folder, weights, prefix="model", index="model.safetensors.index.json"):
    names = list(weights)
    weight_map = {name: f"{prefix}-0000{n}-of-0000{len(names)}.safetensors" for n, name in enumerate(names, 1)}
    for name, shard in weight_map.items():
        save_file({name: weights[name]}, folder / shard)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    ("plain", "variant"),
    [
        ("model.safetensors", "model.fp16.safetensors"),
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.non_ema.safetensors"),
    ],
)
def test_the_plain_weights_come_before_a_variant_which_is_read_where_it_is_alone(tmp_path, plain, variant):
    save_file(state(2.0), tmp_path / variant)
    assert value_of(tmp_path) == 2.0
    (said,) = open_checkpoint(tmp_path).ignored
    assert said.startswith(f"{variant}: a variant") and "the plain weights are not there" in said
    save_file(state(1.0), tmp_path / plain)
    assert value_of(tmp_path) == 1.0
    assert open_checkpoint(tmp_path).ignored == (f"{variant}: passed over for {plain}",)


@pytest.mark.parametrize(
    ("prefix", "index"),
    [
        ("model.fp16", "model.safetensors.index.fp16.json"),
        ("diffusion_pytorch_model.bf16", "diffusion_pytorch_model.safetensors.index.bf16.json"),
    ],
)
def test_shards_of_a_variant_are_read_by_their_index(tmp_path, prefix, index):
    save_shards(tmp_path, state(2.0), prefix, index)
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    assert value_of(tmp_path) == 2.0
    assert value_of(tmp_path / index) == 2.0
    assert open_checkpoint(tmp_path).library == "transformers"


def test_a_leftover_beside_the_index_of_complete_shards_is_passed_over(tmp_path):
    save_shards(tmp_path, state(1.0))
    save_file(
        {"a.weight": torch.zeros(4, 1, dtype=torch.uint8), "b.weight": torch.zeros(5)}, tmp_path / "model.safetensors"
    )
    assert value_of(tmp_path) == 1.0
    assert "model.safetensors: passed over for model.safetensors.index.json" in open_checkpoint(tmp_path).ignored


def test_a_complete_file_wins_over_shards_as_in_transformers(tmp_path):
    save_shards(tmp_path, state(1.0))
    save_file(state(2.0), tmp_path / "model.safetensors")
    assert value_of(tmp_path) == 2.0
    save_file({"a.weight": torch.zeros(4, 3)}, tmp_path / "model.safetensors")  # half of it
    assert value_of(tmp_path) == 1.0
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    save_file(state(3.0), tmp_path / "model.safetensors")
    assert value_of(tmp_path) == 3.0


def test_other_files_of_the_same_weights_are_passed_over_by_name(tmp_path):
    save_shards(tmp_path, state(1.0))
    save_file(state(1.0), tmp_path / "consolidated.safetensors")
    torch.save(state(1.0), tmp_path / "pytorch_model.bin")
    for name in ("tf_model.h5", "flax_model.msgpack", "model.onnx"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("onnx", "original"):
        (tmp_path / name).mkdir()
    assert value_of(tmp_path) == 1.0
    names = [line.partition(":")[0] for line in open_checkpoint(tmp_path).ignored]
    twins = ["consolidated.safetensors", "flax_model.msgpack", "model.onnx"]
    assert names == [*twins, "onnx/", "original/", "pytorch_model.bin", "tf_model.h5"]


def test_states_of_training_are_no_weights(tmp_path):
    states = ("optimizer.bin", "optimizer_1.bin", "scheduler.bin", "sampler_1.bin", "random_states_0.pkl", "scaler.pt")
    for name in (*states, "rng_state_0.pth", "training_args.bin", "custom_checkpoint_0.pkl", "ema_decay.pt"):
        torch.save({"w": torch.ones(3)}, tmp_path / name)
    with pytest.raises(NoWeightsError):
        open_checkpoint(tmp_path)
    torch.save(state(), tmp_path / "optimizers_are_us.bin")  # only a name that begins alike
    assert value_of(tmp_path) == 1.0
    assert len(open_checkpoint(tmp_path).ignored) == 10


@pytest.mark.parametrize("name", ["checkpoints", "weights.0", "net.dat"])
def test_a_file_without_a_telling_suffix_is_known_by_its_content(tmp_path, name):
    torch.save(state(), tmp_path / name)
    (tmp_path / "params.json").write_text("{}")
    torch.save({"state": {}, "param_groups": []}, tmp_path / "optimizer")
    assert value_of(tmp_path) == 1.0
    save_file(state(2.0), tmp_path / name)
    assert value_of(tmp_path) == 2.0


def test_the_root_of_a_diffusers_pipeline_lists_its_components(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    for name in ("unet", "vae"):
        (tmp_path / name).mkdir()
        save_file(state(), tmp_path / name / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="is a diffusers pipeline, whose components .*unet/, vae/"):
        open_checkpoint(tmp_path)
    assert value_of(tmp_path, subfolder="vae") == 1.0


def test_a_folder_of_checkpoints_names_them(tmp_path):
    for name in ("checkpoint-500", "checkpoint-1000"):
        (tmp_path / name).mkdir()
        save_file(state(), tmp_path / name / "model.safetensors")
    with pytest.raises(NoWeightsError, match="folders checkpoint-1000/, checkpoint-500/ hold weights"):
        open_checkpoint(tmp_path)


def test_the_first_module_of_sentence_transformers_is_the_model(tmp_path):
    modules = [{"idx": 0, "path": "0_Transformer"}, {"idx": 1, "path": "1_Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    for name in ("0_Transformer", "1_Pooling"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "bert"}')
    save_file(state(), tmp_path / "0_Transformer" / "model.safetensors")
    assert value_of(tmp_path) == 1.0
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.library == "transformers" and checkpoint.ignored == ("read is the model in 0_Transformer/",)
