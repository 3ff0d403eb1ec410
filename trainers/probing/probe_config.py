"""Every option of `hf-wsl probe`, described once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from datasets_scripts.embedding.embed_config import METHODS, POOLINGS, EmbedConfig
from datasets_scripts.schema import SPLITS
from hf_wsl.options import ConfigError, build, nearest, option


PROBES = ("ridge", "mlp")  # those of `.probes`, without its imports
RANDOM, LEAVE_GROUP_OUT = "random", "leave-group-out"
UNTRAINED, MEAN, MAJORITY = "untrained", "mean", "majority"  # lines of every table, beside METHODS
TAKEN = (UNTRAINED, MEAN, MAJORITY, "position", "probe", "shapes only")
GIVEN_NAME = re.compile(r"([\w.-]+)=(.+)")
OWN = ("pooling", "seed", "untrained", "per_layer", "fit_on")  # of EmbedConfig: set by options of a probe


@dataclass(frozen=True)
class ProbeConfig:
    """Tells what is read off which embeddings, and how it is measured. Raises ConfigError, naming the option."""

    EXAMPLE = "hf-wsl probe --models zoo --target test_accuracy,epoch --backbones backbone --output_dir probe"

    models: list = option([], "models, folders of models, zoos, Hub ids or lists of these, separated by commas")
    properties: str = option(
        "",
        "table of what is known of the models (Parquet, CSV, JSON, JSON lines) or a zoo; empty: the models' own files",
    )
    target: list = option([], "properties to predict: numbers are regressed, text and booleans are classes")
    group: str | None = option(
        None,
        "property that no two splits share: member, repo, owner; empty: every model is a group of its own; none: "
        "member where there is one, fine-tuned members with the one that they start from, else as empty",
    )
    split: str = option(
        "",
        f"a property with the splits' names, or {RANDOM}, or {LEAVE_GROUP_OUT}; empty: the property split where there "
        f"is one, else {RANDOM}",
    )
    fractions: list = option([0.7, 0.15, 0.15], f"shares of groups, with --split {RANDOM}: {', '.join(SPLITS)}")
    folds: int = option(0, f"with --split {LEAVE_GROUP_OUT}: leave groups out in so many parts; 0: one at a time")
    backbones: list = option([], "folders or Hub ids of WSL models, or NAME=FOLDER, separated by commas")
    untrained: bool = option(True, "also the first backbone's architecture with fresh weights")
    baselines: list = option(list(METHODS), "embeddings without a backbone, separated by commas; none: '-'")
    tables: dict = option({}, "further tables of embeddings, made before: --tables.NAME FILE")
    pooling: str = option("mean", "of tokens to an embedding, see hf-wsl embed", POOLINGS)
    embedding: dict = option({}, "options of the embeddings", of=(EmbedConfig,), hidden=OWN)
    probes: list = option(list(PROBES), "ridge, mlp, or both")
    bootstrap: int = option(1000, "resamples of groups that intervals are made of; 0: no intervals")
    confidence: float = option(0.95, "of the intervals")
    seed: int = option(0, "of splits, networks, resampling, projections and untrained weights")
    num_workers: int = option(1, "processes that fit probes; the results do not depend on it")
    output_dir: str = option("", "folder for probe.json, probe.md and the tables of embeddings")

    def __post_init__(self) -> None:
        for name in ("models", "target", "output_dir"):
            if not getattr(self, name):
                raise ConfigError(f"option '{name}' is missing")
        for name, known, none in (("baselines", METHODS, "-"), ("probes", PROBES, None)):
            for value in getattr(self, name):
                if value not in known and value != none:
                    raise ConfigError(
                        f"option '{name}' has '{value}'; known are {', '.join(known)}.{nearest(value, known)}"
                    )
        if not (self.backbones or self.wanted_baselines or self.tables):
            raise ConfigError("there are no embeddings: give backbones, baselines or tables")
        if not self.probes:
            raise ConfigError(f"option 'probes' is empty; known are {', '.join(PROBES)}")
        if len(self.shares) != len(SPLITS) or min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise ConfigError(f"option 'fractions' is {self.fractions}; give three positive numbers that sum to 1")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"option 'confidence' is {self.confidence}; it is between 0 and 1")
        for name in ("bootstrap", "folds", "num_workers", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"option '{name}' is {getattr(self, name)}; it must not be negative")
        for name in OWN:
            if name in self.embedding:
                raise ConfigError(f"option 'embedding' has '{name}', which follows from the options of the probe")
        for name in self.tables:
            if name in (*self.wanted_baselines, *TAKEN):
                raise ConfigError(f"option 'tables' has '{name}', the name of another line. Call the table otherwise")
        self.named_backbones, self.embed_config()  # noqa: B018 - what cannot be is refused here

    @property
    def shares(self) -> list[float]:
        try:
            return [float(share) for share in self.fractions]
        except ValueError as error:
            raise ConfigError(f"option 'fractions' is {self.fractions}; give three numbers") from error

    @property
    def wanted_baselines(self) -> list[str]:
        return [name for name in self.baselines if name != "-"]

    @property
    def named_backbones(self) -> dict[str, str]:
        """Name in tables -> folder or Hub id."""
        named: dict[str, str] = {}
        for given in self.backbones:
            match = GIVEN_NAME.fullmatch(given)
            name, backbone = match.groups() if match else (Path(given).name.partition("@")[0], given)
            if name in named or name in (*METHODS, *self.tables, *TAKEN):
                raise ConfigError(
                    f"option 'backbones': the name '{name}' of {backbone} is taken. Give NAME={backbone}"
                )
            named[name] = backbone
        return named

    def embed_config(self, **own: object) -> EmbedConfig:
        given = {**self.embedding, "pooling": self.pooling, "seed": self.seed, **own}
        return build(EmbedConfig, ("option 'embedding'", given))
