"""Image datasets of every kind, their splits, and augmentations that follow from (seed, epoch, index)."""

import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Features, Image, Value
from image_fixtures import CLASSES, UNLABELED, image_rows, write_imagefolder, write_parquet
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as transforms

from trainers.data.data_config import ImageDataConfig
from trainers.data.images.image_crops import MEAN, STD, central_crops, crop_one, crop_together, random_crops
from trainers.data.images.image_data import load_images
from trainers.data.images.image_source import DecodedImages, EncodedImages
from trainers.data.public_dataset import PublicDatasetError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    parts = {"train": image_rows(60), "val": image_rows(12, 60), "test": image_rows(9, 72)}
    return write_parquet(tmp_path_factory.mktemp("images") / "colors", **parts)


def load(folder, **options):
    return load_images(ImageDataConfig(images=str(folder), **{"image_size": 16, **options}))


def test_a_parquet_folder_gives_its_three_splits_and_its_classes(folder):
    images = load(folder)
    assert (len(images.train), len(images.validation), len(images.test)) == (60, 12, 9)
    assert (images.num_classes, images.class_names) == (3, CLASSES)
    assert images.split_names == {"train": "train", "validation": "validation", "test": "test"}
    pixels, label = images.test[4]
    assert (pixels.shape, pixels.dtype, label) == ((3, 16, 16), torch.float32, 1)


def test_evaluation_shows_the_resized_center_normalized_with_imagenets_mean(folder):
    images = load(folder, image_size=14, center_crop=2 / 3)
    stored = image_rows(9, 72)["image"][4]
    raw = transforms.pil_to_tensor(stored).float() / 255
    center = transforms.resize(transforms.center_crop(raw, [8, 8]), [14, 14], antialias=True)
    expected = transforms.normalize(center, list(MEAN), list(STD))
    torch.testing.assert_close(images.test[4][0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [5, 16, 40])
def test_cropping_many_images_at_once_equals_torchvision_image_by_image(size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 3, 20, 31), dtype=torch.uint8, generator=generator)
    heights, widths = np.full(40, 20), np.full(40, 31)
    boxes, flips = random_crops(3, 1, np.arange(40), heights, widths, 0.08)
    together = crop_together(images, boxes, flips, size)
    one_by_one = [crop_one(*one, size) for one in zip(images, boxes, flips, strict=True)]
    assert 5 < flips.sum() < 35
    torch.testing.assert_close(together, torch.stack(one_by_one), atol=2e-6, rtol=1e-5)


def test_crops_are_distributed_as_torchvisions_are():
    count, height, width = 4000, 24, 40
    boxes, flips = random_crops(0, 0, np.arange(count), np.full(count, height), np.full(count, width), 0.08)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= [height, width]).all()
    torch.manual_seed(0)
    crop, blank = RandomResizedCrop(8), torch.zeros(3, height, width)
    drawn = [crop.make_params([blank]) for _ in range(count)]
    reference = np.array([[d[name] for name in ("top", "left", "height", "width")] for d in drawn])
    for share in (0.1, 0.5, 0.9):
        assert np.abs(np.quantile(boxes, share, 0) - np.quantile(reference, share, 0)).max() <= 1
    assert np.abs(boxes.mean(0) - reference.mean(0)).max() < 0.5
    assert abs(flips.mean() - 0.5) < 0.03


def test_an_image_too_thin_for_any_crop_gives_its_center():
    boxes, _ = random_crops(0, 0, np.arange(5), np.full(5, 4), np.full(5, 400), 1.0)
    assert (boxes == [0, 197, 4, 5]).all()
    assert (central_crops(np.array([4]), np.array([400]), 1.0) == [0, 198, 4, 4]).all()


def test_an_augmentation_follows_from_seed_epoch_and_index_and_from_nothing_else(folder):
    images = load(folder)
    images.train.begin_epoch(seed=5, epoch=2)
    alone = images.train[17][0]
    torch.manual_seed(99)
    among = images.train.__getitems__([3, 17, 40])[1][0]
    assert torch.equal(alone, among)
    other = {}
    for seed, epoch in ((5, 3), (6, 2)):
        images.train.begin_epoch(seed, epoch)
        other[seed, epoch] = images.train[17][0]
    assert not torch.equal(alone, other[5, 3])
    assert not torch.equal(alone, other[6, 2])
    assert torch.equal(images.validation[3][0], images.validation[3][0])


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_processes_change_nothing(folder, workers):
    train = load(folder).train
    train.begin_epoch(1, 4)
    batches = [list(range(start, start + 20)) for start in (0, 20, 40)]
    for here, there in zip(
        DataLoader(train, batch_sampler=batches),
        DataLoader(train, batch_sampler=batches, num_workers=workers),
        strict=True,
    ):
        assert torch.equal(here[0], there[0]) and torch.equal(here[1], there[1])


def test_images_too_many_to_keep_decoded_are_decoded_when_read_and_look_the_same(folder):
    kept, read = load(folder), load(folder, decoded_mb=0)
    assert isinstance(kept.train.source, DecodedImages) and isinstance(read.train.source, EncodedImages)
    for images in (kept, read):
        images.train.begin_epoch(3, 1)
    rows = np.arange(60)
    torch.testing.assert_close(kept.train.pixels(rows), read.train.pixels(rows), atol=2e-5, rtol=1e-4)


def test_an_imagefolder_with_images_of_many_sizes_is_split_by_class_and_always_the_same(tmp_path):
    folder = write_imagefolder(tmp_path / "folder", 60, sizes=((12, 12), (20, 9), (8, 30)))
    images, again, other = load(folder), load(folder), load(folder, seed=1)
    assert (len(images.train), len(images.validation), len(images.test)) == (48, 6, 6)
    assert images.class_names == tuple(sorted(CLASSES))
    for examples in (images.validation, images.test):
        assert np.bincount(examples.labels).tolist() == [2, 2, 2]
    assert images.facts() == again.facts()
    assert images.facts()["fingerprint"] != other.facts()["fingerprint"]
    seen = [examples.pixels(np.arange(len(examples))) for examples in (images.validation, images.test)]
    assert not any(torch.equal(one, two) for one in seen[0] for two in seen[1])


def test_where_only_a_validation_split_is_named_it_becomes_the_test_and_choices_are_made_on_training_images(tmp_path):
    folder = write_parquet(tmp_path / "data", train=image_rows(40), validation=image_rows(10, 40))
    images = load(folder)
    assert images.split_names["test"] == "validation"
    assert images.split_names["validation"] == "cut from the training split"
    assert (len(images.train), len(images.validation), len(images.test)) == (36, 4, 10)


def test_a_limit_takes_some_images_and_all_classes_stay(folder):
    images = load(folder, max_train=20, max_test=5)
    assert (len(images.train), len(images.validation), len(images.test)) == (20, 12, 5)
    assert images.num_classes == 3


def test_gray_images_have_one_channel(folder):
    images = load(folder, channels=1)
    assert images.train[0][0].shape == (1, 16, 16)
    assert images.batch_norm_images(7).shape == (7, 1, 16, 16)


def test_batch_norm_images_are_training_images_without_augmentation(folder):
    images = load(folder)
    given = images.batch_norm_images(1000)
    assert given.shape == (60, 3, 16, 16)
    images.train.begin_epoch(9, 9)
    assert torch.equal(given, images.batch_norm_images(60))


def test_facts_are_json_and_say_sizes_columns_and_classes(folder):
    facts = json.loads(json.dumps(load(folder, max_train=20).facts()))
    assert facts["sizes"] == {"train": 20, "validation": 12, "test": 9}
    assert facts["columns"] == {"image": "image", "label": "label"}
    assert sum(facts["class_counts"]["train"]) == 20


def test_text_labels_become_classes_in_alphabetical_order(tmp_path):
    rows = image_rows(30)
    rows["label"] = [CLASSES[label] for label in rows["label"]]
    features = Features({"image": Image(), "label": Value("string")})
    images = load(write_parquet(tmp_path / "data", features, train=rows))
    assert images.class_names == ("bright", "dark", "green")


def refused(folder, reason, **options):
    with pytest.raises(PublicDatasetError, match=reason):
        load(folder, **options)


def test_data_that_cannot_be_learned_from_is_refused_with_what_to_do(folder, tmp_path):
    plain = image_rows(9)
    unlabeled = write_parquet(tmp_path / "unlabeled", UNLABELED, train={"image": plain["image"], "note": ["a"] * 9})
    refused(unlabeled, "no labels.*image, note.*label_column")
    table = write_parquet(tmp_path / "table", Features({"a": Value("int64")}), train={"a": [1, 2]})
    refused(table, "no column of images")
    both = Features({"image": Image(), "fine": ClassLabel(num_classes=3), "coarse": ClassLabel(num_classes=3)})
    two = {"image": plain["image"], "fine": plain["label"], "coarse": plain["label"]}
    refused(write_parquet(tmp_path / "two", both, train=two), "label_column to one of fine, coarse")
    hidden = {"image": plain["image"], "label": [-1] * 9}
    refused(write_parquet(tmp_path / "hidden", train=plain, test=hidden), "'test' has label -1.*test_split")
    refused(folder, "no split 'dev'.*train, validation, test", validation_split="dev")
    refused(folder, "must differ", test_split="train")
    refused(folder, "no column 'color'", label_column="color")
    refused(tmp_path / "nothing", "neither a file, a folder nor a dataset id")
    refused(write_parquet(tmp_path / "few", train=image_rows(3)), "3 images, too few")


def test_something_that_is_no_image_is_refused(tmp_path):
    rows = {"image": [{"bytes": b"no image", "path": None}] * 30, "label": [0] * 30}
    refused(write_parquet(tmp_path / "broken", train=rows), "no image")


@pytest.mark.parametrize(
    "option", [{"channels": 2}, {"crop_scale_min": 0}, {"validation_fraction": 0.5}, {"image_size": 0}]
)
def test_an_impossible_option_is_refused_by_name(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        ImageDataConfig(images="x", **option)
