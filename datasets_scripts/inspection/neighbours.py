"""Which models of a table of embeddings are nearest to a model by its weights."""

from dataclasses import dataclass
from os import PathLike

import numpy as np

from ..embedding import EmbeddingTable
from ..search.embed_like import embed_like
from ..search.nearest import nearest


NEIGHBOURS = 10
METRIC = "cosine"


@dataclass(frozen=True)
class Neighbours:
    """The nearest models, the nearest first.

    Attributes:
        table: its path. num_models: in it.
        method: how it embeds models. own_row: the model's own embedding was found in it, by its id.
        metric: of the distances, of features standardised over the table.
        models: (model id, distance).
    """

    table: str
    num_models: int
    method: str
    own_row: bool
    metric: str
    models: list[tuple[str, float]]


def find_neighbours(table_path: str | PathLike, model_id: str, source: str | PathLike) -> Neighbours:
    """Searches the table, embedding the model as the table was made unless it has a row of that id.

    Raises:
        ValueError: the table cannot be read, or a model cannot be embedded like those in it.
        CheckpointError: the table's backbone cannot be read.
    """
    table = EmbeddingTable.read(table_path)
    own = table.model_ids.index(model_id) if model_id in table.model_ids else None
    query = embed_like(table, [source])[0].embeddings if own is None else table.embeddings[[own]]
    exclude = np.array([-1 if own is None else own])
    indices, distances = nearest(table, query, NEIGHBOURS, METRIC, exclude=exclude)
    made_by = table.made_by
    return Neighbours(
        table=str(table_path),
        num_models=len(table),
        method=made_by.get("backbone") or made_by.get("method", "a method that it does not name"),
        own_row=own is not None,
        metric=METRIC,
        models=[(table.model_ids[row], float(far)) for row, far in zip(indices[0], distances[0], strict=True)],
    )
