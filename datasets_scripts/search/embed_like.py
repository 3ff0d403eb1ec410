"""Embeds further models as a table was made."""

import dataclasses
from collections.abc import Sequence
from os import PathLike

from ..config_sources import build
from ..embedding import EmbedConfig, EmbeddingTable, embed_models


# Facts of a table that may differ where the method is the same: a branch that is named by its commit.
NOT_THE_METHOD = ("backbone_revision", "fit_on")


def embed_like(
    table: EmbeddingTable, sources: Sequence[str | PathLike], fit_on: Sequence[str | PathLike] = ()
) -> tuple[EmbeddingTable, dict[str, str]]:
    """Embeds models by the method, backbone and settings in a table's metadata.

    Args:
        table: made by `hf-wsl embed`.
        sources: see `expand_sources`.
        fit_on: the sources of the table; for a table whose PCA was fitted on its own models.

    Returns:
        Their table, and the models that could not be read with the reason of each.

    Raises:
        ValueError: the metadata do not tell how the table was made; or its method depends on which models are
            embedded together, and these give another one.
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
    if method == "pca" and not settings.get("fit_on"):
        if not fit_on:
            raise ValueError("The PCA of this table was fitted on the models in it. Name them with --models.")
        settings["fit_on"] = [str(source) for source in fit_on]
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
