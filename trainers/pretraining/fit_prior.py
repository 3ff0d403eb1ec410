"""Fits the prior that models without anchors are drawn from, on the training split of a tokenized dataset."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils.logging import is_progress_bar_enabled

from datasets_scripts.schema import TRAIN
from modeling_wsl.backbone.encoding import encode_stream
from modeling_wsl.backbone.inference import inference_backbone
from modeling_wsl.generation.generate import EXTRACTOR_SETTINGS
from modeling_wsl.generation.latent_prior import WEIGHTS_FACT, LatentPrior, weights_fingerprint
from modeling_wsl.loading import load_pipeline
from modeling_wsl.tokens.manifest import WeightManifest

from ..data.windows.dataset_source import DatasetSource
from ..data.windows.window_table import DatasetError, WindowTable


MAX_TOKENS = 1_000_000


def fit_and_save_prior(
    backbone_folder: str | os.PathLike,
    dataset: str,
    *,
    dataset_revision: str | None = None,
    max_tokens: int = MAX_TOKENS,
    batch_size: int = 8,
    precision: str = "auto",
    device: torch.device | str | None = None,
    progress: bool = True,
) -> LatentPrior:
    """Encodes windows of the training split and writes `latent_prior.safetensors` beside the backbone's weights.

    The same backbone, dataset and options give the same bytes on the same machine.

    Args:
        backbone_folder: output_dir of `hf-wsl pretrain`.
        dataset: folder or Hub id of a tokenized dataset, usually the one that the backbone was trained on.
        dataset_revision: branch, tag or commit of a dataset on the Hub.
        max_tokens: tokens to fit on, about: windows evenly spaced over the split, whole ones.
        batch_size: windows per forward pass of the backbone.
        precision: its arithmetic, see `inference_backbone`.
        device: that the backbone runs on; None: the pipeline's choice.
        progress: show a progress bar, unless transformers' switch turns them off.

    Raises:
        ValueError: the folder is none, or `max_tokens` is below 1.
        CheckpointError: it holds no backbone.
        DatasetError: the dataset cannot be read, was tokenized for another backbone, or says nothing about its models.
    """
    folder = Path(backbone_folder).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"{backbone_folder} is no folder: a prior is written beside a backbone's weights, on the disk."
        )
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; give the number of tokens to fit on.")
    source = DatasetSource(dataset, dataset_revision)
    embedder = load_pipeline("weight-embedding", folder, device=device)
    embedder.model.code.check_prior()
    extractor, expected = source.feature_extractor(), embedder.feature_extractor
    for name in EXTRACTOR_SETTINGS:
        if getattr(extractor, name) != getattr(expected, name):
            raise DatasetError(
                f"dataset '{dataset}' was tokenized with {name}={getattr(extractor, name)!r:.120}, the backbone "
                f"expects {getattr(expected, name)!r:.120}. Give the dataset that the backbone was trained on"
            )
    rows = source.load()[TRAIN]
    table = WindowTable(rows.data.table, f"split '{TRAIN}'")
    total = int(table.num_tokens.sum())
    count = min(len(table), max(1, round(len(table) * max_tokens / total)))
    chosen = np.linspace(0, len(table) - 1, count).round().astype(int)
    name = dataset if source.folder is None else source.folder.resolve().name  # the file may be published
    facts = {"dataset": name, "dataset_revision": source.commit(), "split": TRAIN, "windows": count}
    facts[WEIGHTS_FACT] = weights_fingerprint(embedder.model)
    hidden = not progress or not is_progress_bar_enabled()
    tokens = int(table.num_tokens[chosen].sum())
    with tqdm(total=tokens, desc="Fitting the prior", unit="token", disable=hidden) as bar:
        model, dtype = inference_backbone(embedder.model, precision=precision)
        options = {"batch_size": batch_size, "autocast_dtype": dtype}
        parts = _encoded(model, table, source.manifests(), chosen, options, bar)
        prior = LatentPrior.fit(parts, embedder.model.config.token_standardization, facts)
    prior.save_pretrained(folder)
    return prior


def _encoded(
    model: PreTrainedModel,
    table: WindowTable,
    manifests: dict[str, str | None],
    rows: np.ndarray,
    options: Mapping[str, Any],
    bar: tqdm,
) -> Iterator[tuple[WeightManifest, int, torch.Tensor]]:
    """(manifest of the model, index of the first token, latents `[n, latent_size]`) of one window after the other."""
    current, manifest = None, None
    for row in rows.tolist():
        model_id = table.model_id(row)
        if model_id != current:
            if not manifests.get(model_id):
                raise DatasetError(
                    f"split '{TRAIN}': the config 'models' has no manifest of model '{model_id}', so nothing tells "
                    "what its tokens are. Write the dataset with `hf-wsl tokenize`"
                )
            current, manifest = model_id, WeightManifest.from_json(manifests[model_id])
        tokens, _ = table.window(row)
        start = table.token_start(row)
        stop = start + len(tokens)
        chunk = {
            "tokens": torch.from_numpy(tokens.astype(np.float32)),
            "token_mask": manifest.token_mask(start, stop),
            "positions": manifest.positions(start, stop),
        }
        for first, latents in encode_stream(
            model, [chunk], len(tokens), window_size=model.config.window_size, **options
        ):
            yield manifest, start + first, latents
        bar.update(len(tokens))
