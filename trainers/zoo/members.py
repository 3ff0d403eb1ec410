"""The members of a lab zoo before they are trained: settings, seeds, splits and parents."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from datasets_scripts.schema import SPLITS
from datasets_scripts.sources import ZOO_MODELS, ZOO_TABLE
from hf_wsl.options import ConfigError
from hf_wsl.run_folder import SETTINGS_FILE

from .zoo_config import DEFAULT, ZooConfig


FRACTIONS = (0.70, 0.15, 0.15)  # of members, by SPLITS (paper, Table 9)
STACKED = "small_cnn"


@dataclass(frozen=True)
class Member:
    """One model before it is trained. `parent` is the id of the checkpoint that it starts from, or None."""

    name: str
    seed: int
    optimizer: str
    activation: str
    initialization: str
    dropout: float
    learning_rate: float
    weight_decay: float
    split: str
    parent: str | None = None
    parent_folder: str | None = None


@dataclass(frozen=True)
class Parent:
    """A last checkpoint of another zoo."""

    model_id: str
    folder: str
    activation: str
    initialization: str
    split: str


def zoo_members(config: ZooConfig) -> list[Member]:
    """All members, in the order of the grid. None shares its seed with another.

    Without parents none begins as a copy of another, then. The children of one parent all begin as a copy of it; their
    settings, or the order of their images, tell them apart.

    Raises:
        ConfigError: more members are to be drawn than the grid has; parents of another architecture, or no zoo.
    """
    parents = _read_parents(config) if config.parents else [None]
    combinations = list(itertools.product(*config.grid().values(), parents, range(config.seeds)))
    rng = np.random.default_rng(config.seed)
    if config.sampling == "random":
        if config.num_members > len(combinations):
            raise ConfigError(
                f"option 'num_members' is {config.num_members}, and the grid has {len(combinations)} combinations; "
                "lower it, or raise 'seeds'"
            )
        drawn = np.sort(rng.permutation(len(combinations))[: config.num_members])
        combinations = [combinations[index] for index in drawn]
    splits = _member_splits(len(combinations), rng)
    members = []
    for index, (optimizer, activation, initialization, dropout, rate, decay, parent, _) in enumerate(combinations):
        if config.architecture == STACKED and activation == DEFAULT:
            activation = "relu"
        members.append(
            Member(
                name=f"member_{index:04d}",
                seed=config.seed * 1_000_000 + index,
                optimizer=optimizer,
                activation=parent.activation if parent else activation,
                initialization=parent.initialization if parent else initialization,
                dropout=dropout,
                learning_rate=rate,
                weight_decay=decay,
                split=parent.split if parent else splits[index],  # a child is a near copy of its parent
                parent=parent and parent.model_id,
                parent_folder=parent and parent.folder,
            )
        )
    return members


def stacks_of(members: Sequence[Member], config: ZooConfig) -> list[tuple[Member, ...]]:
    """Members that are trained at once: those that differ in numbers alone. It does not depend on the workers."""
    size = config.stack_size if config.architecture == STACKED else 1
    alike: dict[tuple, list[Member]] = {}
    for member in members:
        alike.setdefault((member.optimizer, member.activation, member.dropout > 0), []).append(member)
    return [tuple(group[at : at + size]) for group in alike.values() for at in range(0, len(group), size)]


def _member_splits(count: int, rng: np.random.Generator) -> list[str]:
    bounds = np.rint(np.cumsum(FRACTIONS) * count).astype(int)
    splits = np.empty(count, object)
    for name, chosen in zip(SPLITS, np.split(rng.permutation(count), bounds[:-1]), strict=True):
        splits[chosen] = name
    return splits.tolist()


def _read_parents(config: ZooConfig) -> list[Parent]:
    folder = Path(config.parents).absolute()
    table = folder / ZOO_TABLE
    if not table.is_file():
        raise ConfigError(f"option 'parents' names {config.parents}, which holds no finished zoo: no {table.name}")
    settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    for name in ("architecture", "architecture_args"):
        if settings[name] != getattr(config, name):
            raise ConfigError(f"option '{name}' is {getattr(config, name)}; the zoo of 'parents' has {settings[name]}")
    rows = sorted(pq.read_table(table).to_pylist(), key=lambda row: row["epoch"])
    last = {row["member"]: row for row in rows}  # of a member's rows that of its last epoch
    return [
        Parent(
            row["model_id"],
            str(folder / ZOO_MODELS / row["model_id"]),
            row["activation"],
            row["initialization"],
            row["split"],
        )
        for row in last.values()
    ]
