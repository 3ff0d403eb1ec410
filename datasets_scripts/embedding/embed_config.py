"""The options of `hf-wsl embed`, each described once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_wsl.options import PRECISION_HELP, PRECISIONS, REQUIRED, ConfigError, argument, option


if TYPE_CHECKING:
    from modeling_wsl import WSLFeatureExtractor


# What is not a backbone. Anything else that `embed` is given is one: a folder, or a Hub id.
METHODS = ("profile", "statistics", "pooled-statistics", "spectral-norms", "random-projection", "pca")
TOKEN_METHODS = ("random-projection", "pca")  # embed each token, as a backbone does
POOLINGS = ("mean", "moments", "layers")  # those of `modeling_wsl.embedding.pooling`, without its imports


@dataclass(frozen=True)
class EmbedConfig:
    """The options of `hf-wsl embed`.

    Raises:
        ConfigError: a value out of range or not among the choices.
    """

    pooling: str = option(
        "mean",
        "Over all tokens: mean; moments: mean, standard deviation and skewness side by side; layers: the mean of each "
        "layer side by side, for models of one architecture.",
        POOLINGS,
    )
    per_layer: bool = option(False, "Write the mean of each layer too, as column `layers`.")
    untrained: bool = option(False, "The backbone's architecture with fresh random weights, drawn by the seed.")
    revision: str | None = option(None, "Branch, tag or commit of a backbone on the Hub.")
    window_size: int | None = option(None, "Tokens per window; by default that which the backbone was trained on.")
    halo: int = option(64, "Tokens of context on both sides of a window.")
    batch_size: int = option(8, "Windows per forward pass; of models shorter than a window as many more.")
    precision: str = option("auto", PRECISION_HELP, PRECISIONS, was=("mixed_precision",))
    fit_on: list = option([], "Sources whose tokens pca is fitted on; by default the embedded models.")
    latent_size: int = option(128, "Numbers per token of random-projection and pca.")
    tokenization: str = option("dense", "Of the methods without a backbone.", ("dense", "sparse"))
    token_size: int = option(230, "Of the methods without a backbone: entries per token.")
    batch_norm_statistics: str = option(
        "carry", "Of the methods without a backbone: running statistics left out, or taken in.", ("carry", "tokenize")
    )
    seed: int = option(0, "Of random projections and untrained backbones.")
    allow_nonfinite: bool = option(
        False, "Admit NaN and infinite weights; a model whose embedding is not finite is left out."
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            choices, value = field.metadata["choices"], getattr(self, field.name)
            if choices and value not in choices:
                raise ConfigError(f"{field.name}={value!r} is not known; choose one of {', '.join(choices)}.")
        lowest = {"window_size": 1, "halo": 0, "batch_size": 1, "latent_size": 3, "token_size": 1}
        for name, least in lowest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; it is at least {least}.")

    def feature_extractor(self) -> WSLFeatureExtractor:
        """That of the methods without a backbone."""
        from modeling_wsl import WSLFeatureExtractor  # here: options are read without torch

        return WSLFeatureExtractor(
            tokenization=self.tokenization,
            token_size=self.token_size,
            batch_norm_statistics=self.batch_norm_statistics,
        )


@dataclass(frozen=True)
class EmbedOptions(EmbedConfig):
    """The command line of `hf-wsl embed`."""

    EXAMPLE = "hf-wsl embed backbone models/ --output_file embeddings.parquet"

    method: str = argument(f"A backbone (folder or Hub id), or one of: {', '.join(METHODS)}.")
    sources: list = argument(
        "Models, folders of models, Hub ids, parts of these (org/name:subfolder#key@revision, file.pt#all), or lists."
    )
    output_file: Path = option(
        REQUIRED,
        "Parquet file: model_id, revision, embedding, x, y; of the method profile also position and probe.",
        metavar="FILE",
        group="output",
        was=("output_dir",),
        also=("output",),
    )
    overwrite_output_file: bool = option(False, "Replace a file that is there.")
