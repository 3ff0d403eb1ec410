"""Embeds further models as a table was made."""

import dataclasses
import tempfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from hf_wsl.files import write_json
from hf_wsl.options import build

from ..embedding import EmbedConfig, EmbeddingTable
from ..embedding.backbone_state import backbone_state
from ..embedding.embed_models import embed_models
from ..sources import ModelSource


# Facts of a table that may differ where the method is the same: a branch that is named by its commit.
NOT_THE_METHOD = ("backbone", "backbone_revision", "fit_on")


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
    known = {field.name for field in dataclasses.fields(EmbedConfig)}
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
        found, refused = embed_models(method, sources, build(EmbedConfig, ("the table's metadata", settings)))
    differs = [
        name
        for name in {**made_by, **found.made_by}
        if name not in NOT_THE_METHOD and made_by.get(name) != found.made_by.get(name)
    ]
    if differs:
        name = differs[0]
        raise ValueError(
            f"The table was made with {name}={made_by.get(name)}, and these models alone give "
            f"{found.made_by.get(name)}. Embed them into the table, and name the row."
        )
    return found, refused


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
