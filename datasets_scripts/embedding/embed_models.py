"""`hf-wsl embed`: models to a table of their embeddings, by a backbone or by a method that needs none."""

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm
from transformers.utils.logging import is_progress_bar_enabled

from hf_wsl.options import ConfigError
from hf_wsl.workers import one_thread
from modeling_wsl import CheckpointError, open_checkpoint
from modeling_wsl.pipelines import no_weights

from ..sources import expand_sources
from .backbone_state import backbone_state
from .embed_config import METHODS, TOKEN_METHODS, EmbedConfig
from .embedding_table import EmbeddingTable
from .packed_encoding import PackedEncoder
from .token_projection import TokenProjection, make_projection
from .weight_statistics import WeightStatistics


logger = logging.getLogger(__name__)

# The settings that each kind of method looks at; they are noted in the table.
BACKBONE_SETTINGS = ("pooling", "untrained", "window_size", "halo", "mixed_precision", "seed")
PROJECTION_SETTINGS = ("pooling", "latent_size", "tokenization", "token_size", "batch_norm_statistics")


@dataclass(frozen=True)
class EmbedReport:
    """Rows of the table, and the models that could not be read with the reason of each."""

    rows: int
    refused: dict[str, str]


def embed(
    method: str | PathLike,
    sources: Iterable[str | PathLike],
    output: str | PathLike,
    config: EmbedConfig | None = None,
) -> EmbedReport:
    """Writes the table of `embed_models` to a Parquet file (see `EmbeddingTable.write`), whole or not at all."""
    table, refused = embed_models(method, sources, config)
    table.write(output)
    return EmbedReport(len(table), refused)


def embed_models(
    method: str | PathLike, sources: Iterable[str | PathLike], config: EmbedConfig | None = None
) -> tuple[EmbeddingTable, dict[str, str]]:
    """Embeds models, in the memory of a few batches beside the table, whatever their size.

    Args:
        method: one of `METHODS`, or a backbone: its folder or Hub id.
        sources: what `expand_sources` takes: models, folders of models, Hub ids (`org/name@revision`), lists of these.
        config: the options.

    Returns:
        The table, one row a model in the order named, and the models that could not be read with the reason of each.

    Raises:
        CheckpointError: the backbone cannot be read.
        ConfigError: `per_layer` or `untrained` with a method that has no such thing.
        ValueError: none of the models could be read, or models of unlike tensors where the method needs like ones.
    """
    method, config = str(method), config or EmbedConfig()
    if config.per_layer and method in METHODS and method not in TOKEN_METHODS:
        raise ConfigError(f"per_layer: {method} has no embeddings of layers. Leave it out, or name a backbone.")
    if config.untrained and method in METHODS:
        raise ConfigError(f"untrained: {method} has no weights to draw. Leave it out, or name a backbone.")
    models = expand_sources(sources)
    if method in TOKEN_METHODS:
        fit_on = expand_sources(config.fit_on) if config.fit_on else models
        embedder = TokenProjection(make_projection(method, config, fit_on), config)
    elif method in METHODS:
        embedder = WeightStatistics(method, config)
    else:
        embedder = PackedEncoder(method, config)
    commits: dict[str, str | None] = {}
    refused: dict[str, str] = {}
    hidden = not is_progress_bar_enabled()
    with one_thread(), tqdm(desc="Embedding", unit="token", unit_scale=True, disable=hidden) as bar:
        for done, model in enumerate(models):
            try:
                options = {} if model.path else {"revision": model.revision}
                with open_checkpoint(model.location, **options) as checkpoint:
                    manifest = embedder.extractor.manifest(checkpoint)
                    if not manifest.num_tokens:
                        raise no_weights(checkpoint.source)
                    # As if the rest were like those so far.
                    bar.total = math.ceil((bar.n + manifest.num_tokens) * len(models) / (done + 1))
                    embedder.add(model.model_id, checkpoint, manifest, bar.update)
                commits[model.model_id] = checkpoint.revision
            except CheckpointError as error:
                refused[model.model_id] = str(error)
                logger.warning("left out: %s", error)
    if not commits:
        raise ValueError(
            f"None of the {len(models)} models could be read, the first because: {next(iter(refused.values()))}"
        )
    found = embedder.finish()
    table = EmbeddingTable(
        list(commits),
        np.stack([found[name][0] for name in commits]),
        list(commits.values()),
        made_by=_made_by(method, config, embedder),
        layers=[found[name][1] for name in commits] if config.per_layer else None,
    )
    return table, refused


def _made_by(
    method: str, config: EmbedConfig, embedder: PackedEncoder | TokenProjection | WeightStatistics
) -> dict[str, str]:
    facts = {"method": method}
    settings = ("batch_norm_statistics",)
    if isinstance(embedder, PackedEncoder):
        facts = {"method": "backbone", "backbone": _absolute(method), "backbone_revision": embedder.commit or ""}
        if not embedder.commit:
            facts["backbone_weights"] = backbone_state(method)
        settings = BACKBONE_SETTINGS
    elif isinstance(embedder, TokenProjection):
        settings = (*PROJECTION_SETTINGS, "fit_on" if method == "pca" else "seed")
    else:
        facts["pooled_over_tensors"] = str(embedder.is_pooled).lower()
        if not embedder.is_pooled:
            facts["tensors"] = _digest(next(iter(embedder.shapes.values())))
    if embedder.same is not None and embedder.same.first is not None:
        facts["tensors"] = _digest(embedder.same.first[1])
    values = asdict(config) | {"fit_on": ", ".join(map(_absolute, config.fit_on))}
    return facts | {name: str(values[name]) for name in settings}


def _digest(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Tells architectures apart, whose numbers stand side by side in an embedding."""
    return hashlib.sha256(json.dumps(list(shapes.items())).encode()).hexdigest()[:32]


def _absolute(source: str | PathLike) -> str:
    """A path that means the same in any working folder; a Hub id as it is."""
    path = Path(source).expanduser()
    return os.path.abspath(path) if path.exists() else str(source)
