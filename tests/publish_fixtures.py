"""What one publishes, made as users make it: a tokenized dataset, a pretrained backbone, a generated model."""

import json
from pathlib import Path

import pyarrow as pa
import timm
import torch
from transformers import pipeline
from window_fixtures import small_model_arguments
from zoo_fixtures import add_model, tiny_state

from datasets_scripts.tokenize import tokenize
from datasets_scripts.tokenize_config import TokenizeConfig
from trainers.pretrain import main as pretrain


# name -> licence: two that keep their weights back, and one whose licence hides what the first one says.
ZOO = {
    "ada-net": "MIT",
    "bob-net": "Apache-2.0",
    "cyd-net": "cc-by-nc-nd-4.0",
    "dan-net": None,
    "eve-copy-of-cyd": "MIT",
    "fay-net": "CC BY-NC 4.0",
}
WITHHELD = ("cyd-net", "dan-net", "eve-copy-of-cyd")
TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3}


def make_dataset(
    folder: Path, licences: dict[str, str | None] = ZOO, properties: pa.Table | None = None, **settings
) -> Path:
    """A dataset of several files and row groups; its splits are drawn by model, or those of the properties."""
    for number, (name, licence) in enumerate(licences.items()):
        width = 12 + 4 * (2 if "copy" in name else number)
        facts = {"owner": name.split("-")[0], **({"licence": licence} if licence else {})}
        add_model(folder / "zoo", name, tiny_state(2 if "copy" in name else number, width), **facts)
    defaults = {"token_size": 24, "window_size": 24, "validation_fraction": 0.3, "split_by": "model"}
    sizes = {"max_shard_size": "5KB", "max_row_group_size": "2KB"}
    config = TokenizeConfig(**{**defaults, **sizes, **settings})
    tokenize(folder / "zoo", folder / "tokens", config, properties=properties)
    return folder / "tokens"


def make_backbone(folder: Path, dataset: Path | str, *more: str) -> Path:
    """A backbone of some thousand parameters, trained for four steps."""
    arguments = ["--dataset", str(dataset), "--output_dir", str(folder / "backbone"), "--use_cpu", "true"]
    steps = ["--max_steps", "4", "--batch_size", "2", "--save_steps", "2"]
    pretrain([*arguments, *steps, *small_model_arguments(), *more])
    return folder / "backbone"


def make_anchor(folder: Path) -> dict[str, bytes | str]:
    """Files of a timm model as a repository on the Hub has them, under CC BY-SA."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **TINY_VIT)
    timm.models.save_for_hf(model, folder, model_args=TINY_VIT, safe_serialization=True)
    card = "---\nlicense: cc-by-sa-4.0\nlibrary_name: timm\n---\n"
    return {**{path.name: path.read_bytes() for path in folder.iterdir()}, "README.md": card}


def make_generated(backbone: str | Path, anchor: str | Path, folder: Path) -> Path:
    """A model that the backbone draws from the anchor."""
    generator = pipeline("weight-generation", model=str(backbone))
    return generator(str(anchor), anchors=[str(anchor)], seed=3)[0].save_pretrained(folder)


def change_json(path: Path, **entries) -> None:
    """Replaces entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
