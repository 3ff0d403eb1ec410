"""The tokens of a Parquet row group, read without their nesting: pages are decompressed, and no further than needed.

Tokens are lists of lists, so Arrow decodes and counts two levels for every single weight, which takes most of the time
of reading. But behind its levels a page holds the weights as they are, one after the other, and `num_tokens` says how
many belong to a window. A column that is not so simple (`TokenPages.of` looks) is left to Arrow.

Source: https://parquet.apache.org/docs/file-format/ and its `parquet.thrift`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


_DATA_PAGE, _PLAIN, _RLE = 0, 0, 3  # PageType and Encoding of parquet.thrift
_CODECS = ("ZSTD", "GZIP")  # that Arrow decompresses piece by piece


class _Page(NamedTuple):
    """A data page: its compressed bytes are `[start, stop)` of the column, and `size` when they are decompressed."""

    start: int
    stop: int
    size: int
    num_values: int


class TokenPages:
    """Tokens of the windows of a row group. One page is open: crops are best asked for window by window.

    Attributes:
        lengths: int64 `[rows]`, tokens of each window.
        width, dtype: d_t, and what weights are stored as.
    """

    def __init__(
        self, column: pa.Buffer, pages: list[_Page], codec: str, lengths: np.ndarray, width: int, dtype: np.dtype
    ) -> None:
        self.lengths, self.width, self.dtype = lengths, width, dtype
        self._column, self._pages, self._codec = column, pages, codec
        self._first_value = np.cumsum([0, *(page.num_values for page in pages)])
        self._first_token = np.cumsum(lengths) - lengths
        self._open: tuple[int, _OpenPage] | None = None

    @classmethod
    def of(
        cls, metadata: pq.FileMetaData, group: int, column: int, content: pa.Buffer, lengths: np.ndarray, width: int
    ) -> TokenPages | None:
        """The tokens of a row group, or None where they are stored in a way that is left to Arrow.

        Args:
            column: number of the weights' column in the file.
            content: the bytes of its chunk.
            lengths: int64 `[rows]`, tokens of each window by `num_tokens`.
            width: d_t.
        """
        kind, chunk = metadata.schema.column(column), metadata.row_group(group).column(column)
        half = kind.physical_type == "FIXED_LEN_BYTE_ARRAY" and kind.length == 2
        nested = kind.max_repetition_level == 2 and kind.max_definition_level > 0
        if not (half or kind.physical_type == "FLOAT") or not nested or chunk.compression not in _CODECS:
            return None
        pages = _list_pages(content)
        if pages is None or sum(page.num_values for page in pages) != int(lengths.sum()) * width:
            return None
        return cls(content, pages, chunk.compression.lower(), lengths, width, np.dtype("f2" if half else "f4"))

    def part(self, row: int, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` of a window, at least one, `[n, d_t]`; a view on its page where one holds them all.

        Raises:
            OSError: a damaged page, or one in which weights are missing.
        """
        first, last = ((int(self._first_token[row]) + token) * self.width for token in (start, stop))
        parts = []
        while first < last:
            number = int(np.searchsorted(self._first_value, first, side="right")) - 1
            begin, end = self._first_value[number : number + 2].tolist()
            parts.append(self._page(number).values(first - begin, min(last, end) - begin))
            first = end
        return (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(-1, self.width)

    def _page(self, number: int) -> _OpenPage:
        if self._open is None or self._open[0] != number:
            page = self._pages[number]
            content = self._column.slice(page.start, page.stop - page.start)
            self._open = (number, _OpenPage(content, page, self._codec, self.dtype))
        return self._open[1]


class _OpenPage:
    """A page, decompressed as far as it was asked for: a crop needs what comes before it, but nothing behind."""

    def __init__(self, content: pa.Buffer, page: _Page, codec: str, dtype: np.dtype) -> None:
        self._stream = pa.CompressedInputStream(pa.BufferReader(content), codec)
        self._content = np.empty(page.size, np.uint8)
        self._done, self._dtype = 0, dtype
        first = 0
        for _ in range(2):  # repetition levels, definition levels, each behind its size in four bytes
            self._decompress(first + 4)
            first += 4 + int.from_bytes(self._content[first : first + 4], "little")
        # Nulls and empty lists have a level but no value.
        if page.size - first != page.num_values * dtype.itemsize:
            raise OSError(f"a page of {page.num_values} weights holds {page.size - first} bytes of them")
        self._first = first

    def values(self, start: int, stop: int) -> np.ndarray:
        """The values `start` to `stop` of the page, a view."""
        begin, end = (self._first + value * self._dtype.itemsize for value in (start, stop))
        self._decompress(end)
        return self._content[begin:end].view(self._dtype)

    def _decompress(self, end: int) -> None:
        while self._done < end:
            count = self._stream.readinto(memoryview(self._content)[self._done : end])
            if count == 0:
                raise OSError("a page ends before its time")
            self._done += count


def _list_pages(content: pa.Buffer) -> list[_Page] | None:
    """The pages of a column chunk; None where one is not a plain data page of version 1, or its header is odd."""
    pages, at = [], 0
    buffer = memoryview(content).cast("B")
    while at < len(buffer):
        try:
            header, start = _read_struct(buffer, at)
            data, stop = header[5], start + header[3]
            encodings = (data[2], data[3], data[4])
        except (KeyError, IndexError):
            return None
        if header[1] != _DATA_PAGE or encodings != (_PLAIN, _RLE, _RLE) or stop > len(buffer):
            return None
        pages.append(_Page(start, stop, header[2], data[1]))
        at = stop
    return pages


def _read_struct(buffer: memoryview, at: int) -> tuple[dict[int, Any], int]:
    """A struct of thrift's compact protocol as {field: value}, and where it ends.

    Raises:
        KeyError: a type that the headers of plain pages do not have.
        IndexError: the struct goes beyond the buffer.
    """
    fields: dict[int, Any] = {}
    field = 0
    while buffer[at] != 0:
        step, kind = divmod(buffer[at], 16)
        at += 1
        if step:
            field += step
        else:
            field, at = _read_integer(buffer, at)
        if kind in (1, 2):  # true, false
            fields[field] = kind == 1
        elif kind == 3:  # a byte
            fields[field], at = buffer[at], at + 1
        elif kind in (4, 5, 6):  # 16, 32, 64 bits
            fields[field], at = _read_integer(buffer, at)
        elif kind == 8:  # binary
            size, at = _read_varint(buffer, at)
            fields[field], at = bytes(buffer[at : at + size]), at + size
        elif kind == 12:  # struct
            fields[field], at = _read_struct(buffer, at)
        else:
            raise KeyError(kind)
    return fields, at + 1


def _read_integer(buffer: memoryview, at: int) -> tuple[int, int]:
    value, at = _read_varint(buffer, at)
    return (value >> 1) ^ -(value & 1), at


def _read_varint(buffer: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = buffer[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
