"""The digits and the zoo that is trained on them."""

import json
import shutil

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from trainers.data.images.digits import digits_splits
from trainers.zoo.digits_zoo import (
    ARCHITECTURES,
    DigitsZooConfig,
    build_digits_zoo,
    digits_members,
    new_model,
    read_properties,
)


SMALL = DigitsZooConfig(families=("efficientnet", "resnet"), members_per_family=2, epochs=1)


@pytest.fixture(autouse=True)
def no_precision_from_another_test():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    return folder, build_digits_zoo(folder, SMALL, num_workers=2)


def test_the_split_is_the_same_every_time_stratified_and_without_overlap():
    first, second = digits_splits(8), digits_splits(8)
    assert {name: len(part) for name, part in first.items()} == {"train": 1077, "validation": 360, "test": 360}
    for name, part in first.items():
        assert torch.equal(part.tensors[0], second[name].tensors[0])
        counts = torch.bincount(part.tensors[1], minlength=10) / len(part)
        assert counts.min() > 0.09
    rows = torch.cat([part.tensors[0].flatten(1) for part in first.values()])
    assert len(rows.unique(dim=0)) == 1797  # no two digits are equal, so none is in two splits


def test_images_have_the_size_that_was_asked_for_and_lie_between_minus_one_and_one():
    images, labels = digits_splits(16)["train"].tensors
    assert images.shape == (1077, 1, 16, 16)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert images.min() == -1
    assert images.max() <= 1


def test_a_size_that_would_throw_pixels_away_is_refused():
    with pytest.raises(ValueError, match="image_size is 4"):
        digits_splits(4)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_architecture_takes_its_images_and_has_between_100_and_320_thousand_weights(family: str):
    architecture = ARCHITECTURES[family]
    model = new_model(family, seed=0)
    logits = model(torch.zeros(2, 1, architecture.image_size, architecture.image_size))
    assert logits.shape == (2, 10)
    assert 100_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 320_000


def test_a_new_model_follows_from_its_seed_and_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, same, other = (new_model("resnet", seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["conv1.0.weight"], other["conv1.0.weight"])


def test_no_two_members_share_a_seed_and_a_member_keeps_its_seed_in_a_larger_zoo():
    large, small = digits_members(DigitsZooConfig(members_per_family=6)), digits_members(SMALL)
    assert len({member.seed for member in large}) == len(large)
    seeds = {member.name: member.seed for member in large}
    assert all(seeds[member.name] == member.seed for member in small)


def test_timm_loads_a_member_bit_for_bit_with_its_preprocessing(zoo):
    for folder in zoo[1]:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        stored = load_file(folder / "model.safetensors")
        assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
        assert model.pretrained_cfg["input_size"] == (1, 16, 16)
        assert tuple(model.pretrained_cfg["mean"]) == (0.5,)


def test_a_loaded_member_reaches_the_accuracy_that_its_properties_claim(zoo):
    folder = zoo[1][0]
    properties = read_properties(folder)
    images, labels = digits_splits(properties["image_size"])["test"].tensors
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        accuracy = float((model(images).argmax(1) == labels).double().mean())
    assert accuracy == pytest.approx(properties["test_accuracy"], abs=2 / 360)  # a tie may fall the other way
    assert len(properties["history"]) == SMALL.epochs + 1


def test_a_stopped_zoo_is_completed_with_the_same_bytes_and_finished_members_are_left_alone(zoo, tmp_path):
    folder, members = zoo
    copy = shutil.copytree(folder, tmp_path / "zoo")
    lost, kept = copy / members[0].name, copy / members[1].name
    shutil.rmtree(lost)
    unchanged = kept.stat().st_mtime_ns
    build_digits_zoo(copy, SMALL, num_workers=1)  # one process here, two there: the weights must not depend on it
    assert (lost / "model.safetensors").read_bytes() == (members[0] / "model.safetensors").read_bytes()
    assert read_properties(lost) == read_properties(members[0])
    assert kept.stat().st_mtime_ns == unchanged


def test_a_folder_with_another_zoo_is_refused_and_says_what_differs(zoo):
    with pytest.raises(ValueError, match="epochs was 1, now 2"):
        build_digits_zoo(zoo[0], DigitsZooConfig(families=SMALL.families, members_per_family=2, epochs=2))


def test_nothing_is_left_beside_the_members_and_the_zoos_settings(zoo):
    folder, members = zoo
    assert sorted(p.name for p in folder.iterdir()) == sorted([*(m.name for m in members), ".lock", "settings.json"])
    assert json.loads((folder / "settings.json").read_text())["epochs"] == 1


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="lstm.*choose among resnet, convnext"):
        DigitsZooConfig(families=("lstm",))
