"""What a pretraining step is made of: the optimizer, masks only where something is padded, users' callbacks, rows."""

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
from transformers import TrainerCallback
from window_fixtures import SMALL_MODEL, write_dataset

from hf_wsl.options import ConfigError
from modeling_wsl import WSLConfig, WSLFeatureExtractor, WSLForPreTraining
from trainers import PretrainConfig, PretrainTrainer, WindowCollator
from trainers.checkpointing import CheckpointStateError
from trainers.data.windows.crops import Crop
from trainers.data.windows.dataset_source import SplitSize, load_windows
from trainers.data.windows.window_data import WindowDataset
from trainers.data.windows.window_inputs import model_inputs
from trainers.distribution import refuse_muon_in_parts
from trainers.optimization import block_matrices, muon_with_adamw
from trainers.pretrain import main
from trainers.pretraining.step_sums import counted_weights


pytestmark = pytest.mark.usefixtures("one_thread_and_a_fresh_accelerator")
MUON_OPTIONS = {"learning_rate": 1e-2, "weight_decay": 0.1, "momentum": 0.95, "betas": (0.95, 0.999), "eps": 1e-8}
MUON = {"optim": "muon", "learning_rate": 1e-2, "eval_steps": 0, "logging_steps": 1}


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
    optimizer = muon_with_adamw(model, **MUON_OPTIONS)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]
    of_muon = {name for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2}
    assert groups[0] == of_muon and len(of_muon) == 2 * 2 * 6
    assert set.union(*groups) == set(names.values()) and sum(map(len, groups)) == len(names)


def test_both_optimizers_step_as_alone_also_after_their_state_was_loaded():
    together, alone = small_model(), small_model()
    optimizer = muon_with_adamw(together, **MUON_OPTIONS)
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
            again = muon_with_adamw(together, **MUON_OPTIONS)
            again.load_state_dict(optimizer.state_dict())
            optimizer = again
        for group in (*optimizer.param_groups, *muon.param_groups, *adamw.param_groups):
            group["lr"] = rate
        for group in (*(g for g in optimizer.param_groups if "betas" in g), *adamw.param_groups):
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
    with pytest.raises(CheckpointStateError, match="the option 'optim' has changed"):
        main(arguments(data, tmp_path / "run", "--resume_from_checkpoint", "latest", eval_steps=0))


def test_muon_is_refused_where_processes_hold_parts_of_the_matrices():
    accelerator = Accelerator(cpu=True)
    refuse_muon_in_parts(accelerator)
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    with pytest.raises(ConfigError, match="'optim' is muon, which needs whole matrices.*--optim adamw"):
        refuse_muon_in_parts(accelerator)


class TheseBatches:
    """What stands in the place of training windows: the same two passes at every step."""

    size = SplitSize(8, 128)

    def __init__(self, *passes):
        self.passes = passes

    def __len__(self):
        return self.size.windows

    def batches(self, plan, first, last):
        return (batch for _ in range(first, last) for batch in self.passes)

    def state(self):
        return []


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
    cpu = torch.device("cpu")
    assert [model_inputs(batch, cpu)["attend_all"] for batch in (full, partly, empty)] == [True, True, False]
    assert model_inputs(full, cpu)["token_mask"] is None
    mask = model_inputs(partly, cpu)["token_mask"]
    assert torch.equal(mask.sum(-1), partly["valid_entries"])


def trainer_of(folder, *passes, callbacks=None, **options):
    model = options.pop("model", {})
    options = {"max_steps": 3, "learning_rate": 1e-2, "max_grad_norm": 1.0, "precision": "float32", **options}
    config = PretrainConfig(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=2, report_to=[], **options
    )
    batches = TheseBatches(*passes)
    return PretrainTrainer(
        small_model(**model), config, batches, None, WSLFeatureExtractor(token_size=24), callbacks=callbacks
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "model", [{}, {"token_standardization": True, "linear_path": True, "loss_normalization": "token"}]
)
def test_a_step_without_masks_is_the_step_with_masks_of_all(monkeypatch, tmp_path, precision, model):
    weights = []
    for with_mask in (False, True):
        if with_mask:
            monkeypatch.setattr(
                "trainers.pretraining.pretrain_trainer.model_inputs",
                lambda batch, device: {
                    "tokens": batch["tokens"].float(),
                    "token_mask": torch.ones(batch["tokens"].shape, dtype=torch.bool),
                    "positions": batch["positions"],
                    "attend_all": False,
                },
            )
        passes = [batch_of([[24] * 16] * 2), batch_of([[24] * 16] * 2)]
        options = {"precision": precision, "gradient_accumulation_steps": 2, "model": model}
        trainer = trainer_of(tmp_path / str(with_mask), *passes, **options)
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_a_step_is_that_of_a_plain_loop_in_torch(tmp_path):
    """A trainer without views, noise and contrast, beside the few lines that say what it does."""
    model = {"noise_std": 0.0, "contrastive_weight": 0.0}
    passes = [batch_of([[24] * 16] * 2), batch_of([[24] * 16, [24] * 9 + [3] + [0] * 6])]
    options = {"gradient_accumulation_steps": 2, "weight_decay": 0.1, "lr_scheduler_type": "constant", "model": model}
    trainer = trainer_of(tmp_path / "run", *passes, **options)
    plain = small_model(**model)
    plain.projection.requires_grad_(False)
    trained = [p for p in plain.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.1}]
    groups.append({"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.95, 0.999))
    inputs = [model_inputs(batch, torch.device("cpu")) for batch in passes]
    counts = [counted_weights(plain.config, each) for each in inputs]
    for _ in range(3):
        for each, count in zip(inputs, counts, strict=True):
            loss = plain(**each, make_views=False).loss_reconstruction
            (loss * count / sum(counts)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    trainer.train()
    for (name, found), expected in zip(trainer.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            found, expected, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


class Watching(TrainerCallback):
    """A user's callback: it reads what Trainer gives it, and ends the run."""

    def __init__(self):
        self.epochs, self.logged = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.epochs.append(state.epoch)
        control.should_training_stop = state.global_step == 3

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append(logs)


def test_a_users_callback_sees_the_epochs_of_the_data_and_can_stop_the_run(tmp_path):
    watching = Watching()
    trainer = trainer_of(
        tmp_path / "run", batch_of([[24] * 16] * 2), callbacks=[watching], max_steps=20, logging_steps=1, save_steps=2
    )
    trainer.train()
    assert watching.epochs == [0.25, 0.5, 0.75]  # two windows a step of eight
    assert [line["epoch"] for line in watching.logged if "loss" in line] == watching.epochs
    assert (tmp_path / "run" / "checkpoint-2" / "model.safetensors").is_file()
    assert trainer.status == "interrupted"


def test_rows_of_a_dataset_train_and_go_through_the_model_as_batches(data, tmp_path):
    windows = load_windows(str(data))
    config = PretrainConfig(
        output_dir=str(tmp_path / "run"), use_cpu=True, max_steps=2, per_device_train_batch_size=2, precision="float32"
    )
    model = small_model()
    trainer = PretrainTrainer(model, config, windows["train"], windows["validation"])
    trainer.train()
    assert trainer.status == "completed" and [line["step"] for line in trainer.r2_history] == [0, 2]
    model.eval()
    batch = WindowCollator()(windows["train"][:4])
    assert batch["tokens"].shape == (4, 40, 24) == batch["token_mask"].shape and batch["positions"].shape == (4, 40, 3)
    together = model(**batch, return_loss=False).reconstruction
    rows = [windows["train"][row] for row in range(4)]
    for row, single in enumerate(rows):
        alone = model(**WindowCollator()([single]), return_loss=False).reconstruction[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-5, rtol=1e-4)
        crop = Crop(row, 0, single["num_tokens"])
        expected = model_inputs(WindowDataset(windows["train"]).__getitems__([crop]), torch.device("cpu"))
        assert torch.equal(batch["positions"][row, : crop.length], expected["positions"][0])
        assert torch.equal(batch["tokens"][row, : crop.length], expected["tokens"][0])
