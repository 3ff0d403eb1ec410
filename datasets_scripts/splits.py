"""Which models are duplicates, and which go to validation: a function of ids, owners, hashes and a seed alone."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .schema import TRAIN, VALIDATION


@dataclass(frozen=True)
class SplitItem:
    """What a split is decided by. `owner` is None where nobody is named: such a model stands for itself."""

    model_id: str
    owner: str | None
    weights_sha256: str
    num_tokens: int


def duplicate_groups(items: Sequence[SplitItem]) -> list[str]:
    """Names each model's group of bit-identical weights after the group's first model."""
    first: dict[str, str] = {}
    return [first.setdefault(item.weights_sha256, item.model_id) for item in items]


def assign_splits(items: Sequence[SplitItem], *, split_by: str, validation_fraction: float, seed: int) -> list[str]:
    """Divides models into training and validation; groups that belong together never part.

    Groups are visited in an order drawn from `seed`; each goes to validation where it still fits into
    `validation_fraction` of all tokens. If none fits, the smallest goes, provided that another is left to train on.

    Args:
        items: the models, in any order that does not change between runs.
        split_by: "owner" keeps an owner's models together, "model" only duplicates. Duplicates tie their owners.

    Returns:
        "train" or "validation" for each model.
    """
    groups = _groups(items, split_by)
    tokens = [sum(items[i].num_tokens for i in group) for group in groups]
    room = validation_fraction * sum(tokens)
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)
    chosen = []
    for index in order:
        if tokens[index] <= room:
            chosen.append(index)
            room -= tokens[index]
    if not chosen and validation_fraction > 0 and len(groups) > 1:
        chosen = [min(order, key=tokens.__getitem__)]
    validation = {i for index in chosen for i in groups[index]}
    return [VALIDATION if i in validation else TRAIN for i in range(len(items))]


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
        if split_by == "owner" and item.owner is not None:
            keys.append(("owner", item.owner))
        for key in keys:
            parent[root(i)] = root(first.setdefault(key, i))
    groups: dict[int, list[int]] = {}
    for i in range(len(items)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())
