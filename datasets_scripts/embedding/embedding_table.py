"""The table of embeddings: one Parquet row a model, and how it was made in the metadata."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_wsl.files import replacing


FINGERPRINTS = ("position", "probe")
LAYERS_TYPE = pa.list_(pa.struct([("name", pa.string()), ("embedding", pa.list_(pa.float32()))]))


@dataclass
class EmbeddingTable:
    """Embeddings of models, in the order in which the models were named.

    Attributes:
        model_ids: unique.
        embeddings: float32 `[models, d]`.
        revisions: the commit of a model of the Hub, None for others; by default None for all.
        points: float32 `[models, 2]`, a map to look at; by default `principal_map(embeddings)`.
        made_by: what the file's metadata tell: `method` ("backbone" or one of METHODS), `backbone`,
            `backbone_revision` or, of a folder, `backbone_weights` (`backbone_state`), the settings that the method
            looks at, and `tensors` (a hash of names and shapes) where numbers of tensors stand side by side.
        layers: for each model, layer name -> float32 `[d]`; None where they were not asked for.
        fingerprints: "position" and "probe" -> float32 `[models, n]`, of the method that makes them (see
            `modeling_wsl.embedding.fingerprints`); else empty.

    Raises:
        ValueError: not as many embeddings as models, or a model twice.
    """

    model_ids: list[str]
    embeddings: np.ndarray
    revisions: list[str | None] | None = None
    points: np.ndarray | None = None
    made_by: dict[str, str] = field(default_factory=dict)
    layers: list[dict[str, np.ndarray]] | None = None
    fingerprints: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.model_ids)
        if self.embeddings.ndim != 2 or len(self.embeddings) != count:
            raise ValueError(f"embeddings have shape {self.embeddings.shape} for {count} models; give [{count}, d].")
        if len(set(self.model_ids)) != count:
            twice = next(name for name in self.model_ids if self.model_ids.count(name) > 1)
            raise ValueError(f"The model {twice!r} stands twice in this table of embeddings; keep one row a model.")
        if self.revisions is None:
            self.revisions = [None] * count
        if self.points is None:
            self.points = principal_map(self.embeddings)

    def __len__(self) -> int:
        return len(self.model_ids)

    def select(self, model_ids: Sequence[str]) -> "EmbeddingTable":
        """The rows of these models, in this order, with the points of the whole table.

        Raises:
            ValueError: a model that the table does not hold.
        """
        row_of = {name: row for row, name in enumerate(self.model_ids)}
        missing = [name for name in model_ids if name not in row_of]
        if missing:
            raise ValueError(
                f"The table of embeddings has no row for {_some(missing)}. Embed them too, or leave them out."
            )
        chosen = [row_of[name] for name in model_ids]
        return EmbeddingTable(
            list(model_ids),
            self.embeddings[chosen],
            [self.revisions[row] for row in chosen],
            self.points[chosen],
            dict(self.made_by),
            None if self.layers is None else [self.layers[row] for row in chosen],
            {name: rows[chosen] for name, rows in self.fingerprints.items()},
        )

    def write(self, path: str | PathLike) -> None:
        """Writes Parquet: `model_id`, `revision`, `embedding` (fixed-size list of float32), `x`, `y` and, where there
        are any, `position`, `probe` and `layers` (list of name and embedding); `made_by` as the file's metadata."""
        columns = {
            "model_id": pa.array(self.model_ids, pa.string()),
            "revision": pa.array(self.revisions, pa.string()),
            "embedding": _column(self.embeddings),
            "x": self.points[:, 0],
            "y": self.points[:, 1],
            **{name: _column(rows) for name, rows in self.fingerprints.items()},
        }
        if self.layers is not None:
            rows = [[{"name": name, "embedding": of} for name, of in layers.items()] for layers in self.layers]
            columns["layers"] = pa.array(rows, LAYERS_TYPE)
        table = pa.table(columns).replace_schema_metadata(self.made_by)
        with replacing(Path(path)) as temporary:
            pq.write_table(table, temporary)

    @classmethod
    def read(cls, path: str | PathLike) -> "EmbeddingTable":
        """The table that `write` wrote.

        Raises:
            ValueError: there is no such file, it is not Parquet, or a column is missing.
        """
        if not Path(path).is_file():
            raise ValueError(f"{path}: there is no such table of embeddings; `hf-wsl embed` writes one.")
        try:
            table = pq.read_table(path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: this is not a Parquet table of embeddings: {error}") from error
        missing = {"model_id", "revision", "embedding", "x", "y"} - set(table.column_names)
        if missing:
            raise ValueError(
                f"{path}: columns are missing: {', '.join(sorted(missing))}. Make the table with `hf-wsl embed`."
            )
        layers = None
        if "layers" in table.column_names:
            layers = [
                {layer["name"]: np.array(layer["embedding"], dtype=np.float32) for layer in row}
                for row in table["layers"].to_pylist()
            ]
        return cls(
            table["model_id"].to_pylist(),
            _rows(table["embedding"]),
            table["revision"].to_pylist(),
            np.stack([table["x"].to_numpy(), table["y"].to_numpy()], axis=1).astype(np.float32),
            {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()},
            layers,
            {name: _rows(table[name]) for name in FINGERPRINTS if name in table.column_names},
        )


def _column(rows: np.ndarray) -> pa.FixedSizeListArray:
    flat = pa.array(np.ascontiguousarray(rows, dtype=np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])


def _rows(column: pa.ChunkedArray) -> np.ndarray:
    lists = column.combine_chunks()
    return lists.flatten().to_numpy(zero_copy_only=False).reshape(len(lists), -1).astype(np.float32)


def principal_map(embeddings: np.ndarray) -> np.ndarray:
    """The first two principal components of `[models, d]`: float32 `[models, 2]`, 0 where nothing spreads.

    The sign of each component is that of its largest loading, so that the same table gives the same map.
    """
    centered = embeddings.astype(np.float64) - embeddings.mean(0, dtype=np.float64)
    # Two directions need no whole decomposition: the eigenvectors of the smaller Gram matrix give them.
    is_wide = centered.shape[0] < centered.shape[1]
    values, vectors = np.linalg.eigh(centered @ centered.T if is_wide else centered.T @ centered)
    spreads = values[::-1][:2] > np.finfo(np.float64).eps * max(centered.shape) * values[-1]
    directions = vectors.T[::-1][:2][spreads]
    if is_wide:
        directions = directions @ centered
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    largest = np.abs(directions).argmax(1)
    directions = directions * np.sign(directions[np.arange(len(directions)), largest])[:, None]
    points = np.zeros((len(embeddings), 2), dtype=np.float32)
    points[:, : len(directions)] = centered @ directions.T
    return points


def _some(names: Iterable[str], shown: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(repr, names[:shown])) + more
