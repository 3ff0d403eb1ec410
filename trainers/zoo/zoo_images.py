"""The images of a lab zoo, in memory, as its members see them."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hf_wsl.options import ConfigError

from ..data.data_config import ImageDataConfig
from ..data.images.image_data import ImageExamples, load_images


MAX_BYTES = 4_000_000_000  # of pixels in a process: every worker holds all of them


@dataclass(frozen=True)
class ZooImages:
    """Images and labels of the three splits.

    Attributes:
        pixels: split -> float32 `[N, C, S, S]`, normalized, as evaluation sees them.
        labels: split -> int64 `[N]`.
        augmented: the training images with their augmentations.
        num_classes: of the labels.
    """

    pixels: dict[str, Tensor]
    labels: dict[str, Tensor]
    augmented: ImageExamples
    num_classes: int

    def evenly(self, split: str, count: int) -> tuple[Tensor, Tensor]:
        """`count` evenly spaced images of a split and their labels; all where count is 0."""
        total = len(self.labels[split])
        if not 0 < count < total:
            return self.pixels[split], self.labels[split]
        chosen = torch.arange(count) * total // count
        return self.pixels[split][chosen], self.labels[split][chosen]

    def batch(self, indices: list[np.ndarray], seeds: list[int], epoch: int, augment: bool) -> tuple[Tensor, Tensor]:
        """One batch of training images a member: `[M, B, C, S, S]` and their labels `[M, B]`.

        Args:
            indices: `[B]` a member.
            seeds, epoch: decide the augmentations, with the image's index.
        """
        where = torch.from_numpy(np.stack(indices))
        if not augment:
            return self.pixels["train"][where], self.labels["train"][where]
        images = []
        for seed, chosen in zip(seeds, indices, strict=True):
            self.augmented.begin_epoch(seed, epoch)
            images.append(self.augmented.pixels(chosen))
        return torch.stack(images), self.labels["train"][where]


@lru_cache(maxsize=1)  # a worker process trains many stacks on them
def zoo_images(config: ImageDataConfig) -> ZooImages:
    """Reads and decodes the images.

    Raises:
        ConfigError: they would take more than 4 GB in every process.
        PublicDatasetError: as `trainers.data.images.image_data.load_images` does.
    """
    splits = load_images(config)
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    count, side = sum(map(len, parts.values())), config.image_size
    needed = count * config.channels * side**2 * torch.float32.itemsize
    if needed > MAX_BYTES:
        raise ConfigError(
            f"{count:,} images of {config.channels}x{side}x{side} numbers take {needed / 1e9:.1f} GB in every process "
            f"of a zoo; {MAX_BYTES / 1e9:g} GB is the most. Lower --data.max_train (and --data.max_validation, "
            "--data.max_test) or --data.image_size"
        )
    pixels, labels = {}, {}
    for name, examples in parts.items():
        plain = ImageExamples(examples.source, examples.labels, config, augmented=False)
        blocks = np.array_split(np.arange(len(plain)), max(1, len(plain) // 1000))
        pixels[name] = torch.cat([plain.pixels(block) for block in blocks])
        labels[name] = torch.from_numpy(examples.labels)
    return ZooImages(pixels, labels, splits.train, splits.num_classes)
