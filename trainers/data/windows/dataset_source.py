"""Where a tokenized dataset lies, in a folder or on the Hub, and how its parts are read from there."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from datasets_scripts.schema import EXTRACTOR_FILE, LOCAL, MODELS, TRAIN, VALIDATION, WINDOWS
from hf_wsl.errors import one_line
from modeling_wsl.checkpoints.downloads import fetch
from modeling_wsl.checkpoints.errors import CheckpointError
from modeling_wsl.checkpoints.hub import hub_problem, is_hub_id
from modeling_wsl.feature_extraction_wsl import WSLFeatureExtractor

from .reading import look_ahead
from .window_files import WindowFiles
from .window_table import DatasetError


@dataclass(frozen=True)
class SplitSize:
    """What a split holds, by the rows of the config `models`."""

    windows: int = 0
    tokens: int = 0


class DatasetSource:
    """A tokenized dataset: a folder written by `hf-wsl tokenize`, or a dataset on the Hub.

    Making one, and its methods, raise DatasetError where the dataset cannot be found or read.

    Args:
        name: the folder, or `org/name`.
        revision: branch, tag or commit on the Hub. Give a commit (see `commit`) to have all parts of one state.
    """

    def __init__(self, name: str, revision: str | None = None) -> None:
        self.name = name
        self.revision = revision
        folder = Path(name).expanduser()
        self.folder = folder if folder.is_dir() else None
        if self.folder is None and not is_hub_id(name):
            raise DatasetError(f"dataset '{name}' is neither a folder nor a dataset id of the Hub (org/name)")

    def commit(self) -> str | None:
        """The commit that the revision stands for now; None for a folder, and where the Hub cannot be asked."""
        if self.folder is not None:
            return None
        try:
            return HfApi().dataset_info(self.name, revision=self.revision).sha
        except Exception as error:  # of the client, without a common class
            if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | ValueError):
                raise self._error(error) from error
            return None  # what was read before may lie in the cache; if not, that will be said

    def feature_extractor(self) -> WSLFeatureExtractor:
        """The tokenizer settings that lie beside the windows."""
        folder = self.folder
        if folder is None:
            with self._explained():
                folder = self._fetch(EXTRACTOR_FILE).parent
        if not (folder / EXTRACTOR_FILE).is_file():
            raise DatasetError(self._without_settings())
        return WSLFeatureExtractor.from_pretrained(folder)

    def load(self) -> datasets.DatasetDict:
        """The splits `train` and `validation`, whole and on the disk.

        A folder's Parquet files are named one by one, and those of the Hub are checked (see `fetch`).
        `load_dataset(folder, "windows")` finds them through the card, and then its cache knows the folder by its name
        alone: after a second `hf-wsl tokenize` it would give the windows of the first.
        """
        with self._explained():
            splits = datasets.load_dataset("parquet", data_files=_files_of(self._whole_folder(), WINDOWS, self.name))
        if TRAIN not in splits or len(splits[TRAIN]) == 0:
            raise DatasetError(
                f"dataset '{self.name}' has no training windows (splits: {', '.join(splits) or 'none'})"
            )
        return splits

    def stream(self) -> WindowFiles:
        """The split `train`, to be read as it is used; a shard is a Parquet file."""
        with self._explained():
            if self.folder is not None:
                return WindowFiles(_files_of(self.folder, WINDOWS, self.name)[TRAIN])
            return WindowFiles(list(self._hub_builder(WINDOWS).config.data_files[TRAIN]))

    def sizes(self) -> dict[str, SplitSize]:
        """Windows and tokens of the splits, from three columns of the config `models`; no window is read.

        Where the files of models that are not redistributable were left behind, these do not count.
        """
        with self._explained():
            columns = ["num_windows", "num_tokens", "redistributable"]
            if self.folder is not None:
                models = datasets.load_dataset(
                    "parquet", data_files=_files_of(self.folder, MODELS, self.name), columns=columns, streaming=True
                )
            else:
                models = self._hub_builder(MODELS, columns=columns).as_streaming_dataset()
            sizes = {}
            for split in {TRAIN, VALIDATION} & set(models):
                table = pa.concat_tables(models[split].with_format("arrow").iter(batch_size=100_000))
                kept = pc.fill_null(table["redistributable"], True)
                if not pc.all(kept).as_py() and not any(
                    f"-{LOCAL}-" in Path(str(file)).name for file in self._window_files().get(split, ())
                ):
                    table = table.filter(kept)
                sizes[split] = SplitSize(*(pc.sum(table[name]).as_py() or 0 for name in columns[:2]))
        if sizes.get(TRAIN, SplitSize()).windows == 0:
            raise DatasetError(f"dataset '{self.name}' has no training windows by its config '{MODELS}'")
        return sizes

    def manifests(self) -> dict[str, str | None]:
        """Model id -> manifest as JSON of the models of the split `train`, by the config `models`."""
        with self._explained():
            columns = ["model_id", "manifest"]
            if self.folder is not None:
                files = _files_of(self.folder, MODELS, self.name)
                models = datasets.load_dataset("parquet", data_files=files, columns=columns, streaming=True)
            else:
                models = self._hub_builder(MODELS, columns=columns).as_streaming_dataset()
            return {row["model_id"]: row["manifest"] for row in models[TRAIN]}

    def validation(self, size: SplitSize, max_windows: int) -> datasets.Dataset | None:
        """The validation split on the disk, without the training split.

        Args:
            size: of the validation split.
            max_windows: fetch only as many files, evenly spaced, as hold about so many windows; 0 = all.
        """
        with self._explained():
            files = list(self._window_files().get(VALIDATION, ()))
            if not files or size.windows == 0:
                return None
            count = len(files) if not max_windows else -(-max_windows * len(files) // size.windows)
            chosen = np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int)
            files = [files[index] for index in chosen]
            if self.folder is None:
                files = [str(self._fetch(f"{WINDOWS}/{Path(file).name}")) for file in files]
            return datasets.load_dataset("parquet", data_files={VALIDATION: files}, split=VALIDATION)

    def _window_files(self) -> Mapping[str, Sequence[str]]:
        if self.folder is not None:
            return _files_of(self.folder, WINDOWS, self.name)
        return self._hub_builder(WINDOWS).config.data_files or {}

    def _whole_folder(self) -> Path:
        """The folder of the windows; of a dataset on the Hub, that of its files, fetched and checked."""
        if self.folder is not None:
            return self.folder
        folder = Path(
            snapshot_download(
                self.name, repo_type="dataset", revision=self.revision, allow_patterns=f"{WINDOWS}/*.parquet"
            )
        )
        files = sorted(folder.glob(f"{WINDOWS}/*.parquet"))
        jobs = (functools.partial(self._fetch, f"{WINDOWS}/{file.name}", folder.name) for file in files)
        for _ in look_ahead(jobs, num_threads=4):
            pass
        return folder

    def _fetch(self, path: str, commit: str | None = None) -> Path:
        """A file of a dataset on the Hub, with the bytes that the Hub states."""
        return fetch(self.name, path, revision=commit or self.revision, repo_type="dataset")

    def _hub_builder(self, config: str, **options: object) -> datasets.DatasetBuilder:
        checked = pa.dataset.ParquetFragmentScanOptions(page_checksum_verification=True)
        return datasets.load_dataset_builder(
            self.name, config, revision=self.revision, fragment_scan_options=checked, **options
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Puts the errors of the libraries that read, which have no common class, into one line."""
        try:
            yield
        except DatasetError:
            raise
        except Exception as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> DatasetError:
        if isinstance(error, CheckpointError):
            return DatasetError(f"dataset '{self.name}': {error.reason}. {error.advice}")
        if isinstance(error, datasets.exceptions.DatasetGenerationError | pa.ArrowInvalid):
            return DatasetError(f"dataset '{self.name}' cannot be read: {one_line(error.__cause__ or error)}")
        if not isinstance(error, LocalEntryNotFoundError):  # also one of the two below, and about the connection
            if isinstance(error, EntryNotFoundError):
                return DatasetError(self._without_settings())
            if isinstance(error, ValueError):  # there is no such config
                return DatasetError(
                    f"dataset '{self.name}' is not one that `hf-wsl tokenize` wrote: {one_line(error)}"
                )
        reason, advice = hub_problem(error, self.revision, kind="dataset")
        return DatasetError(f"dataset '{self.name}' {reason}. {advice}")

    def _without_settings(self) -> str:
        return (
            f"dataset '{self.name}' has no {EXTRACTOR_FILE}, so a model trained on it could not tokenize. "
            "`hf-wsl tokenize` writes one; copy it into the folder"
        )


def _files_of(folder: Path, config: str, name: str) -> dict[str, list[str]]:
    """The Parquet files of a config in a folder by split. Raises DatasetError without files of the training split."""
    files = {split: sorted(map(str, folder.glob(f"{config}/{split}-*.parquet"))) for split in (TRAIN, VALIDATION)}
    if not files[TRAIN]:
        raise DatasetError(
            f"dataset '{name}' is not one that `hf-wsl tokenize` wrote: it has no {config}/{TRAIN}-*.parquet"
        )
    return {split: paths for split, paths in files.items() if paths}


def load_windows(dataset: str, revision: str | None = None) -> datasets.DatasetDict:
    """The splits `train` and `validation` of a tokenized dataset, see `DatasetSource.load`."""
    return DatasetSource(dataset, revision).load()
