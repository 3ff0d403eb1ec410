"""The models that a probe is trained, chosen and measured on. What shares a group is never on two sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import GroupKFold

from datasets_scripts.schema import SPLITS, TEST, TRAIN, VALIDATION


INNER_FOLDS = 5  # where no validation split is given


@dataclass(frozen=True)
class Fold:
    """One training and measurement of a probe; the arrays are indices of rows, int64.

    Attributes:
        train: rows that the probe is fitted on.
        choices: pairs of rows to fit on and rows to compare settings on, all of other groups than `test`.
        test: rows that it is measured on.
    """

    train: np.ndarray
    choices: list[tuple[np.ndarray, np.ndarray]]
    test: np.ndarray


def random_splits(groups: np.ndarray, fractions: Sequence[float], seed: int) -> np.ndarray:
    """Divides groups at random, by their number; each split gets one at least.

    Args:
        groups: `[n]`, any labels.
        fractions: of training, validation and test, summing to 1.

    Returns:
        "train", "validation" or "test" for each row, `[n]`.

    Raises:
        ValueError: fewer groups than splits.
    """
    names = np.unique(groups)
    if len(names) < len(SPLITS):
        raise ValueError(
            f"{len(names)} group(s) of models cannot be divided into {', '.join(SPLITS)}. Give more models, or "
            'another column as --group; "" makes every model a group of its own.'
        )
    held = [max(1, round(fraction * len(names))) for fraction in fractions[1:]]
    while sum(held) >= len(names):
        held[held.index(max(held))] -= 1
    order = np.random.default_rng(seed).permutation(names)
    split_of = dict.fromkeys(order, TRAIN)
    split_of |= dict.fromkeys(order[: held[0]], VALIDATION) | dict.fromkeys(order[held[0] : sum(held)], TEST)
    return np.array([split_of[group] for group in groups])


def folds_of_splits(groups: np.ndarray, splits: np.ndarray) -> list[Fold]:
    """The one fold of given splits. Without validation rows, settings are compared by folds of the training groups.

    Raises:
        ValueError: an unknown split, none to train or test on, a group in two splits.
    """
    unknown = sorted(set(splits.tolist()) - set(SPLITS))
    if unknown:
        raise ValueError(f"A model's split is one of {', '.join(SPLITS)}, not {unknown[0]!r}.")
    for group in np.unique(groups).tolist():
        if len(names := np.unique(splits[groups == group])) > 1:
            raise ValueError(
                f"The group {group!r} is in the splits {' and '.join(names)}: what is measured on one half was seen "
                "in the other. Divide by group: --split random."
            )
    train, validation, test = (np.flatnonzero(splits == name) for name in SPLITS)
    for name, rows in ((TRAIN, train), (TEST, test)):
        if not len(rows):
            raise ValueError(f"The split {name!r} has no models. Give more of them, or --split leave-group-out.")
    return [Fold(train, [(train, validation)] if len(validation) else _inner_folds(train, groups), test)]


def leave_group_out_folds(groups: np.ndarray, num_folds: int = 0) -> list[Fold]:
    """Leaves each group out in turn, or the groups in `num_folds` parts of about equal size.

    Args:
        groups: `[n]`, any labels.
        num_folds: 0 takes one fold a group.

    Raises:
        ValueError: fewer than three groups: one is left out, one fitted on, one chosen on.
    """
    count = len(np.unique(groups))
    if count < 3:
        raise ValueError(
            f"--split leave-group-out needs three groups of models, to fit, to choose and to measure on; there are "
            f'{count}. Give another column as --group; "" makes every model a group of its own (leave-one-out).'
        )
    num_folds = min(num_folds or count, count)
    if num_folds < 2:
        raise ValueError(f"--folds is {num_folds}; take 2 or more, or 0 for one a group.")
    return [
        Fold(train, _inner_folds(train, groups), test)
        for train, test in GroupKFold(num_folds).split(groups, groups=groups)
    ]


def _inner_folds(train: np.ndarray, groups: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    inside = groups[train]
    count = min(INNER_FOLDS, len(np.unique(inside)))
    if count < 2:
        raise ValueError(
            f"All {len(train)} training models are of the group '{inside[0]}', so that no settings can be compared on "
            "others. Give a validation split, or more groups."
        )
    return [(train[fit], train[held]) for fit, held in GroupKFold(count).split(inside, groups=inside)]
