"""The training loop that the zoo and every compared arm share."""

import os
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from interrupted_runs import hashes, run_and_die
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

from hf_wsl import files
from trainers import checkpointing, run_trainer
from trainers.checkpointing import CheckpointStateError
from trainers.data.example_order import EpochDataset
from trainers.finetuning.finetune_trainer import DivergedError, FinetuneOptions, finetune, measure
from trainers.finetuning.tasks import CAUSAL_LANGUAGE_MODELING


@pytest.fixture(autouse=True)
def no_precision_from_another_test():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)  # Accelerate allows one precision a process


class Recorded(Dataset):
    """Images that remember in which order they were asked for."""

    def __init__(self, images: TensorDataset):
        self.images, self.asked = images, []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        self.asked.append(index)
        return self.images[index]


def images(count: int = 70, classes: int = 3, size: int = 8) -> TensorDataset:
    """Images whose brightest third tells their class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    pixels = 0.3 * torch.randn(count, 1, size, size, generator=generator)
    pixels += torch.nn.functional.one_hot(labels, size).float()[:, None, :, None]
    return TensorDataset(pixels, labels)


def linear(classes: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))


CPU = {"use_cpu": True, "per_device_train_batch_size": 16}


def test_training_learns_and_reports_every_epoch_and_the_start():
    history = finetune(linear(), images(), images(), FinetuneOptions(num_train_epochs=4, learning_rate=0.05, **CPU))
    assert [measured.epoch for measured in history] == [0, 1, 2, 3, 4]
    assert [measured.step for measured in history] == [0, 5, 10, 15, 20]
    assert [measured.examples for measured in history] == [0, 70, 140, 210, 280]
    assert history[0].train_loss is None
    assert history[-1].metrics["accuracy"] > 0.95
    assert history[-1].metrics["loss"] < history[0].metrics["loss"]


def test_two_models_of_different_size_see_the_same_images_in_the_same_order():
    orders = []
    for hidden in (4, 32):
        torch.manual_seed(hidden)  # whatever was drawn before must not matter
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.Dropout(0.5), nn.Linear(hidden, 3))
        data = Recorded(images())
        finetune(model, data, images(), FinetuneOptions(num_train_epochs=2, seed=7, **CPU))
        orders.append(data.asked)
    assert orders[0] == orders[1]
    assert sorted(orders[0][:70]) == list(range(70))
    assert orders[0][:70] != orders[0][70:]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    def trained(seed: int) -> torch.Tensor:
        model = linear()
        finetune(model, images(), images(), FinetuneOptions(num_train_epochs=1, seed=seed, **CPU))
        return model[1].weight.detach()

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


def test_no_epoch_measures_the_model_and_changes_nothing():
    model = linear()
    before = model[1].weight.detach().clone()
    history = finetune(
        model, images(), images(), FinetuneOptions(num_train_epochs=0, lr_scheduler_type="onecycle", **CPU)
    )
    assert torch.equal(model[1].weight, before)
    assert history[0].metrics == measure(model, images(), use_cpu=True)


def test_evaluation_counts_every_image_once_whatever_the_batch_size():
    model = linear()
    logits = model(images().tensors[0]).detach()
    labels = images().tensors[1]
    for batch_size in (1, 33, 70, 500):
        found = measure(model, images(), batch_size=batch_size, use_cpu=True)
        assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
        assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)


def test_a_model_comes_back_contiguous_with_its_forward_as_it_was():
    model = timm.create_model("test_resnet", num_classes=3, in_chans=1)
    history = finetune(model, images(size=16), images(size=16), FinetuneOptions(num_train_epochs=1, **CPU))
    assert all(tensor.is_contiguous() for tensor in model.state_dict().values())
    assert "forward" not in vars(model)
    assert len(history) == 2


def test_weight_decay_shrinks_matrices_and_leaves_biases_alone():
    model = linear()
    with torch.no_grad():
        model[1].bias.fill_(1)
    frozen = TensorDataset(torch.zeros(16, 1, 8, 8), torch.zeros(16, dtype=torch.long))
    before = model[1].weight.norm()
    config = FinetuneOptions(num_train_epochs=3, learning_rate=1e-3, weight_decay=50.0, **CPU)
    finetune(model, frozen, frozen, config)
    assert model[1].weight.norm() < 0.9 * before  # no image has a lit pixel: decay alone moved it
    assert (model[1].bias - 1).abs().max() < 0.01


def test_a_last_batch_of_one_image_does_not_stop_a_batch_norm():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3))
    finetune(model, images(33), images(), FinetuneOptions(num_train_epochs=1, **CPU))


def test_a_label_without_a_logit_is_refused_with_the_number_of_classes_that_is_needed():
    with pytest.raises(ValueError, match="Label 2 has no logit.*gives 2.*with 3 classes"):
        finetune(linear(classes=2), images(), images(), FinetuneOptions(num_train_epochs=1, **CPU))


def test_an_empty_dataset_is_refused_by_name():
    empty = TensorDataset(torch.empty(0, 1, 8, 8), torch.empty(0, dtype=torch.long))
    with pytest.raises(ValueError, match="validation dataset is empty"):
        finetune(linear(), images(), empty, FinetuneOptions(**CPU))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_learning_rate():
    broken = images()
    broken.tensors[0][5] = float("nan")
    with pytest.raises(DivergedError, match=r"loss is nan at step 5 \(epoch 1\).*0.25"):
        finetune(linear(), broken, images(), FinetuneOptions(num_train_epochs=2, learning_rate=0.25, **CPU))


@pytest.mark.parametrize(
    ("option", "value"),
    [("num_train_epochs", -1), ("per_device_train_batch_size", 0), ("learning_rate", 0.0), ("precision", "fp8")],
)
def test_an_impossible_option_is_refused_by_name(option: str, value):
    with pytest.raises(ValueError, match=option):
        FinetuneOptions(**{option: value})


def test_bf16_computes_in_bfloat16_keeps_float32_weights_and_takes_autocast_off_again():
    model, seen = linear(), []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    config = FinetuneOptions(num_train_epochs=3, learning_rate=0.05, precision="bfloat16", **CPU)
    history = finetune(model, images(), images(), config)
    assert set(seen[1:]) == {torch.bfloat16}  # the first pass asks how many classes there are
    assert model[1].weight.dtype == torch.float32
    assert history[-1].metrics["accuracy"] > 0.9
    seen.clear()
    model(images().tensors[0])
    assert seen == [torch.float32]


class Noisy(EpochDataset):
    """Images with noise that follows from seed, epoch and index."""

    def __init__(self, images: TensorDataset):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        image, label = self.images[index]
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch, index)))
        return image + 0.1 * torch.randn(image.shape, generator=generator), label


class Blocks(Dataset):
    """Blocks of tokens that count up."""

    def __init__(self, count: int, length: int = 8, vocab_size: int = 20):
        self.count, self.length, self.vocab_size = count, length, vocab_size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        return {"input_ids": (torch.arange(self.length) + index) % self.vocab_size}


def gpt2(vocab_size: int = 20) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab_size, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def convolutional() -> nn.Module:
    """Batch norm, dropout and a channels-last convolution: everything that has state or draws numbers."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, 3))
    return nn.Sequential(*layers)


def test_a_language_model_learns_to_count_and_its_figures_are_per_predicted_token():
    model, config = (
        gpt2(),
        FinetuneOptions(num_train_epochs=6, learning_rate=0.02, lr_scheduler_type="onecycle", **CPU),
    )
    history = finetune(model, Blocks(60), Blocks(20), config, task=CAUSAL_LANGUAGE_MODELING)
    assert set(history[0].metrics) == {"loss", "perplexity", "accuracy", "f1"}
    assert history[0].metrics["loss"] == pytest.approx(3.0, abs=0.2)  # log 20
    assert history[-1].metrics["accuracy"] > 0.9
    tokens = torch.stack([Blocks(20)[index]["input_ids"] for index in range(20)])
    with torch.no_grad():
        expected = float(model.eval()(tokens, labels=tokens).loss)
    assert history[-1].metrics["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_language_models_vocabulary_and_longest_input_are_checked_before_any_step():
    for model, length, reason in (
        (gpt2(vocab_size=12), 8, "Label 19 has no logit.*gives 12"),
        (gpt2(), 9, "9 tokens, the model takes 8"),
        (linear(), 8, "no language model"),
    ):
        with pytest.raises(ValueError, match=reason):
            finetune(model, Blocks(20, length), Blocks(20, length), task=CAUSAL_LANGUAGE_MODELING)


def test_images_that_a_model_cannot_take_are_refused_with_their_shape():
    with pytest.raises(ValueError, match=r"cannot take images of shape \(1, 9, 9\)"):
        finetune(linear(), images(size=9), images(size=9), FinetuneOptions(**CPU))


def test_measurements_come_every_so_many_steps_and_at_the_end():
    config = FinetuneOptions(max_steps=12, eval_steps=5, per_device_eval_batch_size=10, eval_batches=3, **CPU)
    history = finetune(linear(), images(), images(), config)
    assert [measured.step for measured in history] == [0, 5, 10, 12]
    assert [measured.examples for measured in history] == [0, 70, 140, 172]
    assert history[-1].epoch == pytest.approx(172 / 70)


def test_a_capped_evaluation_takes_evenly_spaced_examples_of_all_classes():
    ordered = images()
    by_class = ordered.tensors[1].sort(stable=True).indices
    ordered = TensorDataset(ordered.tensors[0][by_class], ordered.tensors[1][by_class])
    model = linear()
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([1.0, 0.0, 0.0]))  # always says class 0
    config = FinetuneOptions(num_train_epochs=0, per_device_eval_batch_size=5, eval_batches=6, **CPU)
    assert finetune(model, images(), ordered, config)[0].metrics["accuracy"] == pytest.approx(1 / 3, abs=0.05)


def test_accumulated_batches_take_the_step_of_one_large_batch():
    def trained(batch_size: int, accumulation: int) -> torch.Tensor:
        model = linear()
        config = FinetuneOptions(
            num_train_epochs=2,
            use_cpu=True,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        )
        finetune(model, Noisy(images(72)), images(), config)
        return model[1].weight.detach()

    torch.testing.assert_close(trained(8, 4), trained(32, 1), atol=1e-6, rtol=1e-5)


def test_processes_that_load_examples_change_nothing():
    def trained(num_workers: int) -> torch.Tensor:
        model = linear()
        finetune(
            model,
            Noisy(images()),
            images(),
            FinetuneOptions(num_train_epochs=2, dataloader_num_workers=num_workers, **CPU),
        )
        return model[1].weight.detach()

    assert torch.equal(trained(0), trained(2))


class Failing(Noisy):
    """Stops a run at the `left`-th example."""

    left = 60

    def __getitem__(self, index: int):
        self.left -= 1
        if self.left == 0:
            raise InterruptedError
        return super().__getitem__(index)


def on_two_processes(folder: Path, train) -> list:
    """Calls `train` in two forked processes that know each other."""
    AcceleratorState._reset_state(reset_partial_state=True)
    children = [os.fork() or run_as(rank, folder, train) for rank in range(2)]
    return [os.waitpid(child, 0)[1] for child in children]


def run_as(rank: int, folder: Path, train) -> None:
    status = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"ACCELERATE_USE_CPU": "yes", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        meeting = (folder / "meeting").as_uri()
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
        train(rank)
        status = 0
    except BaseException:
        traceback.print_exc()  # pytest shows it; the parent sees the status alone
    finally:
        os._exit(status)


def test_two_processes_take_the_steps_of_one_with_twice_the_batch(tmp_path):
    config = FinetuneOptions(num_train_epochs=3, per_device_train_batch_size=8, use_cpu=True)
    model = linear()
    expected = finetune(
        model, Noisy(images()), images(33), replace(config, per_device_train_batch_size=16), progress=False
    )

    def train(rank: int) -> None:
        model = linear(seed=rank)  # the first process's counts
        history = finetune(model, Noisy(images()), images(33), config, progress=False)
        save_file(model.state_dict(), tmp_path / f"model-{rank}")
        (tmp_path / f"losses-{rank}").write_text(" ".join(str(measured.metrics["loss"]) for measured in history[1:]))

    assert on_two_processes(tmp_path, train) == [0, 0]
    for rank in (0, 1):
        for name, tensor in load_file(tmp_path / f"model-{rank}").items():
            torch.testing.assert_close(tensor, model.state_dict()[name], atol=1e-6, rtol=1e-5)
        losses = [float(loss) for loss in (tmp_path / f"losses-{rank}").read_text().split()]
        assert losses == pytest.approx([measured.metrics["loss"] for measured in expected[1:]], rel=1e-4)


def test_two_interrupted_processes_started_again_end_with_the_same_bytes(tmp_path):
    config = FinetuneOptions(num_train_epochs=3, per_device_train_batch_size=8, use_cpu=True)

    def train(rank: int) -> None:
        def run(name: str, data: Dataset) -> None:
            finetune(
                convolutional(), data, images(33), config, progress=False, output_dir=tmp_path / name, save_steps=2
            )

        run("whole", Noisy(images()))
        with pytest.raises(InterruptedError):
            run("stopped", Failing(images()))
        run("stopped", Noisy(images()))

    assert on_two_processes(tmp_path, train) == [0, 0]
    assert len(hashes(tmp_path / "whole")) == 4
    assert hashes(tmp_path / "stopped") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("schedule", ["onecycle"])
def test_a_run_killed_anywhere_and_started_again_ends_with_the_same_bytes(tmp_path, schedule):
    config = FinetuneOptions(num_train_epochs=3, weight_decay=0.1, lr_scheduler_type=schedule, **CPU)
    places = [(checkpointing, "save_module"), (run_trainer, "write_json"), (files, "move_folder")]
    places += [(files.shutil, "rmtree"), (torch, "manual_seed")]

    def run(folder: Path):
        return finetune(
            convolutional(), Noisy(images()), images(), config, progress=False, output_dir=folder, save_steps=2
        )

    expected = run(tmp_path / "whole")
    whole, attempts = hashes(tmp_path / "whole"), 0
    for at in (3, 24):
        folder = tmp_path / f"killed-{at}"
        while run_and_die(lambda: run(folder), at, places):  # noqa: B023
            attempts += 1
            if attempts > 40:
                break
            at += 7
        assert run(folder) == expected
        assert hashes(folder) == whole
    assert attempts >= 3


def test_a_finished_run_is_not_trained_again(tmp_path):
    config = FinetuneOptions(num_train_epochs=1, **CPU)
    first = linear()
    history = finetune(first, images(), images(), config, output_dir=tmp_path)
    again, data = linear(), Recorded(images())
    assert finetune(again, data, images(), config, output_dir=tmp_path) == history
    assert data.asked == []
    assert torch.equal(again[1].weight, first[1].weight)


def test_a_checkpoint_of_another_run_is_refused_and_says_what_differs(tmp_path):
    config = FinetuneOptions(num_train_epochs=1, **CPU)
    finetune(linear(), images(), images(), config, output_dir=tmp_path)
    for model, changed, reason in (
        (linear(), replace(config, seed=3), "config was"),
        (linear(seed=1), config, "initial_weights was"),
    ):
        with pytest.raises(CheckpointStateError, match=f"another run.*{reason}"):
            finetune(model, images(), images(), changed, output_dir=tmp_path)
    with pytest.raises(CheckpointStateError, match="examples was"):
        finetune(linear(), images(40), images(), config, output_dir=tmp_path)


def test_fewer_examples_than_parts_of_a_step_are_refused():
    with pytest.raises(ValueError, match="split into 4 parts.*3 training examples"):
        finetune(linear(), images(3), images(), FinetuneOptions(gradient_accumulation_steps=4, **CPU))
