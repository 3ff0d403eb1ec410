"""Duplicates, and the models that go to validation: a function of what models share and of a seed, or of a table."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from hf_wsl.files import sha256

from .schema import TEST, TRAIN, VALIDATION
from .tokenize_config import TokenizeError


@dataclass(frozen=True)
class SplitItem:
    """A model, by what splits depend on; without one of what is optional it stands for itself in that."""

    model_id: str
    owner: str | None
    weights_sha256: str
    num_tokens: int
    near_copy_group: str | None = None
    canonical_sha256: str | None = None


def duplicate_groups(items: Sequence[SplitItem]) -> list[str]:
    """Names each model's group of bit-identical weights after the group's first model."""
    first: dict[str, str] = {}
    return [first.setdefault(item.weights_sha256, item.model_id) for item in items]


def assign_splits(
    items: Sequence[SplitItem],
    *,
    split_by: str,
    seed: int,
    validation_fraction: float = 0.0,
    validation_models: int | None = None,
) -> list[str]:
    """Divides models into training and validation; what belongs together never parts, one group is left to train on.

    Args:
        items: the models, in any order that does not change between runs.
        split_by: "owner" keeps an owner's models together, "model" only duplicates and near copies, which tie their
            owners.
        seed: of the order in which groups are tried.
        validation_fraction: of all tokens. Each group goes to validation where it still fits into that share; where
            none does, the smallest goes, unless the fraction is 0.
        validation_models: instead of a share, their number (the paper holds out 200 of 2,200). Where no union of whole
            groups has just that many, the largest that has fewer is taken, never one that has more.

    Returns:
        "train" or "validation" for each model.
    """
    groups = _groups(items, split_by)
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)
    if validation_models is None:
        tokens = [sum(items[i].num_tokens for i in group) for group in groups]
        chosen = _by_tokens(tokens, validation_fraction, order)
    else:
        wanted = max(0, min(validation_models, len(items) - 1))
        chosen = _by_count([len(group) for group in groups], wanted, order)
    validation = {i for index in chosen for i in groups[index]}
    return [VALIDATION if i in validation else TRAIN for i in range(len(items))]


def _by_tokens(tokens: Sequence[int], fraction: float, order: Sequence[int]) -> list[int]:
    """The groups that go to validation by their tokens."""
    room = fraction * sum(tokens)
    chosen = []
    for index in order:
        if tokens[index] <= room:
            chosen.append(index)
            room -= tokens[index]
    if not chosen and fraction > 0 and len(tokens) > 1:
        chosen = [min(order, key=tokens.__getitem__)]
    return chosen


def _by_count(sizes: Sequence[int], wanted: int, order: Sequence[int]) -> list[int]:
    """The groups that go to validation by their numbers of models."""
    reached: dict[int, list[int]] = {0: []}  # number of models -> the first groups that have that many in all
    for index in order:
        for count, taken in sorted(reached.items(), reverse=True):  # downwards, so that no group is taken twice
            total = count + sizes[index]
            if total <= wanted and total not in reached:
                reached[total] = [*taken, index]
    return reached[max(reached)]


def _groups(items: Sequence[SplitItem], split_by: str) -> list[list[int]]:
    """The indices of the models that must stay together, by union-find over what they share."""
    parent = list(range(len(items)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, item in enumerate(items):
        keys = [("weights", item.weights_sha256)]
        if item.near_copy_group is not None:
            keys.append(("near copies", item.near_copy_group))
        if item.canonical_sha256 is not None:
            keys.append(("network", item.canonical_sha256))
        if split_by == "owner" and item.owner is not None:
            keys.append(("owner", item.owner))
        for key in keys:
            parent[root(i)] = root(first.setdefault(key, i))
    groups: dict[int, list[int]] = {}
    for i in range(len(items)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


def properties_digest(properties: pa.Table) -> str:
    """Tells tables of properties apart."""
    return sha256(json.dumps(properties.to_pylist(), sort_keys=True))[:32]


def check_properties(properties: pa.Table, model_ids: Sequence[str]) -> None:
    """Raises TokenizeError where a table has not one row a model, or a split that datasets do not have."""
    missing = {"model_id", "split"} - set(properties.column_names)
    if missing:
        raise TokenizeError(f"The table of properties lacks the column {sorted(missing)[0]}; add it.")
    listed = properties["model_id"].to_pylist()
    known = set(listed)
    absent = [model_id for model_id in model_ids if model_id not in known]
    if absent or len(known) < len(listed):
        what = f"has no row for {absent[0]!r}" if absent else "lists a model twice"
        raise TokenizeError(f"The table of properties {what}; give one row a model.")
    unknown = set(properties["split"].to_pylist()) - {TRAIN, VALIDATION, TEST}
    if unknown:
        raise TokenizeError(
            f"The table of properties has the split {unknown.pop()!r}; known are train, validation, test."
        )


def given_splits(items: Sequence[SplitItem], properties: pa.Table) -> list[str]:
    """The split of each model, as the table of properties has it.

    Raises:
        TokenizeError: bit-identical models are in different splits.
    """
    given = dict(zip(properties["model_id"].to_pylist(), properties["split"].to_pylist(), strict=True))
    for item, first in zip(items, duplicate_groups(items), strict=True):
        if given[item.model_id] != given[first]:
            raise TokenizeError(
                f"{item.model_id} and {first} have the same weights, and the table of properties puts them into the "
                f"splits {given[item.model_id]} and {given[first]}. Leave one out, or give both one split."
            )
    return [given[item.model_id] for item in items]
