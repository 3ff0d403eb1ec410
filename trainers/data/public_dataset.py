"""Datasets of images and text as `datasets` reads them: files, a folder or an id on the Hub, with their splits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from huggingface_hub import HfFileSystem
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from hf_wsl.errors import one_line
from modeling_wsl.checkpoints.downloads import fetch
from modeling_wsl.checkpoints.errors import CheckpointError
from modeling_wsl.checkpoints.hub import hub_problem, is_hub_id


class PublicDatasetError(ValueError):
    """A dataset that cannot be used for a task; the message names it, what is wrong and the option that helps."""


def read_dataset(
    name: str,
    builder: str = "a dataset of the Hub",
    *,
    revision: str | None = None,
    subset: str | None = None,
    **options: Any,
) -> datasets.DatasetDict:
    """All splits of a dataset.

    Args:
        name: what is read, for messages; without `options`, an id on the Hub.
        builder: packaged builder of `datasets` ("parquet", "imagefolder", "text") where `options` say what it reads.
        revision: branch, tag or commit on the Hub.
        subset: configuration of a dataset on the Hub.

    Raises:
        PublicDatasetError: there is no such dataset, or it cannot be read.
    """
    if not options and not is_hub_id(name):
        raise PublicDatasetError(f"'{name}' is neither a file, a folder nor a dataset id of the Hub (org/name).")
    try:
        if options:
            return datasets.load_dataset(builder, **options)
        source = datasets.load_dataset_builder(name, subset, revision=revision)
        if not Path(source.cache_dir).exists():  # else the files are not read again
            _fetch_files(source.config.data_files or {})
        source.download_and_prepare()
        return source.as_dataset()
    except Exception as error:  # the libraries that read have no common class of errors
        if isinstance(error, CheckpointError):
            raise PublicDatasetError(f"dataset '{name}': {error.reason}. {error.advice}.") from error
        if isinstance(error, datasets.exceptions.DatasetNotFoundError):  # it does not say which of the two
            raise PublicDatasetError(
                f"{one_line(error)} Check the name and the revision; for a private or gated one `hf auth login`."
            ) from error
        if isinstance(error, HfHubHTTPError | OfflineModeIsEnabled):
            reason, advice = hub_problem(error, revision, kind="dataset")
            raise PublicDatasetError(f"dataset '{name}' {reason}. {advice}.") from error
        raise PublicDatasetError(
            f"'{name}' cannot be read as {builder}: {one_line(error.__cause__ or error)}"
        ) from error


def _fetch_files(data_files: Mapping[str, Iterable[str]]) -> None:
    """Makes sure of the bytes of files on the Hub, which the library is about to take from the same cache."""
    for address in {str(file) for files in data_files.values() for file in files}:
        if address.startswith("hf://"):
            place = HfFileSystem().resolve_path(address)
            fetch(place.repo_id, place.path_in_repo, revision=place.revision, repo_type=place.repo_type)


def take_split(splits: Mapping[str, datasets.Dataset], name: str, option: str) -> datasets.Dataset:
    """A split that holds rows. Raises PublicDatasetError, with the splits there are, where it is missing or empty."""
    if name not in splits:
        raise PublicDatasetError(f"there is no split '{name}'; set --data.{option} to one of {', '.join(splits)}.")
    if len(splits[name]) == 0:
        raise PublicDatasetError(f"the split '{name}' is empty; set --data.{option} to another one.")
    return splits[name]


class FixedRows:
    """A column of lists of one length, read from memory-mapped Arrow as arrays.

    Args:
        dataset: without an indices mapping.
        column: of type List(Value(...), length=n).
    """

    def __init__(self, dataset: datasets.Dataset, column: str) -> None:
        length = dataset.features[column].length
        chunks = dataset.data.column(column).chunks
        self._chunks = [chunk.flatten().to_numpy().reshape(-1, length) for chunk in chunks if len(chunk)]
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def take(self, indices: np.ndarray) -> np.ndarray:
        """A copy of these rows `[len(indices), n]`."""
        chunk = np.searchsorted(self._ends, indices, side="right")
        starts = np.concatenate([[0], self._ends])
        return np.stack([self._chunks[c][row] for c, row in zip(chunk, indices - starts[chunk], strict=True)])


def existing(name: str) -> Path | None:
    """The file or folder of that name, or None."""
    path = Path(name).expanduser()
    return path if path.exists() else None
