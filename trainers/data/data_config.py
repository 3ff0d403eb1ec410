"""Every option of a dataset of images and of a text."""

from __future__ import annotations

from dataclasses import dataclass

from datasets_scripts.schema import SPLITS
from hf_wsl.options import option


@dataclass(frozen=True)
class ImageDataConfig:
    """Which images, how they are split and how they are augmented (paper, appendix C.2).

    Raises:
        ValueError: a value that cannot work; the message names the option.
    """

    images: str = option("", "folder of Parquet files or an imagefolder, or a dataset id on the Hub")
    revision: str | None = option(None, "branch, tag or commit of a dataset on the Hub")
    subset: str | None = option(None, "configuration of a dataset on the Hub")
    image_size: int = option(224, "pixels a side of what the model sees")
    channels: int = option(3, "3 for color, 1 for gray")
    image_column: str = option("", "column of images; empty: the only one")
    label_column: str = option("", "column of labels; empty: the only one that holds classes")
    train_split: str = option("", "split to train on; empty: 'train'")
    validation_split: str = option("", "split to measure on; empty: found, or cut from the training split")
    test_split: str = option("", "split for the last measurement; empty: found, or cut from the training split")
    validation_fraction: float = option(0.1, "of the training split, where a split has to be cut from it")
    max_train: int = option(0, "training images to use, drawn at random; 0: all")
    max_validation: int = option(0, "validation images to use, drawn at random; 0: all")
    max_test: int = option(0, "test images to use, drawn at random; 0: all")
    crop_scale_min: float = option(0.08, "smallest share of a training image's area that a random crop keeps")
    flip: bool = option(True, "flip half of the training images left to right; not for digits")
    center_crop: float = option(0.875, "share of the shorter side that evaluation sees (224 of 256)")
    decoded_mb: int = option(
        4096, "keep decoded images on the disk up to this size; larger sets are decoded when read"
    )
    seed: int = option(0, "of the splits that are cut and the images that are drawn; not of the training order")

    def __post_init__(self):
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}; it must be 1 or 3.")
        for name in ("crop_scale_min", "center_crop"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in (0, 1].")
        if not 0 < self.validation_fraction < 0.5:
            raise ValueError(f"validation_fraction is {self.validation_fraction}; it must be in (0, 0.5).")
        for name in ("image_size", "max_train", "max_validation", "max_test", "decoded_mb", "seed"):
            if getattr(self, name) < (name == "image_size"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be below {int(name == 'image_size')}.")


@dataclass(frozen=True)
class TextDataConfig:
    """Which text, how it is split and how it becomes tokens.

    Raises:
        ValueError: a value that cannot work; the message names the option.
    """

    text: str = option("", "text files, folders of .txt files or dataset ids on the Hub, several separated by commas")
    revision: str | None = option(None, "branch, tag or commit of a dataset on the Hub")
    subset: str | None = option(None, "configuration of a dataset on the Hub")
    text_column: str = option("text", "column of a dataset on the Hub")
    end_of_text: bool = option(False, "put the end-of-text token after every row of a dataset on the Hub")
    tokenizer: str = option("", "folder or Hub id; empty: a byte-level BPE is trained on the training part")
    vocab_size: int = option(2048, "tokens of a tokenizer that is trained, at most")
    block_size: int = option(128, "tokens of an example")
    validation_fraction: float = option(0.1, "of every source that has no such split, near its end")
    test_fraction: float = option(0.1, "of every source that has no such split, at its end")
    max_train_tokens: int = option(0, "training tokens to use, the first ones; 0: all")
    max_validation_tokens: int = option(0, "validation tokens to use, the first ones; 0: all")
    max_test_tokens: int = option(0, "test tokens to use, the first ones; 0: all")

    def __post_init__(self):
        lowest_of = {"vocab_size": 257, "block_size": 2} | {f"max_{split}_tokens": 0 for split in SPLITS}
        for name, lowest in lowest_of.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {lowest}.")
        parts = (self.validation_fraction, self.test_fraction)
        if min(parts) <= 0 or sum(parts) >= 1:
            raise ValueError(
                f"validation_fraction={parts[0]}, test_fraction={parts[1]}: both must be above 0, their sum below 1."
            )


# The options of the data, by the name of the task that learns from them.
DATA = {"image-classification": ImageDataConfig, "causal-language-modeling": TextDataConfig}
