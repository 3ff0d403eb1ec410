"""The Parquet files of the training split, in a folder or on the Hub, read row group by row group when needed."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from datasets.table import table_cast
from datasets.utils.file_utils import is_local_path, xopen

from hf_wsl.errors import one_line

from .reading import look_ahead
from .window_table import COLUMNS, DatasetError, WindowTable, check_columns


class _Shard(NamedTuple):
    """A file, or one row group of it."""

    file: str
    group: int | None = None

    @property
    def name(self) -> str:
        return f"split 'train', file {PurePosixPath(self.file).name}"


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

    def name(self, shard: int) -> str:
        """The shard's file, for messages."""
        return self._shards[shard].name

    def by_row_group(self) -> WindowFiles:
        """The same windows with row groups as shards. Every file is opened once, and its footer is kept.

        Raises:
            DatasetError: a file that cannot be read.
        """
        other = object.__new__(WindowFiles)
        other.__dict__ |= self.__dict__ | {"_shards": [], "_footers": {}}
        for shard in dict.fromkeys(_Shard(shard.file) for shard in self._shards):
            footer = other._footers[shard.file] = _footer(shard)
            other._shards += [_Shard(shard.file, group) for group in range(footer.num_row_groups)]
        return other

    def first_table(self, shard: int) -> WindowTable | None:
        """The first row group of a shard, or None where it has none; raises like `tables`."""
        return next((table for _, _, table in self.tables([(shard, 0)])), None)

    def tables(
        self, shards: Iterable[tuple[int, int]], num_threads: int = 0
    ) -> Iterator[tuple[int, int, WindowTable]]:
        """The row groups of shards, in their order.

        Args:
            shards: numbers of shards, each with a row: row groups that end before it are left out.
            num_threads: that fetch and decode ahead; from the Hub there is one at least.

        Yields:
            which of `shards`, the number of the table's first row in that shard, the table.

        Raises:
            DatasetError: a shard that cannot be read, after the client's own retries, whose pages are not what was
                written, or whose rows contradict themselves.
        """
        remote = not is_local_path(self._shards[0].file)
        yield from look_ahead(self._jobs(shards), max(num_threads, int(remote)))

    def _jobs(self, shards: Iterable[tuple[int, int]]) -> Iterator[Callable[[], tuple[int, int, WindowTable]]]:
        for at, (number, first_row) in enumerate(shards):
            shard = self._shards[number]
            footer, row = self._footers.get(shard.file) or _footer(shard), 0
            for group in range(footer.num_row_groups) if shard.group is None else [shard.group]:
                end = row + footer.row_group(group).num_rows
                if end > first_row:
                    yield functools.partial(self._read, at, shard, row, footer, group)
                row = end

    def _read(
        self, at: int, shard: _Shard, row: int, footer: pq.FileMetaData, group: int
    ) -> tuple[int, int, WindowTable]:
        with explained(shard.name):
            with _opened(shard.file) as source:
                part = _row_group(source, footer, group)
            with pq.ParquetFile(part, metadata=footer, page_checksum_verification=True) as file:
                table = file.read_row_group(group, columns=list(COLUMNS), use_threads=False)
            schema = pa.schema([self._schema.field(name) for name in table.column_names])
            return at, row, WindowTable(table_cast(table, schema), shard.name, row)


@contextmanager
def explained(shard: str) -> Iterator[None]:
    """Makes one DatasetError of what the client, Arrow and datasets raise, which has no common class."""
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:
        raise DatasetError(
            f"{shard}: cannot be read ({type(error).__name__}: {one_line(error)}). Go on with "
            "--resume_from_checkpoint latest once it can"
        ) from error


def _opened(file: str) -> Any:
    """A file: mapped from the disk, or on the Hub, by a client that tries again after errors on the way."""
    return pa.memory_map(file) if is_local_path(file) else xopen(file, "rb")


def _footer(shard: _Shard) -> pq.FileMetaData:
    with explained(shard.name), _opened(shard.file) as source:
        return pq.read_metadata(source)


def _row_group(source: Any, footer: pq.FileMetaData, number: int) -> _FilePart:
    """The bytes of a row group, by one request, as a file of which only they are there."""
    group = footer.row_group(number)
    extents = [_extent(group.column(i)) for i in range(group.num_columns)]
    start, end = min(start for start, _ in extents), max(start + size for start, size in extents)
    source.seek(start)
    if isinstance(source, pa.NativeFile):
        return _FilePart(source.read_buffer(end - start), start)  # a view
    return _FilePart(pa.py_buffer(source.read(end - start)), start)


def _extent(column: pq.ColumnChunkMetaData) -> tuple[int, int]:
    """Where a column of a row group begins in its file, and its size in bytes."""
    start = column.data_page_offset if column.dictionary_page_offset is None else column.dictionary_page_offset
    return start, column.total_compressed_size


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
