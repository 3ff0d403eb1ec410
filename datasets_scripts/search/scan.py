"""`hf-wsl scan`: a model against a table of fingerprints: whose copy it is, and what it is like."""

from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from modeling_wsl import open_checkpoint
from modeling_wsl.embedding.model_embedding import embed_checkpoint

from .compare import REFERENCE_TABLE, reference_space
from .fingerprints import POSITION_COSINE, PROBE_DISTANCE
from .nearest import nearest


KINDS = {
    "copy": f"copy or fine-tune (position cosine over {POSITION_COSINE})",
    "reordered": f"permuted or rescaled copy (probe distance under {PROBE_DISTANCE})",
}


@dataclass(frozen=True)
class Match:
    """A model of the table that the scanned one is a copy of, by its fingerprints, or that it is like.

    Attributes:
        model_id: of the table.
        kind: "copy", "reordered", or "neighbor": near by its profile alone.
        position: cosine of the weights as they stand.
        probe: distance of responses relative to the density around both; None in small tables.
    """

    model_id: str
    kind: str
    position: float
    probe: float | None

    def line(self) -> str:
        probe = "not known" if self.probe is None else f"{self.probe:.2f}"
        said = KINDS.get(self.kind, "like it")
        return f"  {self.model_id}: {said}; position {self.position:.2f}, probe {probe}"


def scan(source: Any, table: str | PathLike | None = None, *, top: int = 5, **options: Any) -> list[Match]:
    """Looks a model up in a table.

    Args:
        source: what `open_checkpoint` reads.
        table: Parquet file of `hf-wsl embed profile`; by default the public models that come with the library.
        top: neighbors to name beside the copies.
        options: of `open_checkpoint`.

    Returns:
        The copies, nearest first, then the `top` models of the nearest profiles that are no copies.

    Raises:
        CheckpointError: the model cannot be read.
        ValueError: the table cannot be read or has no fingerprints.
    """
    space = reference_space(str(table or REFERENCE_TABLE))
    with open_checkpoint(source, **options) as checkpoint:
        embedding = embed_checkpoint(checkpoint)
    names = space.table.model_ids
    closeness = space.closeness(embedding)
    by_position = np.argsort([-close.position for close in closeness], kind="stable")
    copies = [i for i in by_position if closeness[i].kind]
    order, _ = nearest(space.table, embedding.profile, len(names))
    neighbors = [i for i in order[0] if not closeness[i].kind][:top]
    return [
        Match(names[i], closeness[i].kind or "neighbor", closeness[i].position, closeness[i].probe)
        for i in [*copies, *neighbors]
    ]
