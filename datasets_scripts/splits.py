"""Which models are duplicates, and which go to validation: a function of what models share and of a seed alone."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .schema import TRAIN, VALIDATION


@dataclass(frozen=True)
class SplitItem:
    """What a split is decided by. A model whose `owner` or `near_copy_group` is None stands for itself in that."""

    model_id: str
    owner: str | None
    weights_sha256: str
    num_tokens: int
    near_copy_group: str | None = None


def duplicate_groups(items: Sequence[SplitItem]) -> list[str]:
    """Names each model's group of bit-identical weights after the group's first model."""
    first: dict[str, str] = {}
    return [first.setdefault(item.weights_sha256, item.model_id) for item in items]


def assign_splits(items: Sequence[SplitItem], *, split_by: str, validation_fraction: float, seed: int) -> list[str]:
    """Divides models into training and validation by their share of tokens; what belongs together never parts.

    Groups are visited in an order drawn from `seed`; each goes to validation where it still fits into
    `validation_fraction` of all tokens. If none fits, the smallest goes, provided that another is left to train on.

    Args:
        items: the models, in any order that does not change between runs.
        split_by: "owner" keeps an owner's models together, "model" only duplicates and near copies, which tie their
            owners.

    Returns:
        "train" or "validation" for each model.
    """
    groups = _groups(items, split_by)
    tokens = [sum(items[i].num_tokens for i in group) for group in groups]
    room = validation_fraction * sum(tokens)
    order = _shuffled(len(groups), seed)
    chosen = []
    for index in order:
        if tokens[index] <= room:
            chosen.append(index)
            room -= tokens[index]
    if not chosen and validation_fraction > 0 and len(groups) > 1:
        chosen = [min(order, key=tokens.__getitem__)]
    return _splits(groups, chosen, len(items))


def assign_splits_by_count(
    items: Sequence[SplitItem], *, split_by: str, validation_models: int, seed: int
) -> list[str]:
    """Divides models by their number: `validation_models` of them go to validation (the paper holds out 200 of 2,200).

    Where no union of whole groups has just that many, the largest that has fewer is taken, never one that has more;
    one group at least is left to train on.

    Args:
        items, split_by: as in `assign_splits`.
        validation_models: how many are wanted.
        seed: of the order in which groups are tried.

    Returns:
        "train" or "validation" for each model.
    """
    groups = _groups(items, split_by)
    wanted = max(0, min(validation_models, len(items) - 1))
    reached: dict[int, list[int]] = {0: []}  # number of models -> the first groups found that have that many in all
    for index in _shuffled(len(groups), seed):
        for count, taken in sorted(reached.items(), reverse=True):  # downwards, so that no group is taken twice
            total = count + len(groups[index])
            if total <= wanted and total not in reached:
                reached[total] = [*taken, index]
    return _splits(groups, reached[max(reached)], len(items))


def _shuffled(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def _splits(groups: Sequence[Sequence[int]], chosen: Sequence[int], count: int) -> list[str]:
    validation = {i for index in chosen for i in groups[index]}
    return [VALIDATION if i in validation else TRAIN for i in range(count)]


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
        if split_by == "owner" and item.owner is not None:
            keys.append(("owner", item.owner))
        for key in keys:
            parent[root(i)] = root(first.setdefault(key, i))
    groups: dict[int, list[int]] = {}
    for i in range(len(items)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())
