"""NumPy files: one array (.npy), named arrays (.npz), and the matrix of a zoo, a model a row."""

import csv
import os
import zipfile
from ast import literal_eval
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from ..errors import CheckpointError, shorten
from ..formats import data_offset
from .axes import kernel_axes, unknown_axes
from .container import Contents, StoredArray, array_contents, mapped_tensor, tensor_of, torch_dtype_name


MAX_HEADER_BYTES = 10_000  # as NumPy has it: a longer one may be an attack on the parser of literals
LAYOUT = "layout.csv"  # of the Small CNN Zoo: varname, start_idx, end_idx, shape
DAMAGED = "The file is damaged or forged; fetch or write it again"


@dataclass(frozen=True)
class ArrayHeader:
    """Shape and dtype of an array in NumPy's format, whether its columns follow each other, and its first byte."""

    shape: tuple[int, ...]
    dtype: np.dtype
    by_columns: bool
    offset: int

    @property
    def size(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def torch_name(self) -> str:
        return self.dtype.newbyteorder("=").name

    def arrange(self, tensor: torch.Tensor) -> torch.Tensor:
        """The array, from its entries in the order in which they are stored."""
        tensor = tensor if self.dtype.isnative else tensor_of(tensor.numpy().view(self.dtype))
        return tensor.view(self.shape[::-1]).permute(*range(len(self.shape))[::-1]) if self.by_columns else tensor


def npy_contents(path: Path, key: str | None) -> Contents:
    """Contents of a .npy file: one array, named `array`.

    Beside a `layout.csv` it is a zoo's matrix `[models, weights]`: `key` is the row of one model, whose arrays have
    the names and shapes of the layout (Small CNN Zoo, Unterthiner et al., 2020).

    Raises:
        CheckpointError: the array is of objects, or of a zoo and the row is not given or not there.
    """
    layout = path.parent / LAYOUT
    with path.open("rb") as stream:
        header = read_array_header(path, stream, path.name)
    if len(header.shape) == 2 and layout.is_file():
        return zoo_row(path, header, layout, key)
    if key is not None:
        raise CheckpointError(path, f"holds one array, and nothing under key={key!r}", "Leave the key out")
    return array_contents(path, {"array": mapped_array(path, header)})


def zoo_row(path: Path, header: ArrayHeader, layout: Path, key: str | None) -> Contents:
    """Contents of one row of a zoo's matrix, named and cut as its layout says."""
    models, width = header.shape
    if key is None or not key.isdecimal() or int(key) >= models or header.by_columns:
        reason = f"is a zoo's matrix of {models:,} models, a row each" + " (stored by columns)" * header.by_columns
        advice = f"Name a row as {path.name}#0 to {path.name}#{models - 1}, or pass the folder to read them all"
        raise CheckpointError(path, reason, advice)
    start = int(key) * width * header.dtype.itemsize
    arrays, roles = {}, {}
    for name, begin, stored in read_layout(layout, width):
        arrays[name] = mapped_array(path, replace(header, shape=stored), start + begin * header.dtype.itemsize)
        module, _, leaf = name.partition(":")[0].rpartition("/")
        roles[name] = (module, leaf)
    axes, unknown = kernel_axes({name: array.shape for name, array in arrays.items()}, roles)
    return array_contents(path, arrays, axes, ignored=unknown_axes(unknown))


def read_layout(path: Path, width: int) -> list[tuple[str, int, tuple[int, ...]]]:
    """Name, first column and shape of each array in a row of a zoo's matrix.

    Raises:
        CheckpointError: it is no such table, or does not cover the columns once each.
    """
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = [
                (row["varname"], int(row["start_idx"]), int(row["end_idx"]), literal_eval(row["shape"]))
                for row in csv.DictReader(stream)
            ]
        rows = [(name, start, end, tuple(map(int, np.atleast_1d(shape)))) for name, start, end, shape in rows]
    except (KeyError, TypeError, ValueError, SyntaxError, MemoryError, RecursionError, csv.Error) as error:
        raise CheckpointError(path, f"is no layout of a zoo's matrix ({shorten(error)})", DAMAGED) from error
    reached = 0
    for name, start, end, shape in sorted(rows, key=lambda row: row[1]):
        if start != reached or prod(shape) != end - start or min(shape, default=1) < 0:
            raise CheckpointError(path, f"its columns of {shorten(name)} do not fit the others or its shape", DAMAGED)
        reached = end
    if reached != width or len({row[0] for row in rows}) < len(rows):
        raise CheckpointError(path, f"describes {reached:,} columns, the matrix has {width:,}", DAMAGED)
    return [(name, start, shape) for name, start, _, shape in rows]


def npz_contents(path: Path, key: str | None) -> Contents:
    """Contents of a .npz archive: its arrays by name; kernels by Flax's names are brought to `[out, in, ...]`.

    Raises:
        CheckpointError: a damaged archive, or an array of objects.
    """
    if key is not None:
        raise CheckpointError(path, f"holds arrays by name, and nothing under key={key!r}", "Leave the key out")
    arrays = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as plain:
        for record in archive.infolist():
            name = record.filename.removesuffix(".npy")
            if name in arrays:
                raise CheckpointError(path, f"names the array {shorten(name)} twice", DAMAGED)
            with archive.open(record) as stream:
                header = read_array_header(path, stream, name)
            if record.compress_type == zipfile.ZIP_STORED:
                arrays[name] = mapped_array(path, header, data_offset(path, plain, record))
            else:
                arrays[name] = packed_array(path, record, header)
    roles = {name: tuple(name.rpartition("/")[::2]) for name in arrays}
    axes, unknown = kernel_axes({name: array.shape for name, array in arrays.items()}, roles, flax=True)
    return array_contents(path, arrays, axes, ignored=unknown_axes(unknown))


def read_array_header(path: Path, stream: BinaryIO, name: str) -> ArrayHeader:
    """Reads the header of an array in NumPy's format; nothing of it is unpickled.

    Raises:
        CheckpointError: a damaged header, or entries that are objects (a pickle), records or text.
    """
    try:
        version = np.lib.format.read_magic(stream)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, by_columns, dtype = reader(stream, max_header_size=MAX_HEADER_BYTES)
    except Exception as error:  # NumPy evaluates a literal, which fails in many ways
        raise CheckpointError(path, f"the header of its array {shorten(name)} cannot be read", DAMAGED) from error
    if dtype.hasobject:
        reason = f"its array {shorten(name)} holds Python objects, which are pickled"
        raise CheckpointError(path, reason, "If you trust the file, load it with NumPy and save the arrays of numbers")
    if torch_dtype_name(dtype.newbyteorder("=").name) is None or any(size < 0 for size in shape):
        reason = f"its array {shorten(name)} is of {shorten(dtype)}, which torch does not have"
        raise CheckpointError(path, reason, "Save it in a dtype that torch has, float32 for example")
    return ArrayHeader(shape, dtype, by_columns and len(shape) > 1, stream.tell())


def mapped_array(path: Path, header: ArrayHeader, start: int = 0) -> StoredArray:
    """An array whose entries lie in the file as they are, its header at byte `start`."""
    at = start + header.offset
    if at + header.size > os.stat(path).st_size:
        raise CheckpointError(path, f"ends before its array of {list(header.shape)} does", DAMAGED)

    def read() -> torch.Tensor:
        return header.arrange(mapped_tensor(path, at, header.shape, header.torch_name))

    return StoredArray(header.shape, header.torch_name, read)


def packed_array(path: Path, record: zipfile.ZipInfo, header: ArrayHeader) -> StoredArray:
    """An array of a compressed archive: unpacked when it is read, never more than its shape says."""
    if header.offset + header.size != record.file_size:
        raise CheckpointError(path, f"its array {shorten(record.filename)} does not have the size it claims", DAMAGED)

    def read() -> torch.Tensor:
        with zipfile.ZipFile(path) as archive, archive.open(record) as stream:
            data = stream.read(record.file_size)[header.offset :]
        return header.arrange(tensor_of(np.frombuffer(data, header.dtype.newbyteorder("=")).reshape(header.shape)))

    return StoredArray(header.shape, header.torch_name, read)
