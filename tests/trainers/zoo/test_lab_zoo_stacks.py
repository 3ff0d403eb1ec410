"""Stacked members against a plain loop over one member, with torch's own network and optimizers."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from trainers.data.example_order import ExampleOrder
from trainers.zoo.members import Member
from trainers.zoo.small_cnn import SmallCNN, stacked_logits
from trainers.zoo.stack import Stack
from trainers.zoo.stacked_training import StackedOptimizer, train_stack
from trainers.zoo.zoo_config import ZooConfig
from trainers.zoo.zoo_images import ZooImages


EPOCHS, BATCH = 2, 10
CONFIG = ZooConfig(data={"images": "x"}, epochs=EPOCHS, batch_size=BATCH, output_dir="x")
OPTIMIZERS = {
    "sgd": lambda *args, **options: torch.optim.SGD(*args, momentum=0.9, **options),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    labels = {split: torch.arange(count) % 4 for split, count in (("train", 45), ("validation", 12), ("test", 12))}
    pixels = {
        split: torch.randn(len(true), 1, 20, 20, generator=generator) + true[:, None, None, None] / 2
        for split, true in labels.items()
    }
    return ZooImages(pixels, labels, None, 4)


def member(index, optimizer="adam", dropout=0.0, rate=None):
    rate = rate or 1e-2 / (index + 1)
    return Member(f"m{index}", 10 + index, optimizer, "tanh", "default", dropout, rate, 0.01 * index, "train")


def network(index):
    torch.manual_seed(index)
    return SmallCNN(num_classes=4, img_size=20, act_layer="tanh")


def trained(members, images):
    stack = Stack([network(int(m.name[1:])) for m in members], members)
    measured = list(train_stack(stack, images, CONFIG))
    return stack.parameters.detach().clone(), measured


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_stacked_logits_and_gradients_are_those_of_each_network(shared, channels):
    torch.manual_seed(0)
    networks = [SmallCNN(in_chans=channels) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(networks)
    images = torch.randn(*(() if shared else (3,)), 5, channels, 28, 28)
    logits = stacked_logits(parameters, networks[0].act, images)
    weights = torch.randn(logits.shape)
    gradients = torch.autograd.grad((logits * weights).sum(), list(parameters.values()))
    for index, one in enumerate(networks):
        own = one(images if shared else images[index])
        torch.testing.assert_close(logits[index], own, rtol=1e-5, atol=1e-5)
        expected = torch.autograd.grad((own * weights[index]).sum(), list(one.parameters()))
        for found, true in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found[index], true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_member_of_a_stack_is_trained_as_a_plain_loop_trains_it(images, optimizer):
    members = [member(index, optimizer) for index in range(3)]
    parameters, measured = trained(members, images)
    for index, one in enumerate(members):
        alone = network(index)
        steps = OPTIMIZERS[optimizer](alone.parameters(), lr=one.learning_rate, weight_decay=one.weight_decay)
        order = ExampleOrder(45, BATCH, 1, 0, 1, one.seed)
        for epoch in range(1, EPOCHS + 1):
            for chosen in order.batches(epoch):
                steps.zero_grad()
                cross_entropy(alone(images.pixels["train"][chosen]), images.labels["train"][chosen]).backward()
                steps.step()
        flat = torch.cat([tensor.detach().flatten() for tensor in alone.parameters()])
        torch.testing.assert_close(parameters[index], flat, rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            loss = cross_entropy(alone(images.pixels["test"]), images.labels["test"]).item()
        assert measured[-1].metrics["test_loss"][index] == pytest.approx(loss, rel=1e-3)


def test_dropout_of_a_member_follows_from_its_own_seed_and_rate(images):
    members = [member(index, dropout=0.1 * (index + 1)) for index in range(3)]
    together, _ = trained(members, images)
    without, _ = trained([member(1)], images)
    for index, one in enumerate(members):
        alone, _ = trained([one], images)
        torch.testing.assert_close(together[index], alone[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(together[1], without[0], atol=1e-2)


def test_dropout_keeps_its_share_and_the_mean(images):
    stack = Stack([network(0), network(1)], [member(0, dropout=0.2), member(1, dropout=0.6)])
    first, second = stack._dropouts(2000)
    assert first.shape == (2, 2000, 4) and second.shape == (2, 2000, 20)
    assert np.allclose((second == 0).double().mean((1, 2)), [0.2, 0.6], atol=0.02)
    assert np.allclose(second.mean((1, 2)), 1, atol=0.04)


def test_a_member_that_diverges_changes_nothing_in_its_neighbors(images):
    calm = [member(0, "sgd"), member(2, "sgd")]
    alone, _ = trained(calm, images)
    together, measured = trained([calm[0], member(1, "sgd", rate=1e30), calm[1]], images)
    torch.testing.assert_close(together[[0, 2]], alone, rtol=1e-4, atol=1e-5)
    assert list(measured[-1].diverged) == [1]
    assert "not finite in epoch 1" in measured[-1].diverged[1]


def test_a_stack_whose_members_all_diverged_is_trained_no_further(images, monkeypatch):
    steps, step = [], StackedOptimizer.step
    monkeypatch.setattr(StackedOptimizer, "step", lambda self, gradient: (steps.append(1), step(self, gradient)))
    _, measured = trained([member(index, "sgd", rate=1e38) for index in (1, 2)], images)
    assert len(measured) == 1 and sorted(measured[0].diverged) == [0, 1]
    assert len(steps) < 45 // BATCH


def test_the_same_seed_gives_the_same_bits(images):
    members = [member(index, dropout=0.3) for index in range(2)]
    assert torch.equal(trained(members, images)[0], trained(members, images)[0])


@pytest.mark.parametrize("channels, parameters", [(1, 2464), (3, 2864)])
def test_the_small_cnn_has_the_parameters_of_the_literatures(channels, parameters):
    assert sum(p.numel() for p in SmallCNN(in_chans=channels).parameters()) == parameters


def test_the_small_cnn_refuses_images_that_are_too_small():
    with pytest.raises(ValueError, match="at least 20 pixels a side, not 16"):
        SmallCNN(img_size=16)
