"""`hf-wsl embed`: models to a table of their embeddings, by a backbone or by a method that needs none; and further
models as a table was made."""

import json
import logging
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm
from transformers.utils.logging import is_progress_bar_enabled

from hf_wsl.files import sha256, write_json
from hf_wsl.options import ConfigError, build
from hf_wsl.workers import one_thread
from modeling_wsl import CheckpointError, open_checkpoint
from modeling_wsl.checkpoints.canonical import embedding_view
from modeling_wsl.checkpoints.errors import shorten
from modeling_wsl.checkpoints.reference import exists, parse_reference
from modeling_wsl.loading import find_backbone
from modeling_wsl.pipelines import no_weights

from ..sources import ModelSource, expand_sources
from .embed_config import METHODS, TOKEN_METHODS, EmbedConfig
from .embedding_table import EmbeddingTable
from .packed_encoding import PackedEncoder
from .plain_methods import TokenProjection, WeightSections, WeightStatistics, make_projection


logger = logging.getLogger(__name__)

# The settings that each kind of method looks at; they are noted in the table.
BACKBONE_SETTINGS = ("pooling", "untrained", "window_size", "halo", "precision", "seed")
PROJECTION_SETTINGS = ("pooling", "latent_size", "tokenization", "token_size", "batch_norm_statistics")
# What decides the embeddings that a backbone gives: weights, settings, and how models become its tokens.
BACKBONE_FILES = ("*config.json", "model*.safetensors", "adapter_model*.safetensors", "pytorch_model*.bin")
# Facts of a table that may differ where the method is the same: a branch that is named by its commit.
NOT_THE_METHOD = ("backbone", "backbone_revision", "fit_on")


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
    elif method == "profile":
        embedder = WeightSections(config)
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
                options["allow_nonfinite"] = config.allow_nonfinite
                with embedding_view(open_checkpoint(model.location, **options)) as checkpoint:
                    manifest = embedder.extractor.manifest(checkpoint)
                    if not manifest.num_tokens:
                        raise no_weights(checkpoint.source)
                    # As if the rest were like those so far.
                    bar.total = math.ceil((bar.n + manifest.num_tokens) * len(models) / (done + 1))
                    embedder.add(model.model_id, checkpoint, manifest, bar.update)
                commits[model.model_id] = checkpoint.revision
            except (ConfigError, MemoryError):  # of the run, not of this model
                raise
            except Exception as error:  # files from the wild break in any way; the others go on
                known = isinstance(error, CheckpointError)
                reason = str(error) if known else f"{model.label}: {type(error).__name__}: {shorten(error)}"
                refused[model.model_id] = reason
                logger.warning("left out: %s", reason, exc_info=not known)
    rows = embedder.finish() if commits else {}
    for name in list(commits):
        if name not in rows or not np.isfinite(rows[name][0]).all():
            refused[name] = f"{name}: its embedding is not finite: weights are too large for the arithmetic, or NaN"
            logger.warning("left out: %s", refused[name])
            del commits[name]
    if not commits:
        raise ValueError(
            f"None of the {len(models)} models could be read, the first because: {next(iter(refused.values()))}"
        )
    table = EmbeddingTable(
        list(commits),
        np.stack([rows[name][0] for name in commits]),
        list(commits.values()),
        made_by=_made_by(method, config, embedder),
        layers=[rows[name][1] for name in commits] if config.per_layer else None,
        fingerprints=embedder.fingerprints(commits) if isinstance(embedder, WeightSections) else {},
    )
    return table, refused


def _made_by(
    method: str, config: EmbedConfig, embedder: PackedEncoder | TokenProjection | WeightSections | WeightStatistics
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
    elif isinstance(embedder, WeightSections):
        settings = ()
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
    return sha256(json.dumps(list(shapes.items())))[:32]


def _absolute(source: str | PathLike) -> str:
    """A path that means the same in any working folder; a Hub id as it is."""
    reference = parse_reference(source)
    if not exists(reference.location):
        return str(source)
    return str(replace(reference, location=os.path.abspath(os.path.expanduser(reference.location))))


def backbone_state(backbone: str | PathLike, revision: str | None = None) -> str:
    """The commit of a backbone on the Hub; of a folder, a hash of its weights and settings.

    Raises:
        CheckpointError: it is missing, may not be read, or is no backbone.
    """
    name, commit = find_backbone(backbone, revision=revision)
    if commit:
        return commit
    folder = Path(name).expanduser()
    files = sorted({path for pattern in BACKBONE_FILES for path in folder.glob(pattern)})
    return sha256(part for path in files for part in (f"{path.name}\0", bytes.fromhex(sha256(path))))[:32]


def embed_like(
    table: EmbeddingTable, sources: Sequence[str | PathLike], fit_on: Sequence[ModelSource] = ()
) -> tuple[EmbeddingTable, dict[str, str]]:
    """Embeds models by the method, backbone and settings in a table's metadata.

    Args:
        table: made by `hf-wsl embed`.
        sources: see `expand_sources`.
        fit_on: the models of the table; for one whose PCA was fitted on its own models. Others are passed over.

    Returns:
        Their table, and the models that could not be read with the reason of each.

    Raises:
        CheckpointError: the backbone cannot be read.
        ValueError: the metadata do not tell how the table was made; the backbone at its path has changed; a PCA was
            fitted on models that are not at hand; or the method depends on which models are embedded together, and
            these give another one.
    """
    made_by = table.made_by
    if "method" not in made_by:
        raise ValueError(
            "The table does not tell how it was made. Make it with `hf-wsl embed`, or name one of its rows."
        )
    method = made_by["backbone"] if made_by["method"] == "backbone" else made_by["method"]
    known = {field.name for field in fields(EmbedConfig)}
    settings = {name: value for name, value in made_by.items() if name in known}
    if revision := made_by.get("backbone_revision"):
        settings["revision"] = revision
        method = method.partition("@")[0]
    if (weights := made_by.get("backbone_weights")) and backbone_state(method) != weights:
        raise ValueError(
            f"The backbone {method} was changed since this table was made by it. Embed the models again, or put back "
            "the backbone that made it."
        )
    with tempfile.TemporaryDirectory() as folder:
        if method == "pca" and not settings.get("fit_on"):
            settings["fit_on"] = [_list_models(table, fit_on, Path(folder))]
        embedded, refused = embed_models(method, sources, build(EmbedConfig, ("the table's metadata", settings)))
    differs = [
        name
        for name in {**made_by, **embedded.made_by}
        if name not in NOT_THE_METHOD and made_by.get(name) != embedded.made_by.get(name)
    ]
    if differs:
        name = differs[0]
        raise ValueError(
            f"The table was made with {name}={made_by.get(name)}, and these models alone give "
            f"{embedded.made_by.get(name)}. Embed them into the table, and name the row."
        )
    return embedded, refused


def _list_models(table: EmbeddingTable, models: Sequence[ModelSource], folder: Path) -> str:
    """A list of the table's models, for a PCA that was fitted on them."""
    at_hand = {model.model_id: model for model in models}
    missing = [name for name in table.model_ids if name not in at_hand]
    if missing:
        raise ValueError(
            f"The PCA of this table was fitted on the models in it. Name them with --models, all {len(table)}: "
            f"{missing[0]} is not among those named."
        )
    entries = [
        {"source": model.location, "model_id": name} | ({"revision": model.revision} if model.revision else {})
        for name in table.model_ids
        for model in [at_hand[name]]
    ]
    path = folder / "fit_on.json"
    write_json(path, entries)
    return str(path)
