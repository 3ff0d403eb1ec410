"""TensorFlow checkpoints: `name.index`, a sorted table of what is stored, and `name.data-00000-of-00001` beside it.

The table is LevelDB's: blocks of keys with shared prefixes, here never compressed. Its values, and the graph of
objects that a checkpoint of TensorFlow 2 keeps, are protocol buffers, of which a few fields are read.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

import torch

from ..errors import CheckpointError, shorten
from ..folders import find_shard
from .axes import STATISTICS, kernel_axes, unknown_axes
from .container import Contents, StoredArray, array_contents, mapped_tensor


MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
MAX_INDEX_BYTES = 1 << 28
# DataType of TensorFlow: those that torch has.
DTYPES = {1: "float32", 2: "float64", 3: "int32", 4: "uint8", 5: "int16", 6: "int8", 8: "complex64", 9: "int64"}
DTYPES |= {10: "bool", 14: "bfloat16", 17: "uint16", 18: "complex128", 19: "float16", 22: "uint32", 23: "uint64"}
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
SLOTS = ("adam_m", "adam_v", "Adam", "Adam_1", "Momentum", "RMSProp", "RMSProp_1", "Adagrad", "LAMB", "LAMB_1")
SLOTS += ("ExponentialMovingAverage", "Ftrl", "Ftrl_1", "AdamWeightDecay", "AdamWeightDecay_1", "vr", "vc")
COUNTERS = ("global_step", "beta1_power", "beta2_power", "save_counter/")
OF_OPTIMIZER = re.compile(r"(.+)/(_?iterations?|iter|_?learning_rate)/\.ATTRIBUTES/")
GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
DAMAGED = "The file is damaged or forged; fetch or write it again"


def tensorflow_contents(path: Path, key: str | None) -> Contents:
    """Contents of a TensorFlow checkpoint, named as TensorFlow lists them; an optimizer's slots are left out.

    Raises:
        CheckpointError: the table is damaged, a data file is missing or too short, or a variable is cut into slices.
    """
    if key is not None:
        raise CheckpointError(path, f"is a TensorFlow checkpoint: it has nothing under key={key!r}", "Leave it out")
    if os.stat(path).st_size > MAX_INDEX_BYTES:
        raise CheckpointError(path, f"is an index above {MAX_INDEX_BYTES:,} bytes", DAMAGED)
    entries = dict(table(path.read_bytes()))
    header = dict(fields(entries.pop(b"")))
    shards = header.get(1, 1)
    records = {name.decode(): dict(fields(value)) for name, value in entries.items()}
    if header.get(2):
        raise CheckpointError(path, "is stored in big-endian order", "Write it again on a usual machine")
    trained = object_names(path, shards, records.pop(GRAPH, None))
    optimizers = [match[1] for name in records if (match := OF_OPTIMIZER.match(name))]
    arrays, roles, ignored, slots = {}, {}, [], 0
    for name, record in records.items():
        if is_slot(name, records, optimizers):
            slots += 1
        elif record.get(1) not in DTYPES:
            ignored.append(f"{shorten(name, 60)}: no array of numbers")
        else:
            arrays[name] = stored_array(path, name, record, shards)
            module, _, leaf = (trained.get(name) or name.removesuffix(VALUE)).partition(":")[0].rpartition("/")
            roles[name] = (module, leaf)
    ignored += [f"{slots} variables of the optimizer"] if slots else []
    axes, unknown = kernel_axes({name: array.shape for name, array in arrays.items()}, roles)
    statistics = {name for name, (_, leaf) in roles.items() if leaf in STATISTICS}
    return array_contents(
        path, arrays, axes, in_state_dict_order=False, constants=statistics, ignored=ignored + unknown_axes(unknown)
    )


def is_slot(name: str, records: Mapping[str, dict], optimizers: Sequence[str]) -> bool:
    """Whether a variable is an optimizer's: a value beside a weight, a step, a learning rate."""
    owner, _, leaf = name.rpartition("/")
    if ".OPTIMIZER_SLOT" in name or (leaf in SLOTS and owner in records) or name.startswith(COUNTERS):
        return True
    return any(name.startswith(f"{root}/") and "/_trainable_variables/" not in name for root in optimizers)


def stored_array(path: Path, name: str, record: dict, shards: int) -> StoredArray:
    """A variable, mapped where it lies in its data file."""
    if 7 in record:
        reason = f"the variable {shorten(name)} is cut into slices"
        raise CheckpointError(path, reason, "Load it with TensorFlow and write it again in one piece")
    shape = tuple(dict(fields(size)).get(1, 0) for number, size in fields(record.get(2, b"")) if number == 2)
    kind = DTYPES[record[1]]
    place, offset, size = data_place(path, record, shards)
    if prod(shape) * getattr(torch, kind).itemsize != size:
        raise CheckpointError(path, f"gives {shorten(name)} of {list(shape)[:8]} {size:,} bytes", DAMAGED)
    return StoredArray(shape, kind, lambda: mapped_tensor(place, offset, shape, kind))


def data_place(path: Path, record: dict, shards: int) -> tuple[Path, int, int]:
    """The data file of a variable, its first byte there and its size in bytes.

    Raises:
        CheckpointError: the data file is missing or too short.
    """
    shard, offset, size = (record.get(number, 0) for number in (3, 4, 5))
    place = find_shard(path, f"{path.name.removesuffix('.index')}.data-{shard:05d}-of-{shards:05d}")
    if offset + size > place.stat().st_size:
        raise CheckpointError(place, f"ends before what {path.name} places in it", DAMAGED)
    return place, offset, size


def object_names(path: Path, shards: int, record: dict | None) -> dict[str, str]:
    """Name in the table -> the variable's own name ("stem/kernel"), from TensorFlow 2's graph of objects."""
    if record is None:
        return {}
    place, offset, size = data_place(path, record, shards)
    with place.open("rb") as stream:
        stream.seek(offset)
        data = stream.read(min(size, MAX_INDEX_BYTES))
    try:
        _, at = varint(data, 0)  # the text's length, its checksum of four bytes, the text
        nodes = [node for number, node in fields(data[at + 4 :]) if number == 1]
        attributes = [dict(fields(part)) for node in nodes for number, part in fields(node) if number == 2]
        return {a[3].decode(): a[2].decode() for a in attributes if 2 in a and 3 in a}
    except (ValueError, IndexError, KeyError, TypeError, AttributeError):
        return {}  # names alone are lost: axes that they would tell stay as they are


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where the next thing begins."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol buffer: (number, value), bytes where it has a length."""
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = varint(data, at)
        else:
            length, at = varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
            value, at = data[at : at + length], at + length
            if at > len(data):
                raise ValueError("a field ends behind its message")
        yield tag >> 3, value


def table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a LevelDB table, in order."""
    if len(data) < 48 or data[-8:] != MAGIC:
        raise ValueError("no table: its end lacks the mark")
    at = len(data) - 48
    for _ in range(2):  # of the meta index: passed over
        _, at = varint(data, at)
    offset, at = varint(data, at)
    size, at = varint(data, at)
    reached = 0
    for _, handle in block(data, offset, size):
        offset, at = varint(handle, 0)
        size, _ = varint(handle, at)
        if offset < reached:
            raise ValueError("its blocks overlap")
        reached = offset + size
        yield from block(data, offset, size)


def block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The entries of one block: each key is the start of the one before it and an end of its own."""
    if offset + size + 5 > len(data) or size < 4:
        raise ValueError("a block lies outside of the file")
    if data[offset + size]:
        raise ValueError("a block is compressed, which TensorFlow never does")
    part = data[offset : offset + size]
    end = size - 4 - 4 * int.from_bytes(part[-4:], "little")
    key, at = b"", 0
    while at < end:
        shared, at = varint(part, at)
        own, at = varint(part, at)
        length, at = varint(part, at)
        key = key[:shared] + part[at : at + own]
        yield key, part[at + own : at + own + length]
        at += own + length
