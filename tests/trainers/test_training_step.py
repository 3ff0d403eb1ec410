"""What a pretraining step is made of: the optimizer, masks only where something is padded, memory that is kept."""

import json
import platform
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from pretrain_fixtures import (
    arguments,
    one_thread_and_a_fresh_accelerator,  # noqa: F401  a fixture
)
from safetensors.torch import load_file
from window_fixtures import SMALL_MODEL, write_dataset

from hf_wsl.options import ConfigError
from modeling_wsl import WSLConfig, WSLFeatureExtractor, WSLForPreTraining
from trainers.checkpointing import CheckpointStateError
from trainers.data.windows.dataset_source import SplitSize
from trainers.distribution import refuse_muon_in_parts
from trainers.optimization import block_matrices, make_optimizer, set_step
from trainers.pretrain import main
from trainers.pretraining.pretrain_config import PretrainConfig
from trainers.pretraining.pretrain_trainer import PretrainTrainer
from trainers.pretraining.validation import all_attended, to_device


pytestmark = pytest.mark.usefixtures("one_thread_and_a_fresh_accelerator")
MUON = {"optimizer": "muon", "learning_rate": 1e-2, "eval_steps": 0, "logging_steps": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    lengths = {"train": [40, 7, 33, 16, 3, 90, 25, 64, 12, 20, 31], "validation": [30, 5, 44]}
    return write_dataset(tmp_path_factory.mktemp("step") / "data", lengths)


def small_model(**options):
    torch.manual_seed(0)
    return WSLForPreTraining(WSLConfig(**{**SMALL_MODEL, "num_hidden_layers": 2, **options}))


def gradients_for(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_everything_else():
    model = small_model()
    optimizer = make_optimizer(model, PretrainConfig(optimizer="muon"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]
    of_muon = {name for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2}
    assert groups[0] == of_muon and len(of_muon) == 2 * 2 * 6
    assert set.union(*groups) == set(names.values()) and sum(map(len, groups)) == len(names)


def test_both_optimizers_step_as_alone_also_after_their_state_was_loaded():
    config = PretrainConfig(optimizer="muon", learning_rate=1e-2, weight_decay=0.1)
    together, alone = small_model(), small_model()
    optimizer = make_optimizer(together, config)
    matrices = block_matrices(alone)
    others = [p for p in alone.parameters() if all(p is not matrix for matrix in matrices)]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in others if p.ndim < 2]},
        ],
        betas=(0.95, 0.999),
        weight_decay=0.0,
        fused=True,
    )
    muon = torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        rate, beta1 = 1e-2 / (1 + step), 0.9 - 0.01 * step
        for model in (together, alone):
            gradients_for(model, step)
        if step == 2:
            again = make_optimizer(together, config)
            again.load_state_dict(optimizer.state_dict())
            optimizer = again
        set_step(optimizer, rate, beta1)
        for group in (*muon.param_groups, *adamw.param_groups):
            group["lr"] = rate
        for group in adamw.param_groups:
            group["betas"] = (beta1, 0.999)
        for each in (optimizer, muon, adamw):
            each.step()
    start = small_model().state_dict()
    for (name, found), expected in zip(together.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(found, expected) and not torch.equal(found, start[name])


def test_a_run_with_muon_that_was_stopped_and_resumed_equals_an_uninterrupted_one(data, tmp_path):
    main(arguments(data, tmp_path / "whole", **MUON))
    main(arguments(data, tmp_path / "stopped", stop_at_step=3, **MUON))
    main(arguments(data, tmp_path / "stopped", "--resume_from_checkpoint", "latest", **MUON))
    for name in ("model.safetensors", "optimizer.safetensors"):
        first, second = (tmp_path / run / "checkpoint-6" / name for run in ("whole", "stopped"))
        assert first.read_bytes() == second.read_bytes()
    state = load_file(tmp_path / "whole" / "checkpoint-6" / "optimizer.safetensors")
    kept = {name.rpartition(".")[2] for name in state if ".layers." in name and "norm" not in name}
    assert kept == {"momentum_buffer"}
    assert any(name.endswith("exp_avg_sq") for name in state)


def test_another_optimizer_cannot_take_over_a_checkpoint(data, tmp_path):
    main(arguments(data, tmp_path / "run", stop_at_step=1, **MUON))
    with pytest.raises(CheckpointStateError, match="the option 'optimizer' has changed"):
        main(arguments(data, tmp_path / "run", "--resume_from_checkpoint", "latest", eval_steps=0))


def test_muon_is_refused_where_processes_hold_parts_of_the_matrices():
    accelerator = Accelerator(cpu=True)
    refuse_muon_in_parts(accelerator)
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    with pytest.raises(ConfigError, match="'optimizer' is muon, which needs whole matrices.*--optimizer adamw"):
        refuse_muon_in_parts(accelerator)


class OneBatch:
    size = SplitSize(8, 128)


def batch_of(valid_entries):
    generator = torch.Generator().manual_seed(0)
    valid = torch.tensor(valid_entries, dtype=torch.int32)
    tokens = torch.randn(*valid.shape, 24, generator=generator) * (torch.arange(24) < valid[..., None])
    index = torch.arange(valid.shape[1]).expand(len(valid), -1)
    return {
        "tokens": tokens.half(),
        "valid_entries": valid,
        "positions": torch.stack([index, index // 9, index % 9], dim=-1),
    }


def test_a_mask_is_made_only_where_an_entry_is_padding():
    full, partly = batch_of([[24] * 16] * 2), batch_of([[24] * 16, [24] * 15 + [3]])
    empty = batch_of([[24] * 16, [24] * 15 + [0]])
    assert [all_attended(batch) for batch in (full, partly, empty)] == [True, True, False]
    assert to_device(full, torch.device("cpu"))[1] is None
    mask = to_device(partly, torch.device("cpu"))[1]
    assert torch.equal(mask.sum(-1), partly["valid_entries"])


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    "model", [{}, {"token_standardization": True, "linear_path": True, "loss_normalization": "token"}]
)
def test_a_step_without_masks_is_the_step_with_masks_of_all(monkeypatch, precision, model):
    weights = []
    for with_mask in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        if with_mask:
            monkeypatch.setattr("trainers.pretraining.pretrain_trainer.all_attended", lambda batch: False)
            monkeypatch.setattr(
                "trainers.pretraining.pretrain_trainer.to_device",
                lambda batch, device: (
                    batch["tokens"].float(),
                    torch.ones(batch["tokens"].shape, dtype=torch.bool),
                    batch["positions"],
                ),
            )
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        config = PretrainConfig(batch_size=2, max_steps=9, learning_rate=1e-2, max_grad_norm=1.0)
        trainer = PretrainTrainer(
            config, accelerator, small_model(**model), OneBatch(), None, WSLFeatureExtractor(token_size=24), {}
        )
        trainer.unwrapped.train()
        for _ in range(3):
            trainer.train_step([batch_of([[24] * 16] * 2), batch_of([[24] * 16] * 2)])
        weights.append(torch.cat([p.detach().flatten() for p in trainer.unwrapped.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


FAULTS = """
import json, resource, torch
from trainers.freed_memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.empty(2**24).fill_(1.0)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
keep_freed_memory()
for _ in range(5):
    faults()  # until the heap is as large as it must be
print(json.dumps([given_back, faults()]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told")
def test_memory_that_was_freed_is_there_for_the_next_step():
    output = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    given_back, kept = json.loads(output.stdout)
    assert given_back > 100 and kept < given_back / 10
