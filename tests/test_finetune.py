"""The training loop that the zoo and every compared arm share."""

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from trainers.finetune import FinetuneConfig, evaluate_classifier, finetune


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


CPU = {"use_cpu": True, "batch_size": 16}


def test_training_learns_and_reports_every_epoch_and_the_start():
    history = finetune(linear(), images(), images(), FinetuneConfig(epochs=4, learning_rate=0.05, **CPU))
    assert [metrics.epoch for metrics in history] == [0, 1, 2, 3, 4]
    assert history[0].train_loss is None
    assert history[-1].validation_accuracy > 0.95
    assert history[-1].validation_loss < history[0].validation_loss


def test_two_models_of_different_size_see_the_same_images_in_the_same_order():
    orders = []
    for hidden in (4, 32):
        torch.manual_seed(hidden)  # whatever was drawn before must not matter
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.Dropout(0.5), nn.Linear(hidden, 3))
        data = Recorded(images())
        finetune(model, data, images(), FinetuneConfig(epochs=2, seed=7, **CPU))
        orders.append(data.asked)
    assert orders[0] == orders[1]
    assert sorted(orders[0][:70]) == list(range(70))
    assert orders[0][:70] != orders[0][70:]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    def trained(seed: int) -> torch.Tensor:
        model = linear()
        finetune(model, images(), images(), FinetuneConfig(epochs=1, seed=seed, **CPU))
        return model[1].weight.detach()

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


def test_no_epoch_measures_the_model_and_changes_nothing():
    model = linear()
    before = model[1].weight.detach().clone()
    history = finetune(model, images(), images(), FinetuneConfig(epochs=0, schedule="onecycle", **CPU))
    assert torch.equal(model[1].weight, before)
    loss, accuracy = evaluate_classifier(model, images(), use_cpu=True)
    assert (history[0].validation_loss, history[0].validation_accuracy) == (loss, accuracy)


def test_evaluation_counts_every_image_once_whatever_the_batch_size():
    model = linear()
    logits = model(images().tensors[0]).detach()
    labels = images().tensors[1]
    for batch_size in (1, 33, 70, 500):
        loss, accuracy = evaluate_classifier(model, images(), batch_size=batch_size, use_cpu=True)
        assert accuracy == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
        assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)


def test_a_model_comes_back_contiguous_with_its_forward_as_it_was():
    model = timm.create_model("test_resnet", num_classes=3, in_chans=1)
    history = finetune(model, images(size=16), images(size=16), FinetuneConfig(epochs=1, **CPU))
    assert all(tensor.is_contiguous() for tensor in model.state_dict().values())
    assert "forward" not in vars(model)
    assert len(history) == 2


def test_weight_decay_shrinks_matrices_and_leaves_biases_alone():
    model = linear()
    with torch.no_grad():
        model[1].bias.fill_(1)
    frozen = TensorDataset(torch.zeros(16, 1, 8, 8), torch.zeros(16, dtype=torch.long))
    before = model[1].weight.norm()
    config = FinetuneConfig(epochs=3, learning_rate=1e-3, weight_decay=50.0, **CPU)
    finetune(model, frozen, frozen, config)
    assert model[1].weight.norm() < 0.9 * before  # no image has a lit pixel: decay alone moved it
    assert (model[1].bias - 1).abs().max() < 0.01


def test_a_last_batch_of_one_image_does_not_stop_a_batch_norm():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3))
    finetune(model, images(33), images(), FinetuneConfig(epochs=1, **CPU))


def test_a_label_without_a_logit_is_refused_with_the_number_of_classes_that_is_needed():
    with pytest.raises(ValueError, match="Label 2 has no logit.*num_classes=3"):
        finetune(linear(classes=2), images(), images(), FinetuneConfig(epochs=1, **CPU))


def test_an_empty_dataset_is_refused_by_name():
    empty = TensorDataset(torch.empty(0, 1, 8, 8), torch.empty(0, dtype=torch.long))
    with pytest.raises(ValueError, match="validation dataset is empty"):
        finetune(linear(), images(), empty, FinetuneConfig(**CPU))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_learning_rate():
    broken = images()
    broken.tensors[0][5] = float("nan")
    with pytest.raises(FloatingPointError, match="epoch 1 is nan.*0.25"):
        finetune(linear(), broken, images(), FinetuneConfig(epochs=2, learning_rate=0.25, **CPU))


@pytest.mark.parametrize(
    ("option", "value"),
    [("epochs", -1), ("batch_size", 0), ("learning_rate", 0.0), ("schedule", "cosine"), ("mixed_precision", "fp8")],
)
def test_an_impossible_option_is_refused_by_name(option: str, value):
    with pytest.raises(ValueError, match=option):
        FinetuneConfig(**{option: value})


def test_bf16_computes_in_bfloat16_keeps_float32_weights_and_takes_autocast_off_again():
    model, seen = linear(), []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    config = FinetuneConfig(epochs=3, learning_rate=0.05, mixed_precision="bf16", **CPU)
    history = finetune(model, images(), images(), config)
    assert set(seen) == {torch.bfloat16}
    assert model[1].weight.dtype == torch.float32
    assert history[-1].validation_accuracy > 0.9
    seen.clear()
    model(images().tensors[0])
    assert seen == [torch.float32]
