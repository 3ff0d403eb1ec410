"""`hf-wsl search`: what it finds in a table of embeddings, as text and as JSON."""

import logging
from collections.abc import Iterator
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from hf_wsl.files import write_json
from hf_wsl.options import ConfigError
from hf_wsl.options import nearest as nearest_name

from ..embedding import EmbeddingTable, embed_like
from ..sources import ModelSource, expand_sources
from .duplicates import Copy, find_copies
from .lineage import lineage_trees
from .nearest import nearest
from .search_config import MODES, SearchConfig


logger = logging.getLogger(__name__)


def search(table: str | PathLike, query: str | None, config: SearchConfig) -> list[str]:
    """Does what the options say; writes `config.output_file`, if it is named.

    Args:
        table: Parquet file of `hf-wsl embed`.
        query: a `model_id` of the table, or a model (path, Hub id), which is embedded as the table was; None with
            --duplicates and --lineage.
        config: the options.

    Returns:
        Lines of text.

    Raises:
        ConfigError, ValueError, CheckpointError: see `nearest`, `find_copies`, `lineage_trees`; and
            none of the models at hand is in the table.
    """
    if config.output_file and Path(config.output_file).is_dir():
        raise ConfigError(f"option 'output_file': {config.output_file} is a folder; name a JSON file")
    embeddings = EmbeddingTable.read(table)
    mode = next((mode for mode in MODES if getattr(config, mode)), None)
    if (query is None) == (mode is None):
        raise ConfigError(
            "name one model to search for (a row of the table, a path or a Hub id), or one of --duplicates and "
            "--lineage"
        )
    if mode == "duplicates":
        held = models_at_hand(embeddings, config.models) if config.models else []
        groups = find_copies(embeddings, held, config.allow_nonfinite)
        content, lines = [[asdict(copy) for copy in group] for group in groups], list(_group_lines(groups))
    elif mode == "lineage":
        trees = lineage_trees(models_at_hand(embeddings, config.models), config.allow_nonfinite)
        content = [tree.to_json() for tree in trees]
        lines = [line for tree in trees for line in [*tree.lines(), ""]] or ["No two models have one origin."]
    else:
        content = find_neighbors(embeddings, query, config)
        lines = [f"{row['rank']:>4}  {row['distance']:<10.4g}  {row['model_id']}" for row in content]
    if config.output_file:
        write_json(Path(config.output_file), content)
    return lines


def models_at_hand(table: EmbeddingTable, sources: list[str]) -> list[ModelSource]:
    """The models of a table among the sources; warns of others.

    Raises:
        ValueError: none of them is in the table.
    """
    models, rows = expand_sources(sources), set(table.model_ids)
    held = [model for model in models if model.model_id in rows]
    if not held:
        named = ", ".join(model.model_id for model in models[:2])
        raise ValueError(
            f"None of the {len(models)} models named with --models is in the table: they are called {named} ..., and "
            f"the table's rows {', '.join(table.model_ids[:2])} ... Name the sources that the table was made of."
        )
    if len(held) < len(models):
        logger.warning(
            "%d of the %d models named with --models are not in the table", len(models) - len(held), len(models)
        )
    return held


def find_neighbors(table: EmbeddingTable, query: str, config: SearchConfig) -> list[dict[str, Any]]:
    """The rows nearest to a model: `rank` from 1, `model_id`, `revision`, `distance`."""
    if query in table.model_ids:
        row = table.model_ids.index(query)
        embedding, exclude = table.embeddings[row : row + 1], np.array([row])
    else:
        embedding, exclude = _embed_query(table, query, config), None
    indices, distances = nearest(
        table,
        embedding,
        config.top,
        config.metric,
        standardize=config.standardize,
        index=config.index,
        exclude=exclude,
    )
    return [
        {"rank": rank, "model_id": table.model_ids[i], "revision": table.revisions[i], "distance": float(distance)}
        for rank, (i, distance) in enumerate(zip(indices[0], distances[0], strict=True), start=1)
        if i >= 0
    ]


def _embed_query(table: EmbeddingTable, query: str, config: SearchConfig) -> np.ndarray:
    try:
        models = expand_sources([query])
    except ValueError as error:
        raise ValueError(
            f"{query} is no model_id of the table.{nearest_name(query, table.model_ids)} {error}"
        ) from error
    if len(models) != 1:
        raise ConfigError(f"{query} holds {len(models)} models; search for one at a time")
    return embed_like(table, [query], expand_sources(config.models) if config.models else ())[0].embeddings


def _group_lines(groups: list[list[Copy]]) -> Iterator[str]:
    for number, group in enumerate(groups, start=1):
        yield f"group {number}: {len(group)} models"
        for copy in group:
            source = "weights" if copy.by_weights else "fingerprints"
            yield f"  {copy.model_id}: {copy.verdict} of {copy.nearest} ({source}; cosine {copy.position:.3f})"
    if not groups:
        yield "No copies were found."
