"""Image classification data: any image dataset that `datasets` reads, in three splits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from torch import Tensor

from hf_wsl.files import sha256

from ..data_config import ImageDataConfig
from ..example_order import EpochDataset
from ..public_dataset import PublicDatasetError, existing, read_dataset
from .image_crops import central_crops, crop_one, crop_together, normalize, random_crops
from .image_source import DecodedImages, EncodedImages, decode_all
from .image_splits import split_images


class ImageExamples(EpochDataset):
    """Images as a model takes them: float32 `[C, image_size, image_size]`, normalized, and their labels.

    Args:
        source: the images as they are.
        labels: int64 `[N]`.
        config: `image_size`, and the augmentations.
        augmented: random crops and flips, else the central crop.
    """

    def __init__(
        self, source: DecodedImages | EncodedImages, labels: np.ndarray, config: ImageDataConfig, augmented: bool
    ) -> None:
        self.source, self.labels, self.config, self.augmented = source, labels, config, augmented
        self.begin_epoch(0, 0)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        indices = np.asarray(indices)
        return list(zip(self.pixels(indices).unbind(), self.labels[indices].tolist(), strict=True))

    def pixels(self, indices: np.ndarray) -> Tensor:
        """float32 `[N, C, image_size, image_size]`."""
        images = self.source.images(indices)  # uint8 [N, C, H, W], or a list of [C, H, W]
        config, size = self.config, self.config.image_size
        heights, widths = np.array([image.shape[1:] for image in images]).T
        if self.augmented:
            scale = config.crop_scale_min
            boxes, flips = random_crops(self.seed, self.epoch, indices, heights, widths, scale)
            flips &= config.flip
        else:
            boxes, flips = central_crops(heights, widths, config.center_crop), np.zeros(len(indices), bool)
        if isinstance(images, Tensor):
            return normalize(crop_together(images, boxes, flips, size))
        return normalize(torch.stack([crop_one(*one, size) for one in zip(images, boxes, flips, strict=True)]))


@dataclass(frozen=True)
class ImageSplits:
    """Three splits of a dataset: map-style datasets of (image float32 `[C, S, S]`, label int).

    Attributes:
        train: augmented; an `EpochDataset`.
        validation, test: as evaluation sees them.
        class_names: of all labels, in their order.
        columns: names of the image and the label column.
        split_names: where each of the three came from.
    """

    config: ImageDataConfig
    train: ImageExamples
    validation: ImageExamples
    test: ImageExamples
    class_names: tuple[str, ...]
    columns: dict[str, str]
    split_names: dict[str, str]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def evenly_spaced(self, count: int) -> tuple[Tensor, Tensor]:
        """Evenly spaced training images as evaluation would show them, and their labels.

        float32 `[count or fewer, C, S, S]` and int64 `[count or fewer]`, in a random order, always the same: a dataset
        may be sorted by class, and a batch of one class has other statistics.
        """
        count = min(count, len(self.train))
        plain = ImageExamples(self.train.source, self.train.labels, self.config, augmented=False)
        chosen = np.random.default_rng(0).permutation(np.arange(count) * len(plain) // count)
        return plain.pixels(chosen), torch.from_numpy(self.train.labels[chosen].astype(np.int64))

    def batch_norm_images(self, count: int) -> Tensor:
        """The images of `evenly_spaced`."""
        return self.evenly_spaced(count)[0]

    def facts(self) -> dict[str, Any]:
        """What a result must say about its data; JSON-serializable. `fingerprint` is of labels and sampled pixels."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        sampled: list[Any] = [json.dumps([self.class_names, self.config.image_size])]
        for examples in splits.values():
            sampled.append(examples.labels.astype("<i8"))
            sample = np.arange(min(64, len(examples))) * len(examples) // min(64, len(examples))
            sampled += [image.contiguous().numpy() for image in examples.source.images(sample)]
        return {
            "images": self.config.images,
            "config": asdict(self.config),
            "sizes": {name: len(examples) for name, examples in splits.items()},
            "split_names": self.split_names,
            "columns": self.columns,
            "class_names": list(self.class_names),
            "class_counts": {
                name: np.bincount(examples.labels, minlength=self.num_classes).tolist()
                for name, examples in splits.items()
            },
            "fingerprint": sha256(sampled),
        }


def _builder(folder: Path) -> str:
    """Of `datasets`, by the files that a folder holds."""
    suffixes = {path.suffix.lower() for path in folder.rglob("*")}
    if ".parquet" in suffixes:
        return "parquet"
    if suffixes.isdisjoint(ImageFolder.EXTENSIONS):
        raise PublicDatasetError(
            f"'{folder}' holds neither Parquet files nor images, but {', '.join(sorted(suffixes)) or 'nothing'}. "
            "Write it as Parquet (datasets.Dataset.to_parquet), or as images in one folder a class."
        )
    return "imagefolder"


def load_images(config: ImageDataConfig) -> ImageSplits:
    """Reads a dataset, finds its columns and splits, and decodes small images once.

    A dataset without a test split gives its validation split for it; what is missing then is cut from the training
    split, each class in proportion. Decoded images lie in the cache of `datasets`, where other processes find them.

    Raises:
        PublicDatasetError: no such dataset, split or column; no images, no labels, labels that are hidden (-1); an
            empty split.
    """
    if not config.images:
        raise PublicDatasetError("no images are given; set --data.images to a folder or a dataset id on the Hub.")
    path = existing(config.images)
    if path is None:
        splits = read_dataset(config.images, revision=config.revision, subset=config.subset)
    elif not path.is_dir():
        raise PublicDatasetError(f"'{path}' is a file; give the folder of the dataset.")
    else:
        splits = read_dataset(config.images, _builder(path), data_dir=str(path))
    found = split_images(dict(splits), config)
    parts = {}
    for name, limit in (("train", config.max_train), ("validation", config.max_validation), ("test", config.max_test)):
        rows, labels = found.rows[name], found.labels[name]
        if limit and limit < len(rows):
            kept = np.sort(np.random.default_rng(config.seed).permutation(len(rows))[:limit])
            rows, labels = rows.select(kept), labels[kept]
        source = decode_all(rows, found.image_column, config.channels, config.decoded_mb)
        parts[name] = ImageExamples(source, labels, config, augmented=name == "train")
    columns = {"image": found.image_column, "label": found.label_column}
    return ImageSplits(config, **parts, class_names=found.class_names, columns=columns, split_names=found.names)
