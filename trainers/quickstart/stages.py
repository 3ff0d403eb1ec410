"""The stages of the quickstart: each works on the folder that the ones before it filled and returns its result."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_dataset
from sklearn.metrics import pairwise_distances
from torch.utils.data import DataLoader, TensorDataset
from transformers import Pipeline, pipeline

from datasets_scripts.embedding.embed_models import embed_models
from datasets_scripts.tokenize import tokenize as tokenize_models
from datasets_scripts.tokenize_config import TokenizeConfig
from modeling_wsl.checkpoints.checkpoint import open_checkpoint
from modeling_wsl.generation.generated_model import GeneratedModel

from ..data.images.digits import digits_splits
from ..evaluation.weight_comparison import compare_kinds, relative_error
from ..finetuning.finetune_options import FinetuneOptions
from ..pretrain import pretrain as pretrain_backbone
from ..pretraining.pretrain_options import PretrainOptions
from ..zoo.digits_zoo import ARCHITECTURES, DigitsZooConfig, build_digits_zoo, digits_members, read_properties
from .arms import QuickstartOpener, finetune_arms


@dataclass(frozen=True)
class QuickstartConfig:
    """The sizes of a quickstart; the defaults take minutes on two cores."""

    zoo: DigitsZooConfig = field(default_factory=DigitsZooConfig)
    held_out_family: str = "resnet"  # its last member is the anchor, which the backbone is not trained on
    validation_fraction: float = 0.2
    # Over the recipe `nano`. float32, because few CPUs compute faster in bfloat16.
    pretrain: dict[str, Any] = field(
        default_factory=lambda: {
            "max_steps": 120,
            "eval_steps": 20,
            "batch_size": 8,
            "learning_rate": 3e-4,
            "precision": "float32",
        }
    )
    finetune: FinetuneOptions = field(
        default_factory=lambda: FinetuneOptions(num_train_epochs=5, per_device_train_batch_size=32, use_cpu=True)
    )
    finetune_seeds: int = 3  # each with a generated model of its own
    num_candidates: int = 5  # draws of a seed, of which the best on the validation images is kept
    bandwidth: float = 0.2
    num_workers: int = 2  # processes that train the zoo and the arms

    def __post_init__(self):
        if self.held_out_family not in self.zoo.families:
            raise ValueError(f"held_out_family={self.held_out_family!r} is not among the zoo's {self.zoo.families}.")
        if self.zoo.members_per_family < 2 or len(self.zoo.families) < 2:
            raise ValueError("A quickstart needs two families of two members: one is held out, others are trained on.")
        if self.finetune_seeds < 1:
            raise ValueError(f"finetune_seeds is {self.finetune_seeds}; it must be at least 1.")
        if self.num_candidates < 1:
            raise ValueError(f"num_candidates is {self.num_candidates}; it must be at least 1.")


@dataclass(frozen=True)
class Place:
    """Where a quickstart lives and how large it is."""

    folder: Path
    seed: int
    config: QuickstartConfig

    @property
    def members(self) -> list[Path]:
        return [self.folder / "zoo" / member.name for member in digits_members(self.config.zoo)]

    @property
    def held_out(self) -> Path:
        """The anchor: the last member of its family."""
        return [path for path in self.members if path.name.startswith(f"{self.config.held_out_family}_")][-1]

    @property
    def backbone(self) -> str:
        return str(self.folder / "backbone")

    @property
    def images(self) -> dict[str, TensorDataset]:
        """The digits as the held-out architecture takes them."""
        return digits_splits(ARCHITECTURES[self.config.held_out_family].image_size)


def zoo(place: Place) -> dict[str, Any]:
    """Trains the zoo."""
    folders = build_digits_zoo(place.folder / "zoo", place.config.zoo, place.config.num_workers)
    return {"members": [read_properties(folder) for folder in folders], "held_out": place.held_out.name}


def tokenize(place: Place) -> dict[str, Any]:
    """Tokenizes every member but the held-out one."""
    listed = place.folder / "models.json"
    models = [
        {"source": f"zoo/{folder.name}", "family": read_properties(folder)["family"], "task": "image-classification"}
        for folder in place.members
        if folder != place.held_out
    ]
    listed.write_text(json.dumps(models, indent=1) + "\n", encoding="utf-8")
    config = TokenizeConfig(
        split_by="model",
        validation_fraction=place.config.validation_fraction,
        seed=place.seed,
        title="A zoo of digit classifiers",
        num_workers=place.config.num_workers,
    )
    report = tokenize_models(listed, place.folder / "dataset", config).numbers()
    tables = load_dataset(str(place.folder / "dataset"), "models")
    return {**report, "models": {split: list(table["model_id"]) for split, table in tables.items()}}


def pretrain(place: Place) -> dict[str, Any]:
    """Trains a `nano` backbone; its R2 is measured on the members of the validation split."""
    options = {
        "dataset": str(place.folder / "dataset"),
        "output_dir": place.backbone,
        "seed": place.seed,
        "use_cpu": True,
        "resume_from_checkpoint": "latest",
        **place.config.pretrain,
    }
    facts = pretrain_backbone(PretrainOptions.from_yaml("nano", **options))
    facts["training_seconds"] = facts.pop("seconds")
    return facts


def embed(place: Place) -> dict[str, Any]:
    """Embeds every member, the held-out one too, and lays the embeddings out in the plane by PCA."""
    table, _ = embed_models(place.backbone, place.members)
    properties = [read_properties(folder) for folder in place.members]
    centered = table.embeddings - table.embeddings.mean(0, dtype=np.float64)  # [models, latent_size]
    families = np.array([member["family"] for member in properties])
    distances = pairwise_distances(centered)  # [models, models]
    np.fill_diagonal(distances, np.inf)
    return {
        "models": [
            {"name": member["name"], "family": member["family"], "xy": xy.tolist(), "embedding": vector.tolist()}
            for member, xy, vector in zip(properties, table.points, table.embeddings, strict=True)
        ],
        "variance_shown": float(np.square(table.points, dtype=np.float64).sum() / np.square(centered).sum()),
        "nearest_of_same_family": float((families[distances.argmin(1)] == families).mean()),
    }


def generate(place: Place) -> dict[str, Any]:
    """Draws a model around the held-out member, and reconstructs the members that the backbone was not trained on."""
    generator = pipeline("weight-generation", model=place.backbone, device="cpu")
    images = place.images["train"].tensors[0]
    drawn = _generate(
        generator,
        place.held_out,
        num_candidates=place.config.num_candidates,
        rank=DataLoader(place.images["validation"], batch_size=256),
        bandwidth=place.config.bandwidth,
        seed=place.seed,
        batch_norm_images=images,
    )[0]
    reconstructed = _generate(generator, place.held_out, bandwidth=0.0, batch_norm_images=images)[0]
    drawn.save_pretrained(place.folder / "generated" / "drawn")
    reconstructed.save_pretrained(place.folder / "generated" / "reconstructed")

    tables = load_dataset(str(place.folder / "dataset"), "models", split="validation")
    unseen = [place.held_out, *(place.folder / "zoo" / name for name in tables["model_id"])]
    pairs = []
    for folder in unseen:
        model = reconstructed if folder == place.held_out else _generate(generator, folder, bandwidth=0.0)[0]
        pairs.append((model.instantiate(), open_checkpoint(folder).state_dict(), model.provenance["tensors"]))
    anchor = open_checkpoint(place.held_out).state_dict()
    sampled = [name for name, origin in drawn.provenance["tensors"].items() if origin == "sampled"]
    return {
        "anchor": place.held_out.name,
        "num_candidates": place.config.num_candidates,
        "entries": drawn.provenance["entries"],
        "relative_error": {
            "generated": relative_error(drawn.state_dict, anchor, sampled),
            "reconstructed": relative_error(reconstructed.state_dict, anchor, sampled),
        },
        "reconstructed_models": [folder.name for folder in unseen],
        "kinds": compare_kinds(pairs),
    }


def finetune(place: Place) -> dict[str, Any]:
    """Fine-tunes the generated models and every control on the same images in the same order."""
    config = place.config
    opener = QuickstartOpener(place.folder, place.held_out, config.finetune, config.num_candidates, config.bandwidth)
    seeds = [1_000 * (place.seed + 1) + number for number in range(config.finetune_seeds)]
    return finetune_arms(opener, seeds, config.num_workers)


# In this order; the key names the stage's record.
STAGES: dict[str, Callable[[Place], dict[str, Any]]] = {
    "zoo": zoo,
    "tokenize": tokenize,
    "pretrain": pretrain,
    "embed": embed,
    "generate": generate,
    "finetune": finetune,
}


def _generate(generator: Pipeline, folder: Path, **options: Any) -> list[GeneratedModel]:
    """Models of a member's architecture, with that member as the only anchor."""
    return generator(str(folder), anchors=[str(folder)], progress=False, **options)
