"""Which rows of an image dataset are trained on, measured on and tested on, and what their labels are."""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import numpy as np
from sklearn.model_selection import train_test_split

from ..data_config import ImageDataConfig
from ..public_dataset import PublicDatasetError, take_split


_VALIDATION_NAMES = ("validation", "val", "valid", "dev")
_LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")
_CUT = "cut from the training split"


@dataclass(frozen=True)
class LabeledRows:
    """Rows and labels of "train", "validation" and "test".

    Attributes:
        rows: of the dataset, by use.
        labels: int64 `[rows]`, by use; 0 ... classes - 1.
        class_names: in the order of the labels.
        names: where each use came from: the name of a split, or "cut from the training split".
    """

    rows: dict[str, datasets.Dataset]
    labels: dict[str, np.ndarray]
    class_names: tuple[str, ...]
    image_column: str
    label_column: str
    names: dict[str, str]


def split_images(splits: dict[str, datasets.Dataset], config: ImageDataConfig) -> LabeledRows:
    """Finds columns and splits, and cuts what is missing from the training split, each class in proportion.

    Raises:
        PublicDatasetError: a column or split that is missing or ambiguous, no labels, hidden labels, an empty split.
    """
    rows, names = _three_splits(splits, config)
    image_column, label_column = _image_column(rows["train"], config), _label_column(rows["train"], config)
    labels, class_names = _labels(rows, label_column)
    if _CUT in names.values():
        rows, labels = _cut(rows, labels, names, config)
    return LabeledRows(rows, labels, class_names, image_column, label_column, names)


def _three_splits(
    splits: dict[str, datasets.Dataset], config: ImageDataConfig
) -> tuple[dict[str, datasets.Dataset], dict[str, str]]:
    """The splits to use and their names in the dataset; `_CUT` for one that has to come from the training split."""
    train = config.train_split or ("train" if "train" in splits else next(iter(splits), "train"))
    found = next((name for name in _VALIDATION_NAMES if name in splits and name != train), "")
    test = config.test_split or ("test" if "test" in splits and train != "test" else "")
    validation = config.validation_split or (found if found != test else "")
    if not test and validation and not config.validation_split:
        test, validation = validation, ""  # so that no choice is made on what the result is measured on
    names = {"train": train, "validation": validation or _CUT, "test": test or _CUT}
    chosen = {use: take_split(splits, name, f"{use}_split") for use, name in names.items() if name != _CUT}
    if len(set(names.values()) - {_CUT}) < len(chosen):
        raise PublicDatasetError(f"'{config.images}': train_split, validation_split and test_split must differ.")
    return chosen, names


def _image_column(rows: datasets.Dataset, config: ImageDataConfig) -> str:
    found = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    wanted = config.image_column
    if wanted and wanted not in found:
        raise PublicDatasetError(
            f"'{config.images}': column '{wanted}' holds no images; columns of images: {', '.join(found) or 'none'}."
        )
    if not found:
        raise PublicDatasetError(
            f"'{config.images}' has no column of images (columns: {', '.join(rows.column_names)}). Write it with the "
            "feature datasets.Image."
        )
    if not wanted and len(found) > 1:
        raise PublicDatasetError(
            f"'{config.images}' has several columns of images; set --data.image_column to one of {', '.join(found)}."
        )
    return wanted or found[0]


def _label_column(rows: datasets.Dataset, config: ImageDataConfig) -> str:
    wanted = config.label_column
    if wanted:
        if wanted not in rows.features:
            raise PublicDatasetError(
                f"'{config.images}' has no column '{wanted}'; its columns are {', '.join(rows.column_names)}."
            )
        return wanted
    found = [name for name, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)]
    if not found:
        found = [name for name in _LABEL_NAMES if name in rows.features][:1]
    if not found:
        raise PublicDatasetError(
            f"'{config.images}' has no labels (columns: {', '.join(rows.column_names)}). Set --data.label_column, or "
            "put the images of an imagefolder into one folder a class."
        )
    if len(found) > 1:
        raise PublicDatasetError(
            f"'{config.images}' has several columns of labels; set --data.label_column to one of {', '.join(found)}."
        )
    return found[0]


def _labels(chosen: dict[str, datasets.Dataset], column: str) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Labels 0 ... of each split, and the names of the classes: those of ClassLabel, or the values there are."""
    kind = chosen["train"].features[column]
    values = {name: np.asarray(rows.select_columns(column)[:][column]) for name, rows in chosen.items()}
    for name, found in values.items():
        if found.ndim != 1 or found.dtype.kind not in "iuUb":
            raise PublicDatasetError(
                f"column '{column}' of the split '{name}' holds {kind}, with gaps or more than one label an image; "
                "set --data.label_column to a column with one class an image."
            )
        if found.dtype.kind == "i" and found.min() < 0:
            raise PublicDatasetError(
                f"the split '{name}' has label {found.min()}: its labels are hidden. Set --data.{name}_split to "
                "another split."
            )
    if isinstance(kind, datasets.ClassLabel):
        return {name: found.astype(np.int64) for name, found in values.items()}, tuple(kind.names)
    classes = np.unique(np.concatenate(list(values.values())))
    numbered = {name: np.searchsorted(classes, found) for name, found in values.items()}
    return numbered, tuple(str(name) for name in classes)


def _cut(
    chosen: dict[str, datasets.Dataset], labels: dict[str, np.ndarray], names: dict[str, str], config: ImageDataConfig
) -> tuple[dict[str, datasets.Dataset], dict[str, np.ndarray]]:
    """Takes the splits that are `_CUT` out of the training split, in the classes' proportion where they allow it."""
    rows, own = chosen["train"], labels["train"]
    left = np.arange(len(rows))
    count = round(config.validation_fraction * len(rows))
    chosen, labels = dict(chosen), dict(labels)
    missing = [use for use, name in names.items() if name == _CUT]
    if count < 1 or count * len(missing) >= len(rows):
        raise PublicDatasetError(
            f"the split '{names['train']}' has {len(rows)} images, too few to cut {' and '.join(missing)} from it; "
            "give the splits by name or another validation_fraction."
        )
    for use in missing:
        classes = own[left]
        numbers = np.bincount(classes)
        proportional = numbers[numbers > 0].min() >= 2 and min(count, len(left) - count) >= (numbers > 0).sum()
        left, taken = train_test_split(
            left, test_size=count, random_state=config.seed, stratify=classes if proportional else None
        )
        taken = np.sort(taken)
        chosen[use], labels[use] = rows.select(taken), own[taken]
    left = np.sort(left)
    chosen["train"], labels["train"] = rows.select(left), own[left]
    return chosen, labels
