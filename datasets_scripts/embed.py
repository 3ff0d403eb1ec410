"""`hf-wsl embed`: models to a Parquet table of their embeddings."""

import logging
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.utils import tqdm

from modeling_wsl import CheckpointError, open_checkpoint
from modeling_wsl.pipelines import load_pipeline

from .files import replacing
from .sources import expand_sources


logger = logging.getLogger(__name__)


def embed(
    backbone: str | PathLike,
    sources: Iterable[str | PathLike],
    output: str | PathLike,
    batch_size: int = 8,
    revision: str | None = None,
) -> tuple[int, dict[str, str]]:
    """Embeds models; one row each: `model_id`, `revision`, `embedding` (float32 `[latent_size]`), `x`, `y`.

    The revision is the commit of a model of the Hub. x and y are the first two principal components of the embeddings
    in this table: a map to look at, no more. The table's metadata name the backbone and its commit.

    Args:
        backbone: folder or Hub id of a WSL model.
        sources: what `expand_sources` takes: models, folders of models, Hub ids (`org/name@revision`), lists of these.
        output: the Parquet file; written under a temporary name first.
        batch_size: windows per forward pass.
        revision: branch, tag or commit of a backbone on the Hub.

    Returns:
        The number of rows, and the models that could not be read with the reason of each.

    Raises:
        CheckpointError: the backbone cannot be read.
        ValueError: none of the models could be read.
    """
    models = expand_sources(sources)
    embedder = load_pipeline("weight-embedding", backbone, revision=revision, batch_size=batch_size, progress=False)
    names, commits, rows, refused = [], [], [], {}
    for model in tqdm(models, desc="Embedding", unit="model"):
        try:
            options = {} if model.path else {"revision": model.revision}
            with open_checkpoint(model.location, **options) as checkpoint:
                rows.append(embedder(checkpoint)["embedding"])
            names.append(model.model_id)
            commits.append(checkpoint.revision)
        except CheckpointError as error:
            refused[model.model_id] = str(error)
            logger.warning("left out: %s", error)
    if not rows:
        raise ValueError(
            f"None of the {len(models)} models could be read, the first because: {next(iter(refused.values()))}"
        )
    embeddings = np.stack(rows)  # [models, latent_size]
    flat = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), embeddings.shape[1])
    x, y = principal_map(embeddings).T
    columns = {"model_id": names, "revision": pa.array(commits, pa.string()), "embedding": flat, "x": x, "y": y}
    commit = getattr(embedder.model.config, "_commit_hash", None)  # not there where a folder was loaded
    made_by = {"backbone": str(backbone), "backbone_revision": commit or ""}
    table = pa.table(columns).replace_schema_metadata(made_by)
    with replacing(Path(output)) as temporary:
        pq.write_table(table, temporary)
    return len(rows), refused


def principal_map(embeddings: np.ndarray) -> np.ndarray:
    """The first two principal components of `[models, latent_size]`: float32 `[models, 2]`, 0 where nothing spreads.

    The sign of each component is that of its largest loading, so that the same table gives the same map.
    """
    centred = embeddings.astype(np.float64) - embeddings.mean(0, dtype=np.float64)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    directions = directions[:2]
    largest = np.abs(directions).argmax(1)
    directions = directions * np.sign(directions[np.arange(len(directions)), largest])[:, None]
    points = np.zeros((len(embeddings), 2), dtype=np.float32)
    points[:, : len(directions)] = centred @ directions.T
    return points
