"""Models with what is known of them, the groups they are of, and the splits they are in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from datasets_scripts.sources import ModelSource, expand_sources
from hf_wsl.options import ConfigError, nearest

from .group_folds import random_splits
from .probe_config import LEAVE_GROUP_OUT, RANDOM, ProbeConfig
from .probe_embeddings import ProbeTask, prepare_task
from .read_properties import read_properties


@dataclass(frozen=True)
class LabeledModels:
    """All that the probes know, embeddings apart.

    Attributes:
        sources: what was named, as `expand_sources` takes it.
        models: what it was expanded to; also those that nothing is known of.
        properties: indexed by model_id; the rows that can be used.
        groups: `[rows]` text.
        splits: `[rows]` of "train", "validation", "test"; None: each group is left out in turn.
        left_out: reason -> how many models are not among the rows.
    """

    sources: list[str]
    models: list[ModelSource]
    properties: pd.DataFrame
    groups: np.ndarray
    splits: np.ndarray | None
    left_out: dict[str, int]

    def task(self, target: str, num_folds: int, rows: np.ndarray | None = None) -> tuple[ProbeTask, np.ndarray]:
        """The target made ready, and the rows that have a value of it.

        Args:
            rows: indices to choose from; None: all.

        Raises:
            ValueError: naming the target: see `prepare_task`.
        """
        rows = np.arange(len(self.properties)) if rows is None else rows
        column = self.properties[target].replace([np.inf, -np.inf], np.nan)
        rows = rows[column.notna().to_numpy()[rows]]
        values = column.iloc[rows].infer_objects()
        is_number = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
        splits = None if self.splits is None else self.splits[rows]
        if not len(rows):
            raise ValueError(f"target '{target}': no model has a value of it.")
        try:
            numbers = values.to_numpy(np.float64) if is_number else values.astype(str).to_numpy(np.str_)
            return prepare_task(numbers, self.groups[rows], splits, num_folds), rows
        except ValueError as error:
            raise ValueError(f"target '{target}': {error}") from error


def label_models(config: ProbeConfig) -> LabeledModels:
    """Reads what is known of the models, and divides them.

    Raises:
        ConfigError: a target, group or split that is no property.
        ValueError: models or properties that cannot be read, or do not belong together; too few groups.
    """
    sources = config.models
    models = expand_sources(sources)
    properties = read_properties(config.properties, sources, models)
    left_out = {"nothing is known of them": len(models) - len(properties)}
    group = ("member" if "member" in properties else "") if config.group is None else config.group
    split = config.split or ("split" if "split" in properties else RANDOM)
    needed = {"group": [group] if group else [], "split": [] if split in (RANDOM, LEAVE_GROUP_OUT) else [split]}
    for option, names in {"target": config.target, **needed}.items():
        for name in names:
            if name not in properties:
                known = list(map(str, properties.columns))
                raise ConfigError(
                    f"option '{option}': the models have no property '{name}'; they have {', '.join(known)}."
                    f"{nearest(name, known)}"
                )
    for option, names in needed.items():
        present = properties[names].notna().all(axis=1)
        left_out[f"no value of their {option}"] = int((~present).sum())
        properties = properties[present]
    if properties.empty:
        raise ValueError("No model has both a group and a split. Give others as --group and --split.")
    groups = (properties[group] if group else properties.index).astype(str).to_numpy(np.str_)
    if config.group is None and group and "parent" in properties:
        groups = _families(groups, properties["parent"])
    if split == LEAVE_GROUP_OUT:
        splits = None
    elif split == RANDOM:
        splits = random_splits(groups, config.shares, config.seed)
    else:
        splits = properties[split].astype(str).to_numpy(np.str_)
    return LabeledModels(
        sources, models, properties, groups, splits, {reason: count for reason, count in left_out.items() if count}
    )


def _families(members: np.ndarray, parents: pd.Series) -> np.ndarray:
    """`[rows]`: the member that a row's member descends from, for fine-tuned members are near copies of it.

    A parent of another zoo, which is not probed, may have the name of a member that is: it is marked as a parent. With
    several zoos names begin with the zoo's, and are the same thing where they are equal.
    """
    known, parent_of = set(members.tolist()), {}
    for member, parent in zip(members, parents, strict=True):
        if pd.notna(parent):
            name = str(parent).rpartition("/")[0] or str(parent)
            parent_of[member] = name if "/" in name and name in known else f"parent {name}"

    def first(member: str) -> str:
        passed = []
        while member in parent_of and member not in passed:
            passed.append(member)
            member = parent_of[member]
        return member

    return np.array([first(str(member)) for member in members])
