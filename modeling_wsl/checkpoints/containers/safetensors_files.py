"""safetensors files: a strict reading of the header, then lazy tensors on the memory-mapped file."""

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ...tokens.manifest import TensorSpec
from ..errors import MAX_JSON_BYTES, CheckpointError, parse_json, shorten


# Bits of one element, and torch's name; no name: the format knows the type, torch does not. Two F4 make one element
# of torch's packed type, so its last dimension is half of what the header says, as the safetensors library has it.
DTYPES: dict[str, tuple[int, str | None]] = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "U16": (16, "uint16"),
    "I16": (16, "int16"),
    "U32": (32, "uint32"),
    "I32": (32, "int32"),
    "U64": (64, "uint64"),
    "I64": (64, "int64"),
    "F4": (4, "float4_e2m1fn_x2"),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "F32": (32, "float32"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
}
LENGTH_BYTES = 8  # of the header's own length, at the start of every file
DAMAGED = "The file is damaged, cut off or forged; fetch or write it again"


@dataclass(frozen=True)
class SafetensorsHeader:
    """The header of a file: the tensors in its own order, and its `__metadata__`."""

    tensors: dict[str, TensorSpec]
    metadata: dict[str, str]


def read_header(path: Path) -> SafetensorsHeader:
    """Reads and checks the header of a safetensors file; no weight is read.

    Raises:
        CheckpointError: see `header_length` and `parse_header`.
    """
    size = os.stat(path).st_size
    with path.open("rb") as stream:
        length = header_length(path, stream.read(LENGTH_BYTES), size)
        return parse_header(path, stream.read(length), size)


def header_length(source: object, first: bytes, size: int) -> int:
    """Bytes of the header that follows the first eight bytes of a file of `size` bytes.

    Raises:
        CheckpointError: the header is longer than the file, or than the safetensors library reads.
    """
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if size < LENGTH_BYTES or length > size - LENGTH_BYTES:
        raise CheckpointError(source, f"its header is {length:,} bytes long, the whole file {size:,}", DAMAGED)
    if length > MAX_JSON_BYTES:
        raise CheckpointError(source, f"its header is {length:,} bytes long", f"At most {MAX_JSON_BYTES:,} are read")
    return length


def parse_header(source: object, data: bytes, size: int) -> SafetensorsHeader:
    """Checks the header of a safetensors file of `size` bytes, wherever its bytes come from.

    Raises:
        CheckpointError: the header is not JSON, names a tensor twice; a dtype is unknown, a shape does not fill its
            byte range; ranges overlap, leave gaps or end elsewhere than the file.
    """
    if data[:1] != b"{":
        raise CheckpointError(source, "its header does not start with '{', so it is no safetensors file", DAMAGED)
    header = parse_json(source, data, "its header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(source, "the __metadata__ of its header is not a mapping of strings", DAMAGED)
    tensors, ranges = {}, []
    for name, entry in header.items():
        tensors[name], begin, end = read_entry(source, name, entry)
        ranges.append((begin, end, name))
    expected = 0
    for begin, end, name in sorted(ranges):
        if begin != expected:
            relation = "overlaps the tensor before it" if begin < expected else "leaves bytes out before it"
            reason = f"the byte range [{begin:,}, {end:,}) of tensor {shorten(name)} {relation}"
            raise CheckpointError(source, reason, DAMAGED)
        expected = end
    if LENGTH_BYTES + len(data) + expected != size:
        there = size - LENGTH_BYTES - len(data)
        raise CheckpointError(source, f"its tensors take {expected:,} bytes, {there:,} are there", DAMAGED)
    return SafetensorsHeader(tensors, metadata)


def read_entry(source: object, name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    """Checks one tensor's entry of the header; returns its spec, first byte and end."""

    def is_sizes(value: Any) -> bool:
        # torch has at most 64 dimensions
        return isinstance(value, list) and len(value) <= 64 and all(type(n) is int and 0 <= n < 1 << 63 for n in value)

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        reason = f"the entry of tensor {shorten(name)} lacks dtype, shape or data_offsets"
        raise CheckpointError(source, reason, DAMAGED)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(source, f"tensor {shorten(name)} has the unknown dtype {shorten(dtype)}", DAMAGED)
    if not is_sizes(shape) or not is_sizes(offsets) or len(offsets) != 2:
        reason = f"tensor {shorten(name)} has the shape {shorten(shape)} and the byte range {shorten(offsets)}"
        raise CheckpointError(source, reason, DAMAGED)
    bits, torch_name = DTYPES[dtype]
    begin, end = offsets
    if prod(shape) * bits != (end - begin) * 8:
        reason = (
            f"tensor {shorten(name)} of {dtype} {shape} needs {prod(shape) * bits // 8:,} bytes, not {end - begin:,}"
        )
        raise CheckpointError(source, reason, DAMAGED)
    if torch_name is None:
        advice = "Convert it to a dtype that torch has, float16 for example"
        raise CheckpointError(source, f"tensor {shorten(name)} has the dtype {dtype}, which torch lacks", advice)
    if dtype == "F4" and (not shape or shape[-1] % 2):
        reason = f"tensor {shorten(name)} of F4 {shape} does not fill whole bytes along its last dimension"
        raise CheckpointError(source, reason, DAMAGED)
    shape = [*shape[:-1], shape[-1] // 2] if dtype == "F4" else shape
    return TensorSpec(name, tuple(shape), torch_name), begin, end


class SafetensorsFile:
    """Tensors of one file, mapped into memory on first use."""

    def __init__(self, path: Path):
        self.path = path
        self.header = read_header(path)
        self._mapped: Any = None

    def read(self, name: str) -> torch.Tensor:
        """A view on the mapped file: only the pages of the entries that are used are ever read.

        Raises:
            CheckpointError: the file changed since it was opened, or the safetensors library refuses it.
        """
        try:
            if self._mapped is None:
                self._mapped = safe_open(self.path, framework="pt")
            tensor = self._mapped.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(self.path, f"cannot be read ({shorten(error)})", DAMAGED) from error
        if TensorSpec.of(name, tensor) != self.header.tensors[name]:
            raise CheckpointError(self.path, "changed while it was open", "Open it again")
        return tensor

    def close(self) -> None:
        """Lets go of the mapping; tensors that were read keep theirs."""
        self._mapped = None
