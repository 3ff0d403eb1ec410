"""`hf-wsl generate`: models around anchors of the same architecture, or from donors of other sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from datasets_scripts.embedding.embed_models import backbone_state
from datasets_scripts.sources import source_state
from hf_wsl.run_folder import RunFolder
from modeling_wsl.generation.donors.generation import DonorSettings, generate_from_donors
from modeling_wsl.generation.donors.networks import is_builder
from modeling_wsl.generation.generated_model import GeneratedModel
from modeling_wsl.loading import load_pipeline

from ..data.data_config import ImageDataConfig
from ..data.images.image_data import load_images
from ..data.text_data import load_text
from .generate_options import GenerateOptions


def generate(options: GenerateOptions) -> Iterator[str]:
    """Generates the models that a command line asks for, and writes each into a folder of its own.

    Yields:
        Lines to print.

    Raises:
        ValueError: target, anchors and data do not fit each other.
    """
    target = options.target
    settings = {
        "backbone": None if options.from_donors else backbone_state(options.backbone, options.revision),
        "target": target if is_builder(target) else source_state(target),
        "anchors": [source_state(anchor) for anchor in options.anchors],
        **options.settings(),
        **({"allow_nonfinite": True} if options.allow_nonfinite else {}),
    }
    count = options.num_samples or (len(options.anchors) if options.from_donors else 1)
    run = RunFolder(options.output_dir, "generated models")
    folders = [options.output_dir / f"{index:03d}" for index in range(count)]
    with run.open(settings, overwrite=options.overwrite_output_dir):
        if all(folder.is_dir() for folder in folders):
            yield "these models were made before; nothing was done"
            yield from map(str, folders)
            return
        models = from_donors(options) if options.from_donors else around_anchors(options)
        for folder, model in zip(folders, models, strict=False):
            with run.replacing_folder(folder) as temporary:
                model.save_pretrained(temporary)
            yield f"{folder}{summary(model)}"


def around_anchors(options: GenerateOptions) -> list[GeneratedModel]:
    """Draws of the backbone around anchors of the target's architecture."""
    generator = load_pipeline("weight-generation", options.backbone, revision=options.revision)
    settings = {**options.settings(), "num_samples": options.num_samples or 1}
    if options.allow_nonfinite:
        settings["allow_nonfinite"] = True
    return generator(options.target, anchors=options.anchors, **settings)


def from_donors(options: GenerateOptions) -> list[GeneratedModel]:
    """One model of every donor, fitted on the data where there are any."""
    images, labels = fitting_data(options)
    settings = DonorSettings(
        method=options.method,
        images=images,
        labels=labels if options.labels else None,
        initialize=options.initialize,
        distill_epochs=options.distill_epochs,
        seed=options.seed,
        num_samples=options.num_samples,
    )
    return generate_from_donors(
        options.target,
        options.anchors,
        settings,
        num_classes=options.num_classes,
        in_channels=options.in_channels,
        target_kwargs=options.target_kwargs,
        anchor_modules=options.anchor_modules,
        **({"allow_nonfinite": True} if options.allow_nonfinite else {}),
    )


def fitting_data(options: GenerateOptions) -> tuple[Any, torch.Tensor | None]:
    """(images `[n, C, S, S]` or a mapping of token blocks, labels int64 `[n]` of images) of the training split."""
    config = options.data_config
    if config is None:
        return None, None
    if isinstance(config, ImageDataConfig):
        limits = {f"max_{split}": getattr(config, f"max_{split}") or 1 for split in ("validation", "test")}
        config = replace(config, max_train=config.max_train or options.num_images, **limits)  # no more is decoded
        return load_images(config).evenly_spaced(options.num_images)
    blocks = load_text(config).train
    count = min(options.num_images, len(blocks))
    chosen = [blocks[index * len(blocks) // count]["input_ids"] for index in range(count)]
    return {"input_ids": torch.stack([torch.as_tensor(block) for block in chosen])}, None


def summary(model: GeneratedModel) -> str:
    """What is worth a line about a model from a donor; nothing about others."""
    provenance = model.provenance
    if "donor" not in provenance:
        return ""
    parts = [f"{provenance['method']} from {Path(str(provenance['anchors'][0]['source'])).name}"]
    if provenance["num_images"]:
        parts.append(f"{provenance['num_images']} images")
    if provenance["output_error"] is not None and provenance["method"] == "resize":
        parts.append(f"outputs differ from the donor's by {provenance['output_error']:.1e}")
    if head := provenance.get("head"):
        parts.append(f"classifier: {head['held_out_accuracy']:.1%} on the held-out images")
    return ": " + ", ".join(parts)
