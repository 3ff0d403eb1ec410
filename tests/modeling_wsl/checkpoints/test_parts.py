"""Checkpoints in parts: joined bit for bit where the layout says how, otherwise refused by name."""

import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
from part_fixtures import llama_state, megatron_state, write_llama, write_megatron, write_zero
from safetensors.torch import save_file

from modeling_wsl import open_checkpoint
from modeling_wsl.checkpoints.errors import CheckpointError, PartOfModelError


def network_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"0.weight": (16, 8), "0.bias": (16,), "bn.running_mean": (16,), "2.weight": (5, 16), "2.bias": (5,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def assert_same(source, truth, **options) -> None:
    with open_checkpoint(source, **options) as checkpoint:
        assert list(checkpoint.tensor_order) == list(truth)
        for name, tensor in truth.items():
            read = checkpoint.read(name)
            assert read.dtype == tensor.dtype and torch.equal(read, tensor), name


def refused(source, match: str, kind: type = PartOfModelError, **options) -> None:
    with pytest.raises(kind, match=match):
        open_checkpoint(source, **options)


# --- DeepSpeed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_zero_is_joined_to_float32(tmp_path, stage, world):
    truth = network_state()
    folder = write_zero(tmp_path, truth, stage, world, buffers=["bn.running_mean"])
    assert_same(folder, truth)
    assert_same(folder / "global_step10", truth)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_keeps_groups_frozen_and_shared_parameters(tmp_path, stage):
    truth = network_state()
    truth["head.weight"] = truth["0.weight"]
    folder = write_zero(tmp_path, truth, stage, 2, groups=2, frozen=["2.weight"], shared={"head.weight": "0.weight"})
    assert_same(folder, truth)
    assert open_checkpoint(folder).tied == {"head.weight": "0.weight"}


def test_a_missing_rank_of_zero_is_named(tmp_path):
    folder = write_zero(tmp_path, network_state(), 2, 3)
    (folder / "global_step10" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    refused(folder, "lacks the optimizer state of rank 1 of 3, which holds a part of every weight")


def test_zero_3_without_its_optimizer_states_is_refused_and_zero_2_gives_its_16_bit_copy(tmp_path):
    truth = network_state()
    for stage in (2, 3):
        folder = write_zero(tmp_path / str(stage), truth, stage, 2)
        for path in (folder / "global_step10").glob("*optim_states.pt"):
            path.unlink()
    refused(tmp_path / "3", "lacks the optimizer states")
    assert_same(tmp_path / "2", {name: tensor.bfloat16() for name, tensor in truth.items()})


def test_tensor_parallel_and_pipeline_parts_of_deepspeed_are_refused_with_what_joins_them(tmp_path):
    folder = write_zero(tmp_path, network_state(), 2, 1)
    step = folder / "global_step10"
    torch.save({"module": {}}, step / "mp_rank_01_model_states.pt")
    refused(folder, "tensor parallel parts .mp_rank_00 to mp_rank_01.*ds_to_universal")
    (step / "mp_rank_01_model_states.pt").unlink()
    torch.save({}, step / "layer_00-model_00-model_states.pt")
    refused(folder, "parts of a pipeline of DeepSpeed")


def test_parts_of_another_size_than_the_shapes_say_are_refused(tmp_path):
    folder = write_zero(tmp_path, network_state(), 3, 2)
    path = folder / "global_step10" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    optimizer = {"zero_stage": 3, "partition_count": 2, "fp32_flat_groups": [torch.zeros(7)]}
    torch.save({"optimizer_state_dict": optimizer}, path)
    refused(folder, "its ranks hold .* entries, its parameters need", CheckpointError)


# --- torch.distributed.checkpoint ----------------------------------------------------------------------------------


@pytest.fixture
def dcp_folder(tmp_path):
    def save(content, name="dcp"):
        with pytest.warns(UserWarning, match="single process"):
            dcp.save(content, checkpoint_id=str(tmp_path / name))
        return tmp_path / name

    return save


def test_a_folder_of_dcp_is_read_tensor_by_tensor(dcp_folder):
    truth = network_state() | {"half": torch.randn(3, 4).half(), "steps": torch.tensor(7)}
    assert_same(dcp_folder({"model": truth}), truth)
    assert_same(dcp_folder(truth, "flat"), truth)


def test_the_states_of_an_optimizer_in_dcp_are_ignored_and_listed(dcp_folder):
    truth = network_state()
    states = {"state": {"0.weight": {"exp_avg": torch.ones(16, 8)}}}
    folder = dcp_folder({"app": {"model": truth, "optim": states}})
    assert_same(folder, truth)
    assert open_checkpoint(folder).ignored == ("app.optim: passed over, a state of training, no weights",)


def test_several_state_dicts_in_dcp_are_listed_and_key_picks_one(dcp_folder):
    truth = network_state()
    folder = dcp_folder({"model": truth, "ema": {name: 2 * tensor for name, tensor in truth.items()}})
    refused(folder, "holds 2 state dicts: key='model' .*key='ema'", CheckpointError)
    assert_same(folder, truth, key="model")
    refused(folder, "has no entry 'swa'", CheckpointError, key="swa")


def test_a_folder_of_dcp_whose_files_are_cut_or_gone_is_refused(dcp_folder):
    folder = dcp_folder({"model": network_state()})
    (file,) = folder.glob("*.distcp")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    refused(folder, "needs .* bytes of __0_0.distcp", CheckpointError)
    file.rename(folder / "other.distcp")
    refused(folder, "lacks the file '__0_0.distcp'", CheckpointError)


def test_metadata_of_dcp_runs_nothing(tmp_path):
    (tmp_path / ".metadata").write_bytes(b"cos\nsystem\n(S'touch " + bytes(tmp_path) + b"/ran'\ntR.")
    (tmp_path / "__0_0.distcp").write_bytes(b"")
    refused(tmp_path, "is no metadata", CheckpointError)
    assert not (tmp_path / "ran").exists()


# --- tensor parallel -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("embedding_rows", [False, True])
def test_parts_of_llama_are_joined_by_their_names(tmp_path, embedding_rows):
    truth = llama_state()
    assert_same(write_llama(tmp_path, truth, 2, embedding_rows=embedding_rows), truth)


def test_one_part_of_llama_is_refused_as_a_file_and_in_an_incomplete_folder(tmp_path):
    folder = write_llama(tmp_path, llama_state(), 2)
    refused(folder / "consolidated.01.pth", "is part 1 of 2 of a model")
    (folder / "consolidated.01.pth").unlink()
    refused(folder, "is one of 2 parts of a model: it holds 4 of 8 columns")
    (folder / "consolidated.00.pth").rename(folder / "consolidated.01.pth")
    refused(folder, "lacks part 0 of 2")


def test_parts_whose_names_tell_nothing_are_refused(tmp_path):
    for rank in range(2):
        part = {name: tensor.chunk(2)[rank].clone() for name, tensor in network_state().items()}
        torch.save(part, tmp_path / f"consolidated.{rank:02d}.pth")
    refused(tmp_path, "holds 2 parts of a model, and nothing says how '0.weight' was cut")


def test_norms_that_differ_between_ranks_are_refused(tmp_path):
    folder = write_llama(tmp_path, llama_state(), 2)
    part = torch.load(folder / "consolidated.01.pth")
    torch.save(part | {"norm.weight": part["norm.weight"] + 1}, folder / "consolidated.01.pth")
    refused(folder, "its parts differ in 'norm.weight'")


@pytest.mark.parametrize("world", [1, 2])
def test_parts_of_megatron_are_joined_by_their_names(tmp_path, world):
    truth = megatron_state()
    folder = write_megatron(tmp_path, truth, world)
    assert_same(folder, truth)
    if world == 2:
        refused(folder / "iter_0000100" / "mp_rank_01" / "model_optim_rng.pt", "is part 1 of 2, from Megatron")


def test_old_orders_and_pipelines_of_megatron_are_refused(tmp_path):
    refused(write_megatron(tmp_path / "old", megatron_state(), 2, version=0), "checkpoint version 0", CheckpointError)
    folder = write_megatron(tmp_path / "pipeline", megatron_state(), 2)
    for rank in folder.glob("iter_*/mp_rank_*"):
        rank.rename(f"{rank}_000")
    refused(folder, "cut into a pipeline or over experts by Megatron")


# --- one file a rank -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model_world_size_2_rank_{}.pt", "weights_rank_{}.pt", "rank{}.bin", "ckpt.tp{}.pt"])
def test_a_rank_is_refused_as_a_file_and_so_is_the_folder_where_nothing_says_how_it_was_cut(tmp_path, name):
    for rank in range(2):
        part = {n: tensor.chunk(2)[rank].clone() for n, tensor in network_state().items()}
        torch.save(part, tmp_path / name.format(rank))
    refused(tmp_path / name.format(0), "is part 0 of 2 of a model")
    refused(tmp_path, "nothing says how '0.weight' was cut")
    (tmp_path / name.format(0)).unlink()
    refused(tmp_path / name.format(1), "is part 1 of 2 of a model")
    refused(tmp_path, re.escape("lacks part 0 of 2"))


def test_ranks_that_all_hold_the_same_are_one_model(tmp_path):
    truth = network_state()
    for rank in range(2):
        torch.save(truth, tmp_path / f"weights_rank_{rank}.pt")
    assert_same(tmp_path, truth)


def test_the_rank_of_an_adapter_is_not_a_part(tmp_path):
    for rank in (4, 8):
        save_file({"lora_A.weight": torch.ones(rank, 8)}, tmp_path / f"style_rank_{rank}.safetensors")
    assert open_checkpoint(tmp_path / "style_rank_4.safetensors").num_parameters == 32
    refused(tmp_path, "2 weight files", CheckpointError)


def test_a_shard_is_refused_as_a_file(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "model-00001-of-00002.safetensors")
    refused(tmp_path / "model-00001-of-00002.safetensors", "is shard 1 of 2 of a model. Pass its folder")
    save_file({"w": torch.ones(3)}, tmp_path / "model-00001-of-00001.safetensors")
    assert open_checkpoint(tmp_path / "model-00001-of-00001.safetensors").num_parameters == 3


# --- saved without gathering ---------------------------------------------------------------------------------------


def test_empty_weights_are_told_as_zero_3_without_gathering(tmp_path):
    state = {name: torch.empty(0) if tensor.dim() == 2 else tensor for name, tensor in network_state().items()}
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "other.bin")
    message = r"holds empty tensors .'0.weight' and 1 more of shape \[0\].: saved under ZeRO-3 without gathering"
    for source in (tmp_path, tmp_path / "other.bin", state):
        refused(source, message)


def test_an_adapter_of_empty_matrices_is_told_so(tmp_path):
    names = [f"base_model.model.layers.{i}.q_proj.lora_{part}.weight" for i in range(2) for part in "AB"]
    save_file({name: torch.empty(0) for name in names}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    refused(tmp_path, "holds empty tensors .*without gathering")
