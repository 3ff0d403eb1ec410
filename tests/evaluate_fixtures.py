"""A backbone, anchors and data on which an evaluation takes seconds."""

from pathlib import Path

import datasets
import numpy as np
import torch
from sklearn.datasets import load_digits
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from datasets_scripts.tokenize import tokenize
from datasets_scripts.tokenize_config import TokenizeConfig
from modeling_wsl import WSLConfig, WSLFeatureExtractor, WSLModel
from modeling_wsl.targets import resolve_target
from trainers.finetune import finetune
from trainers.finetune_config import FinetuneConfig
from trainers.image_data import load_images
from trainers.image_data_config import ImageDataConfig
from trainers.text_data import TextDataConfig, load_text


TARGET, TARGET_KWARGS = "resnet10t", {"stem_width": 4, "channels": [4, 8, 8, 16]}
DATA = {"image_size": 16, "channels": 1, "flip": False, "crop_scale_min": 0.6, "center_crop": 1.0, "max_train": 256}


def write_digits(folder: Path, classes: int = 10, labelled: bool = True) -> Path:
    """The digits below `classes` as Parquet with the splits train, validation and test."""
    digits = load_digits()
    kept = np.flatnonzero(digits.target < classes)
    folder.mkdir(parents=True)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(c) for c in range(classes)])}
    )
    for number, split in enumerate(("train", "validation", "test")):
        rows = kept[number::3]
        images = [(digits.images[row] * 15.9).astype(np.uint8) for row in rows]
        table = datasets.Dataset.from_dict({"image": images, "label": digits.target[rows]}, features=features)
        table = table if labelled else table.remove_columns("label")
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def train_anchor(folder: Path, images: Path, seed: int, epochs: int = 3) -> Path:
    """A narrow ResNet, trained on the images and saved as timm reads it."""
    splits = load_images(ImageDataConfig(images=str(images), **DATA))
    target = resolve_target(
        TARGET, num_classes=splits.num_classes, target_kwargs=TARGET_KWARGS, in_channels=DATA["channels"]
    )
    model = target.build(seed)
    config = FinetuneConfig(epochs=epochs, batch_size=32, learning_rate=5e-3, seed=seed, use_cpu=True)
    finetune(model, splits.train, splits.validation, config, progress=False)
    folder.mkdir(parents=True)
    target.save(model.state_dict(), folder)
    return folder


def tokenize_models(folder: Path, models: list[Path]) -> Path:
    """A tokenized dataset of the models."""
    config = TokenizeConfig(split_by="model", validation_fraction=0.0, min_parameters=1)
    tokenize([str(model) for model in models], folder, config)
    return folder


def save_backbone(folder: Path) -> Path:
    """A backbone of two narrow layers as it is initialised."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        WSLModel(WSLConfig.from_size("nano", hidden_size=32, num_attention_heads=2)).save_pretrained(folder)
    WSLFeatureExtractor().save_pretrained(folder)
    return folder


def write_text(folder: Path) -> tuple[Path, Path]:
    """A text of some thousand words, and a tokenizer for it."""
    folder.mkdir(parents=True)
    numbers = np.random.default_rng(0).integers(0, 50, 4000)
    text = folder / "text.txt"
    text.write_text("\n".join(" ".join(f"word{n}" for n in line) for line in numbers.reshape(-1, 8)) + "\n")
    load_text(TextDataConfig(text=str(text), vocab_size=300, block_size=16)).tokenizer.save_pretrained(folder / "bpe")
    return text, folder / "bpe"


def save_gpt2(folder: Path, tokenizer: Path) -> Path:
    """A GPT-2 of one narrow layer for the tokenizer, as it is initialised."""
    size = len(AutoTokenizer.from_pretrained(tokenizer))
    config = GPT2Config(vocab_size=size, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder
