"""Flax checkpoints in MessagePack: nested mappings whose leaves are arrays of an extension type.

Opening reads the file once, one array at a time, and notes where the entries of each lie; reading maps them.
"""

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, shorten
from .axes import kernel_axes, unknown_axes
from .container import Contents, StoredArray, array_contents, mapped_tensor, optional_package, torch_dtype_name


NDARRAY, SCALAR = 1, 3  # extension types of flax.serialization
CHUNKED = "__msgpack_chunked_array__"  # above 1 GiB: a mapping of a shape and flat chunks
MAX_DEPTH, MAX_DIMENSIONS, MAX_LEAVES = 64, 64, 1_000_000
NOT_WEIGHTS = ("opt_state", "optimizer", "tx", "ema_opt_state")
DAMAGED = "The file is damaged or forged; fetch or write it again"


@dataclass(frozen=True)
class Entries:
    """Where the entries of an array (or of each of its chunks) lie in the file."""

    shape: tuple[int, ...]
    dtype: str
    places: tuple[tuple[int, int], ...]  # (offset, number of entries)

    def read(self, path: Path) -> torch.Tensor:
        parts = [mapped_tensor(path, offset, (count,), self.dtype) for offset, count in self.places]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(self.shape)


def msgpack_contents(path: Path, key: str | None) -> Contents:
    """Contents of a Flax checkpoint; names are keys joined by slashes.

    Raises:
        CheckpointError: msgpack is missing, the file is damaged or nested too deeply, or holds no array.
    """
    msgpack = optional_package(path, "msgpack", "formats")
    top: dict[str, Any] = {}
    ignored: list[str] = []
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        limit = len(data)
        unpacker = msgpack.Unpacker(stream, max_buffer_size=max(limit, 1 << 20), max_ext_len=limit, raw=False)
        for names, value in leaves(msgpack, unpacker, data, ()):
            top[names] = value
            if len(top) > MAX_LEAVES:
                raise ValueError(f"more than {MAX_LEAVES:,} entries")
    arrays: dict[str, Entries] = {}
    chunked = {names[:-1] for names in top if names[-1:] == (CHUNKED,)}
    training = {names[0] for names in top if names and names[0] in NOT_WEIGHTS}
    training = training if any(names and names[0] not in training for names in top) else set()
    for names, value in top.items():
        if names[:1] and names[0] in training:
            continue
        if any(names[:depth] in chunked for depth in range(len(names))):
            continue
        if isinstance(value, Entries):
            arrays["/".join(names)] = value
        elif not isinstance(value, (int, float, str, bool, type(None))):
            ignored.append(f"{shorten('/'.join(names), 60)}: {type(value).__name__}")
    for names in chunked:
        arrays["/".join(names)] = joined(path, names, top)
    ignored += [f"{name}: state of training" for name in sorted(training)]
    if key is not None:
        arrays = {name.removeprefix(f"{key}/"): value for name, value in arrays.items() if name.startswith(f"{key}/")}
    roles = {name: tuple(name.rpartition("/")[::2]) for name in arrays}
    axes, unknown = kernel_axes({name: entries.shape for name, entries in arrays.items()}, roles, flax=True)
    return array_contents(
        path,
        {name: StoredArray(e.shape, e.dtype, lambda e=e: e.read(path)) for name, e in arrays.items()},
        axes,
        in_state_dict_order=False,
        constants={name for name in arrays if "batch_stats" in name.split("/")},
        ignored=ignored + unknown_axes(unknown),
    )


def leaves(msgpack: Any, unpacker: Any, data: mmap.mmap, names: tuple[str, ...]) -> Iterator[tuple[tuple, Any]]:
    """Every leaf below the value that comes next, with its keys; arrays as where their entries lie."""
    if len(names) > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    first = data[unpacker.tell()]
    if 0x80 <= first <= 0x8F or first in (0xDE, 0xDF):
        for _ in range(unpacker.read_map_header()):
            name = unpacker.unpack()
            if not isinstance(name, (str, int)):
                raise ValueError(f"a key is {type(name).__name__}, not text")
            yield from leaves(msgpack, unpacker, data, (*names, str(name)))
    elif 0x90 <= first <= 0x9F or first in (0xDC, 0xDD):
        for index in range(unpacker.read_array_header()):
            yield from leaves(msgpack, unpacker, data, (*names, str(index)))
    else:
        value = unpacker.unpack()
        if isinstance(value, msgpack.ExtType) and value.code in (NDARRAY, SCALAR):
            value = entries_of(msgpack, value.data, unpacker.tell())
        yield names, value


def entries_of(msgpack: Any, packed: bytes, end: int) -> Entries:
    """Where the entries of an array lie whose extension data ends at byte `end`: (shape, dtype, bytes), packed."""
    shape, dtype, entries = msgpack.unpackb(packed, raw=True, max_bin_len=len(packed))
    name = torch_dtype_name(dtype.decode())
    shape = tuple(shape)
    if name is None or len(shape) > MAX_DIMENSIONS or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"an array of {dtype[:40]!r} and shape {shape[:8]}")
    if prod(shape) * getattr(torch, name).itemsize != len(entries):
        raise ValueError(f"an array of {name} {list(shape)} has {len(entries):,} bytes")
    return Entries(shape, name, ((end - len(entries), prod(shape)),))


def joined(path: Path, names: tuple[str, ...], top: Mapping[tuple, Any]) -> Entries:
    """An array above 1 GiB, from its chunks."""
    sizes, chunks = [], []
    while isinstance(size := top.get((*names, "shape", str(len(sizes)))), int) and size >= 0:
        sizes.append(size)
    while isinstance(chunk := top.get((*names, "chunks", str(len(chunks)))), Entries):
        chunks.append(chunk)
    places = tuple(place for chunk in chunks for place in chunk.places)
    if len({chunk.dtype for chunk in chunks}) != 1 or sum(count for _, count in places) != prod(sizes):
        raise CheckpointError(path, f"the chunks of {shorten('/'.join(names))} do not make up its shape", DAMAGED)
    return Entries(tuple(sizes), chunks[0].dtype, places)
