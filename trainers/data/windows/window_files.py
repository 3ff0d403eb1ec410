"""The Parquet files of the training split, in a folder or on the Hub, read row group by row group when needed."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from datasets.table import table_cast
from datasets.utils.file_utils import is_local_path, xopen

from hf_wsl.errors import one_line

from .token_pages import TokenPages
from .window_table import COLUMNS, DatasetError, WindowTable, check_columns


class _Shard(NamedTuple):
    """A file, or one row group of it."""

    file: str
    group: int | None = None


class _RowGroup(NamedTuple):
    """A row group as it lies in its file, from the byte `start` on."""

    at: int  # of its shard among those that were asked for
    shard: int
    first_row: int  # of its rows in the shard
    metadata: pq.FileMetaData
    number: int
    start: int
    content: pa.Buffer

    def as_file(self) -> _FilePart:
        return _FilePart(self.content, self.start)


class WindowFiles:
    """The windows of the training split, to be read as they are used. A shard is a file, or a row group.

    Args:
        files: paths, or addresses on the Hub (`hf://...`), at least one.

    Attributes:
        token_size: d_t, entries per token.

    Raises:
        DatasetError: the first file has not the columns of the config `windows`.
        OSError, pa.ArrowInvalid: it cannot be read.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self._shards = [_Shard(file) for file in files]
        self._footers: dict[str, pq.FileMetaData] = {}
        with _opened(files[0]) as source:
            features = Features.from_arrow_schema(pq.read_schema(source))
        check_columns(list(features), "split 'train'")
        self._schema = Features({name: features[name] for name in COLUMNS}).arrow_schema
        tokens = self._schema.field("tokens").type
        if not (pa.types.is_list(tokens) and pa.types.is_fixed_size_list(tokens.value_type)):
            raise DatasetError(f"split 'train': column 'tokens' is {tokens}; tokens are fixed-size lists")
        self.token_size: int = tokens.value_type.list_size

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def by_row_group(self) -> WindowFiles:
        """The same windows with row groups as shards. Every file is opened once, and its footer is kept.

        Raises:
            DatasetError: a file that cannot be read.
        """
        files = dict.fromkeys(shard.file for shard in self._shards)
        other = object.__new__(WindowFiles)
        other.__dict__ |= self.__dict__ | {"_shards": [], "_footers": {}}
        for number, file in enumerate(files):
            with explained(number), _opened(file) as source:
                other._footers[file] = pq.read_metadata(source)
            other._shards += [_Shard(file, group) for group in range(other._footers[file].num_row_groups)]
        return other

    def first_table(self, shard: int) -> WindowTable | None:
        """The first row group of a shard, or None where it has none; raises like `tables`."""
        for group in self._fetch([shard], 0):
            return self._table(group)
        return None

    def tables(self, shards: Sequence[int], first_row: int = 0) -> Iterator[tuple[int, int, WindowTable]]:
        """The row groups of shards, in their order; from the Hub, each comes while the one before is used.

        Args:
            shards: numbers of shards.
            first_row: row groups of the first of these shards that end before this row are left out.

        Yields:
            which of `shards`, the number of the table's first row in that shard, the table.

        Raises:
            DatasetError: a shard that cannot be read, after the client's own retries, or whose rows contradict
                themselves.
        """
        fetched = self._fetch(shards, first_row)
        if not is_local_path(self._shards[0].file):
            fetched = _one_ahead(fetched)
        for group in fetched:
            yield group.at, group.first_row, self._table(group)

    def _fetch(self, shards: Sequence[int], first_row: int) -> Iterator[_RowGroup]:
        for at, shard in enumerate(shards):
            file, only = self._shards[shard]
            with explained(shard), _opened(file) as source:
                metadata = self._footers.get(file) or pq.read_metadata(source)
                row = 0
                for number in range(metadata.num_row_groups) if only is None else [only]:
                    end = row + metadata.row_group(number).num_rows
                    if end > first_row:
                        start, content = _read_group(source, metadata, number)
                        yield _RowGroup(at, shard, row, metadata, number, start, content)
                    row = end
            first_row = 0

    def _table(self, group: _RowGroup) -> WindowTable:
        with explained(group.shard), pq.ParquetFile(group.as_file(), metadata=group.metadata) as file:
            names = [name for name in COLUMNS if name != "tokens"]
            table = file.read_row_group(group.number, columns=names, use_threads=False)
            pages = self._pages(group, table.column("num_tokens").to_numpy().astype(np.int64))
            if pages is None:
                table = file.read_row_group(group.number, columns=list(COLUMNS), use_threads=False)
            schema = pa.schema([self._schema.field(name) for name in table.column_names])
            table = table_cast(table, schema)
            return WindowTable(table, f"split 'train', shard {group.shard}", group.first_row, pages)

    def _pages(self, group: _RowGroup, lengths: np.ndarray) -> TokenPages | None:
        """What reads the tokens; None where Arrow must."""
        columns = group.metadata.row_group(group.number)
        numbers = [i for i in range(columns.num_columns) if columns.column(i).path_in_schema.startswith("tokens.")]
        if len(numbers) != 1:
            return None
        begin, size = _extent(columns.column(numbers[0]))
        content = group.content.slice(begin - group.start, size)
        return TokenPages.of(group.metadata, group.number, numbers[0], content, lengths, self.token_size)


@contextmanager
def explained(shard: int) -> Iterator[None]:
    """Makes one DatasetError of what the client, Arrow and datasets raise, which has no common class."""
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:
        raise DatasetError(
            f"split 'train', shard {shard}: cannot be read ({type(error).__name__}: {one_line(error)}). Go on with "
            "--resume_from_checkpoint latest once it can"
        ) from error


def _opened(file: str) -> Any:
    """A file: mapped from the disk, or on the Hub, by a client that tries again after errors on the way."""
    return pa.memory_map(file) if is_local_path(file) else xopen(file, "rb")


def _read_group(source: Any, metadata: pq.FileMetaData, number: int) -> tuple[int, pa.Buffer]:
    """Where a row group begins in its file, and its bytes, by one request."""
    group = metadata.row_group(number)
    extents = [_extent(group.column(i)) for i in range(group.num_columns)]
    start, end = min(start for start, _ in extents), max(start + size for start, size in extents)
    source.seek(start)
    if isinstance(source, pa.NativeFile):
        return start, source.read_buffer(end - start)  # a view
    return start, pa.py_buffer(source.read(end - start))


def _extent(column: pq.ColumnChunkMetaData) -> tuple[int, int]:
    """Where a column of a row group begins in its file, and its size in bytes."""
    start = column.data_page_offset if column.dictionary_page_offset is None else column.dictionary_page_offset
    return start, column.total_compressed_size


def _one_ahead(groups: Iterator[_RowGroup]) -> Iterator[_RowGroup]:
    """The same, each fetched while the one before is used."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(next, groups, None)
        while (group := ahead.result()) is not None:
            ahead = pool.submit(next, groups, None)
            yield group


class _FilePart(io.RawIOBase):
    """A file of which only some bytes are there, from `start` on: enough to read one row group."""

    def __init__(self, content: pa.Buffer, start: int) -> None:
        self._content, self._start, self._at = memoryview(content).cast("B"), start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._start + len(self._content)}[whence]
        self._at = origin + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        first = self._at - self._start
        part = self._content[first : first + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)
