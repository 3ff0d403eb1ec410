"""The tables of embeddings that are probed: made once, kept, and made again when what they were made of changes."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from datasets_scripts.embedding import EmbeddingTable, backbone_state, embed
from datasets_scripts.embedding.plain_methods import UnlikeModelsError
from datasets_scripts.schema import TRAIN
from hf_wsl.files import write_json, write_text
from hf_wsl.options import ConfigError
from modeling_wsl.embedding.profile import SHAPE, profile_names

from .labeled_models import LabeledModels
from .probe_config import UNTRAINED, ProbeConfig


logger = logging.getLogger(__name__)
PROFILE = "profile"
FREE = ("batch_size",)  # options of embed that change no figure


def embedding_tables(
    config: ProbeConfig, labeled: LabeledModels, folder: Path
) -> tuple[dict[str, EmbeddingTable], dict[str, str], dict[str, dict[str, str]]]:
    """Embeds the models by all backbones and baselines.

    Args:
        config, labeled: the probe.
        folder: gets `<name>.parquet`, and `<name>.json` which tells what the table was made of.

    Returns:
        The tables by name, in the order of the options; baselines that do not work on these models, with the reason;
        and for each table the models that could not be read, with the reason of each.

    Raises:
        ValueError: a backbone or a table that cannot be read.
    """
    tables = {name: EmbeddingTable.read(path) for name, path in config.tables.items()}
    skipped: dict[str, str] = {}
    refused: dict[str, dict[str, str]] = {}
    wanted: list[tuple[str, str, dict[str, Any]]] = [(name, path, {}) for name, path in config.named_backbones.items()]
    if config.untrained and wanted:
        wanted.append((UNTRAINED, wanted[0][1], {"untrained": True}))
    fitted_on = {} if labeled.splits is None else {"fit_on": [str(_list_training_models(labeled, folder))]}
    wanted += [(name, name, fitted_on if name == "pca" else {}) for name in config.wanted_baselines]
    for name, method, options in wanted:
        try:
            tables[name], refused[name] = _cached(config, labeled, folder, name, method, options)
        except ValueError as error:
            if isinstance(error, ConfigError) and not isinstance(error, UnlikeModelsError):
                raise
            if name in config.named_backbones or name == UNTRAINED:
                raise
            skipped[name] = str(error)
            logger.warning("%s is left out: %s", name, error)
    return tables, skipped, refused


def _cached(
    config: ProbeConfig, labeled: LabeledModels, folder: Path, name: str, method: str, options: dict[str, Any]
) -> tuple[EmbeddingTable, dict[str, str]]:
    path, record = folder / f"{name}.parquet", folder / f"{name}.json"
    settings = config.embed_config(**options)
    made_of = {
        "models": {model.model_id: model.fingerprint() for model in labeled.models},
        "method": method,
        "backbone": backbone_state(method, settings.revision) if method not in config.wanted_baselines else None,
        "options": {key: value for key, value in asdict(settings).items() if key not in FREE},
        "training_models": [Path(source).read_text(encoding="utf-8") for source in settings.fit_on],
    }
    if path.is_file() and record.is_file():
        kept = json.loads(record.read_text(encoding="utf-8"))
        if kept["made_of"] == made_of:
            return EmbeddingTable.read(path), kept["refused"]
        logger.info("%s is made again: models, backbone or options have changed", path)
    record.unlink(missing_ok=True)  # a new table beside an old record would pass for the old one's
    report = embed(method, labeled.sources, path, settings)
    write_json(record, {"made_of": made_of, "refused": report.refused})
    return EmbeddingTable.read(path), report.refused


def probed_sections(name: str, table: EmbeddingTable) -> dict[str, np.ndarray]:
    """Name of a line -> `[models, d]`: the table's embedding, and each section beside it.

    Of the method profile the numbers that follow from layers' shapes are a line of their own: ridge reads properties
    better without them, and alone they tell what an architecture gives away.
    """
    above = "" if name == PROFILE else f"{name}, "
    lines = {name: table.embeddings}
    if table.made_by.get("method") == PROFILE and table.embeddings.shape[1] == len(names := profile_names()):
        of_shapes = np.array([n.startswith("count: ") or n.split(": ")[1] in SHAPE for n in names])
        lines = {name: table.embeddings[:, ~of_shapes], f"{above}shapes only": table.embeddings[:, of_shapes]}
    return lines | {above + section: rows for section, rows in table.fingerprints.items()}


def _list_training_models(labeled: LabeledModels, folder: Path) -> Path:
    """A list of models that PCA may see: those that it is not measured on."""
    training = set(labeled.properties.index[labeled.splits == TRAIN])
    entries = [
        {"source": model.location, "model_id": model.model_id}
        | ({"revision": model.revision} if model.revision else {})
        for model in labeled.models
        if model.model_id in training
    ]
    path = folder / "training_models.json"
    write_text(path, json.dumps(entries, indent=1) + "\n")
    return path
