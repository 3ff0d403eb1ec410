"""The models of a table of embeddings that are nearest to a model by its weights."""

from dataclasses import dataclass, replace
from os import PathLike

import numpy as np

from hf_wsl.options import ConfigError

from ..embedding import EmbeddingTable, embed_like
from ..search.nearest import nearest
from ..sources import LIST_SUFFIXES, ModelSource


NEIGHBORS = 10
METRIC = "cosine"


@dataclass(frozen=True)
class Neighbors:
    """The nearest models, the nearest first.

    Attributes:
        table: its path. num_models: in it.
        method: how it embeds models.
        own_row: the model's own embedding was found in it, by its id and commit on the Hub.
        metric: of the distances, of features standardized over the table.
        models: (model id, distance).
    """

    table: str
    num_models: int
    method: str
    own_row: bool
    metric: str
    models: list[tuple[str, float]]


@dataclass(frozen=True)
class NeighborSearch:
    """A table in which the neighbors of one model are to be found.

    Attributes:
        path: of the table.
        own_row: of the model, None where it is to be embedded. The name of a folder tells no model from another, so
            only a model of the Hub has one, at the same commit.
    """

    path: str | PathLike
    table: EmbeddingTable
    model: ModelSource
    commit: str | None
    own_row: int | None

    @classmethod
    def begin(cls, path: str | PathLike, model: ModelSource, commit: str | None) -> "NeighborSearch":
        """Reads the table, and refuses one that the model cannot be compared with.

        Args:
            commit: of a model on the Hub.

        Raises:
            ValueError: the table cannot be read, or does not tell how to embed a further model.
        """
        table = EmbeddingTable.read(path)
        known = {
            (name, revision): row
            for row, (name, revision) in enumerate(zip(table.model_ids, table.revisions, strict=True))
        }
        own = None if model.path or commit is None else known.get((model.model_id, commit))
        if own is None and "method" not in table.made_by:
            raise ConfigError(f"{path} does not tell how it was made. Make the table with `hf-wsl embed`.")
        if own is None and table.made_by["method"] == "pca" and not table.made_by.get("fit_on"):
            raise ConfigError(
                f"The PCA of {path} was fitted on the models in it, which it does not name. Make the table with "
                "`hf-wsl embed pca --fit_on MODELS`, or inspect a model of the Hub that has a row there."
            )
        return cls(path, table, model, commit, own)

    def run(self) -> Neighbors:
        """Embeds the model as the table was made, unless it has a row there, and finds the nearest rows.

        Raises:
            ValueError: the model cannot be embedded like those in the table.
            CheckpointError: the table's backbone cannot be read.
        """
        table, own = self.table, self.own_row
        query = embed_like(table, [self._source()])[0].embeddings if own is None else table.embeddings[[own]]
        exclude = np.array([-1 if own is None else own])
        indices, distances = nearest(table, query, NEIGHBORS, METRIC, exclude=exclude)
        made_by = table.made_by
        return Neighbors(
            table=str(self.path),
            num_models=len(table),
            method=made_by.get("backbone") or made_by.get("method", "a method that it does not name"),
            own_row=own is not None,
            metric=METRIC,
            models=[(table.model_ids[row], float(far)) for row, far in zip(indices[0], distances[0], strict=True)],
        )

    def _source(self) -> str:
        """The source that names this model to `expand_sources`, which reads an index of shards as a list of models."""
        path = self.model.path
        if path is None:
            return str(replace(self.model.reference, revision=self.commit or self.model.revision))
        return str(path.parent) if path.suffix in LIST_SUFFIXES else self.model.location
