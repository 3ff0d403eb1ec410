"""torch.save files and other pickles of tensors and arrays, read without torch.load: see `pickle_reader`.

Tensors are views on the mapped file; opening one reads its pickle alone.
"""

import zipfile
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, shorten
from ..formats import SAVE_SAFELY, data_offset, refuse_foreign_archive
from .pickle_reader import MAX_BYTES, Build, Global, Inert, PickleError, describe, read_pickle


DAMAGED = "The file is damaged or forged; fetch or write it again"
# Storage classes of torch, typed ones; an untyped storage is bytes.
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "QUInt4x2Storage": torch.quint4x2,
    "QUInt2x4Storage": torch.quint2x4,
    "UntypedStorage": torch.uint8,
}
MAX_DIMENSIONS = 64
HEAD = 1 << 16
LEGACY_HEADER = 3  # pickles before the content: the format's number, its version, the machine
NESTED_LEGACY = 2  # torch.save files in pickles in pickles


class StoredOtherwise(Inert):
    """A tensor that is there, but not as plain entries: quantized, sparse, nested, without data."""


class Array(Inert):
    """A NumPy array, complete once the pickle has set its state."""

    tensor: Tensor | None = None
    is_numbers = False

    def set_state(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 5:
            _, shape, dtype, is_fortran, data = state
            told = dtype.args[0] if isinstance(dtype, DType) else None
            # Texts, objects and dates are no weights.
            self.is_numbers = not (isinstance(told, str) and told[:1] in tuple("OSUVMm"))
            self.tensor = _array(shape, dtype, is_fortran, data)


class DType(Inert):
    """A dtype of NumPy."""

    order: str = "="

    def set_state(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "=", "|"):
            self.order = state[1]


class Storage:
    """Bytes of a file that tensors are views on.

    Attributes:
        dtype: of its entries.
        data: uint8 `[bytes]`.
    """

    def __init__(self, dtype: torch.dtype, data: Tensor):
        self.dtype, self.data = dtype, data


Locate = Callable[[str, torch.dtype, int], Storage]


def load_torch_file(path: Path, kind: str) -> Any:
    """Reads a torch.save file ("torch archive", "torch legacy") or a plain pickle ("pickle").

    Returns:
        plain containers of tensors, numbers, texts, and `Inert` objects in place of all that would need code.

    Raises:
        CheckpointError: damaged, beyond a limit, or its pickle and its data disagree.
    """
    try:
        if kind == "torch archive":
            return _settled(_read_archive(path))
        mapped = _map(path)
        if kind == "pickle" and b"joblib.numpy_pickle" in bytes(mapped[:HEAD].numpy()):
            raise CheckpointError(
                path, "is a file of joblib, with its arrays between the steps of a pickle", SAVE_SAFELY
            )
        read = _read_legacy if kind == "torch legacy" else _read_plain
        return _settled(read(mapped, 0))
    except PickleError as error:
        raise CheckpointError(path, f"cannot be read: {error}", DAMAGED) from error


def _map(path: Path) -> Tensor:
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)


def _read_archive(path: Path) -> Any:
    """The content of a zip archive of torch.save; every storage is a record of its own."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as stream:
            records = archive.infolist()
            refuse_foreign_archive(path, [record.filename for record in records])
            if packed := [r.filename for r in records if r.compress_type != zipfile.ZIP_STORED or r.flag_bits & 1]:
                reason = f"is a torch archive whose records are compressed (the first is {shorten(packed[0])})"
                raise CheckpointError(path, reason, "torch.save stores them plain: load it and save it again")
            places = {r.filename: (data_offset(path, stream, r), r.file_size) for r in records}
    except (zipfile.BadZipFile, NotImplementedError, OverflowError, ValueError, EOFError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = f"is a damaged or cut-off zip archive ({shorten(error)})"
        raise CheckpointError(path, reason, "Fetch or write it again") from error
    name = next(name for name in places if name.endswith("/data.pkl") and name.count("/") == 1)
    root = name.removesuffix("data.pkl")
    mapped = _map(path)

    def record(name: str) -> Tensor:
        offset, size = places[name]
        return mapped[offset : offset + size]

    if f"{root}byteorder" in places and bytes(record(f"{root}byteorder")[:8].numpy()) not in (b"little", b""):
        raise CheckpointError(path, "was written on a machine of another byte order", "Write it again on this one")

    def locate(key: str, dtype: torch.dtype, entries: int) -> Storage:
        if f"{root}data/{key}" not in places:
            raise PickleError(f"it lacks the record {shorten(key, 40)} of a tensor")
        data = record(f"{root}data/{key}")
        if len(data) != entries * dtype.itemsize:
            raise PickleError("its pickle and its records disagree about the size of a tensor")
        return Storage(dtype, data)

    offset, size = places[name]
    if size > MAX_BYTES:
        raise PickleError(f"its pickle has {size:,} bytes, more than {MAX_BYTES:,}")
    return read_pickle(mapped[offset : offset + size].numpy().data, **_actions(locate))[0]


def _read_legacy(mapped: Tensor, depth: int) -> Any:
    """The content of a file of torch before 1.6: pickles one after the other, then the storages.

    The content's pickle is read twice, for where the storages lie stands behind it.
    """
    data = mapped.numpy().data
    at, header = 0, []
    for _ in range(LEGACY_HEADER):
        value, at = read_pickle(data, start=at)
        header.append(value)
    if isinstance(header[2], dict) and header[2].get("little_endian") is False:
        raise PickleError("it was written on a machine of another byte order")
    kinds: dict[str, tuple[torch.dtype, int]] = {}

    def note(key: str, dtype: torch.dtype, entries: int) -> Storage:
        if kinds.setdefault(key, (dtype, entries)) != (dtype, entries):
            raise PickleError("its pickle gives one storage two sizes")
        return Storage(dtype, torch.empty(0, dtype=torch.uint8))

    _, after = read_pickle(data, start=at, **_actions(note, depth, is_trial=True))
    keys, end = read_pickle(data, start=after)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise PickleError("it lacks the list of its storages")
    places: dict[str, Tensor] = {}
    for key in keys:
        if key not in kinds:
            raise PickleError("it lists a storage that no tensor has")
        dtype, entries = kinds[key]
        size = entries * dtype.itemsize
        count = int.from_bytes(bytes(data[end : end + 8]), "little")
        if end + 8 + size > len(data):
            raise PickleError("it ends inside of a storage")
        if count not in (entries, size):
            raise PickleError("its pickle and its records disagree about the size of a tensor")
        places[key] = mapped[end + 8 : end + 8 + size]
        end += 8 + size

    def locate(key: str, dtype: torch.dtype, entries: int) -> Storage:
        if key not in places:
            raise PickleError("it lacks the storage of a tensor")
        return Storage(dtype, places[key])

    return read_pickle(data, start=at, **_actions(locate, depth))[0]


def _read_plain(mapped: Tensor, depth: int) -> Any:
    """The content of a pickle that has its tensors and arrays within itself."""

    def locate(key: str, dtype: torch.dtype, entries: int) -> Storage:
        raise PickleError("it refers to a storage, which it does not hold")

    return read_pickle(mapped.numpy().data, **_actions(locate, depth))[0]


def _actions(locate: Locate, depth: int = 0, is_trial: bool = False) -> dict[str, Any]:
    """The functions that a pickle may call, and the meaning of its persistent ids.

    Args:
        locate: gives the storage of a key, of a dtype and a number of entries.
        depth: of this pickle within others.
        is_trial: storages have no data yet.
    """
    views: dict[tuple[int, torch.dtype], Tensor] = {}

    def persistent(identity: Any) -> Any:
        if not (isinstance(identity, tuple) and len(identity) >= 5 and identity[0] == "storage"):
            return Inert("persistent id")
        if len(identity) > 5 and identity[5] is not None:
            raise PickleError("it refers to a part of a storage, as torch did before 0.4")
        _, kind, key, _, entries = identity[:5]
        dtype = _storage_dtype(kind)
        if dtype is None or not isinstance(key, str) or not _is_count(entries):
            raise PickleError(f"it refers to a storage in an unknown way ({describe(kind)})")
        return locate(key, dtype, entries)

    def rebuild(
        storage: Any, offset: Any, size: Any, stride: Any, *more: Any, dtype: torch.dtype | None = None
    ) -> Tensor | Inert:
        if isinstance(storage, StoredOtherwise):
            return storage
        if not isinstance(storage, Storage):
            return StoredOtherwise(describe(storage))
        return _view(storage, dtype or storage.dtype, offset, size, stride, views, is_trial)

    def rebuild_v3(
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        grad: Any = None,
        hooks: Any = None,
        dtype: Any = None,
        *_: Any,
    ) -> Tensor | Inert:
        kind = _torch_dtype(dtype)
        if kind is None:
            return StoredOtherwise(describe(dtype))
        return rebuild(storage, offset, size, stride, dtype=kind)

    def first(value: Any = None, *_: Any) -> Any:
        return value

    def rebuild_type(function: Any, kind: Any, args: Any, state: Any = None, *_: Any) -> Any:
        """A tensor's subclass by the way its tensor is rebuilt, where that is one of these ways."""
        if isinstance(function, Global) and function.name in functions and isinstance(args, tuple):
            made = functions[function.name](*args)
            if isinstance(made, StoredOtherwise):
                made.set_state(state)  # of a DTensor: this rank's part, and how the tensor was cut
            return made
        return StoredOtherwise(describe(kind).removeprefix("the name "), (args,))

    def load_bytes(data: Any, *_: Any) -> Any:
        """A torch.save file within a pickle: that of a storage, as plain pickle writes tensors."""
        if not isinstance(data, bytes) or depth >= NESTED_LEGACY:
            return Inert("torch.storage._load_from_bytes")
        return _read_legacy(torch.frombuffer(bytearray(data), dtype=torch.uint8), depth + 1)

    def otherwise(kind: str) -> Build:
        return lambda *args: StoredOtherwise(kind, args)

    functions: dict[str, Build] = {
        "torch._utils._rebuild_tensor": rebuild,
        "torch._utils._rebuild_tensor_v2": rebuild,
        "torch._utils._rebuild_tensor_v3": rebuild_v3,
        "torch._utils._rebuild_parameter": first,
        "torch._utils._rebuild_parameter_with_state": first,
        "torch._utils._rebuild_device_tensor_from_numpy": first,
        "torch._utils._rebuild_device_tensor_from_cpu_tensor": first,
        "torch._utils._rebuild_xla_tensor": first,
        "torch._tensor._rebuild_from_type": lambda function, kind, args, *_: rebuild_type(function, kind, args),
        "torch._tensor._rebuild_from_type_v2": rebuild_type,
        "torch._utils._rebuild_qtensor": _quantized,
        "torch._utils._rebuild_sparse_tensor": otherwise("sparse"),
        "torch._utils._rebuild_sparse_csr_tensor": otherwise("sparse"),
        "torch._utils._rebuild_nested_tensor": otherwise("nested"),
        "torch._utils._rebuild_meta_tensor_no_storage": otherwise("a meta tensor, without data"),
        "torch._utils._rebuild_wrapper_subclass": lambda kind=None, *args: StoredOtherwise(
            describe(kind).removeprefix("the name "), args
        ),
        "torch.storage._load_from_bytes": load_bytes,
        "torch.storage.TypedStorage": first,
        "torch.Size": lambda size=(), *_: tuple(size) if isinstance(size, (list, tuple)) else (),
        "torch.device": lambda *_: "device",
        "torch.serialization._get_layout": first,
        "torch.nn.parameter.Parameter": first,
        "torch.nn.parameter.Buffer": first,
        "numpy.dtype": lambda name="", *_: DType("numpy.dtype", (name,)),
        "numpy.ndarray": lambda *args: Array("numpy.ndarray", args),
    }
    for core in ("numpy.core", "numpy._core"):
        functions[f"{core}.multiarray._reconstruct"] = lambda *args: Array("numpy.ndarray", args)
        functions[f"{core}.multiarray.scalar"] = _scalar
        functions[f"{core}.numeric._frombuffer"] = _from_buffer
    return {"functions": functions, "persistent": persistent}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _storage_dtype(kind: Any) -> torch.dtype | None:
    name = kind.name if isinstance(kind, Global) else ""
    module, _, leaf = name.rpartition(".")
    return STORAGES.get(leaf) if module in ("torch", "torch.storage", "torch.cuda") else None


def _torch_dtype(value: Any) -> torch.dtype | None:
    name = value.name.removeprefix("torch.") if isinstance(value, Global) else ""
    dtype = getattr(torch, name, None) if name.isidentifier() else None
    return dtype if isinstance(dtype, torch.dtype) else None


def _view(
    storage: Storage,
    dtype: torch.dtype,
    offset: Any,
    size: Any,
    stride: Any,
    views: dict[tuple[int, torch.dtype], Tensor],
    is_trial: bool,
) -> Tensor | Inert:
    """A tensor on a storage, checked to lie within it."""
    sizes = [tuple(value) if isinstance(value, (list, tuple)) else None for value in (size, stride)]
    is_known = None not in sizes and len(sizes[0]) == len(sizes[1]) <= MAX_DIMENSIONS and _is_count(offset)
    if not is_known or not all(_is_count(number) for numbers in sizes for number in numbers):
        raise PickleError("it gives a tensor a shape, strides or an offset that are no sizes")
    size, stride = sizes
    if dtype in (torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4):
        return StoredOtherwise(str(dtype).removeprefix("torch."))
    if is_trial:
        return torch.empty(0)
    key = (storage.data.data_ptr(), dtype)
    if key not in views:
        data = storage.data[: len(storage.data) // dtype.itemsize * dtype.itemsize]
        if data.storage_offset() % dtype.itemsize:
            data = data.clone()  # records of other writers than torch may lie anywhere
        views[key] = data.view(dtype)
    entries = views[key]
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if prod(size) else 0
    if prod(size) and last >= len(entries):
        raise PickleError(f"a tensor of shape {size} lies outside of its storage of {len(entries):,} entries")
    return (
        entries.as_strided(size, stride, entries.storage_offset() + offset) if prod(size) else entries.new_empty(size)
    )


def _quantized(storage: Any = None, *more: Any) -> StoredOtherwise:
    kind = storage.dtype if isinstance(storage, Storage) else "quantized"
    return StoredOtherwise(f"{str(kind).removeprefix('torch.')} of torch.ao.quantization", more)


def _numpy_dtype(dtype: Any) -> np.dtype | None:
    name = dtype.args[0] if isinstance(dtype, DType) and isinstance(dtype.args[0], str) else ""
    if len(name) > 8 or not name[:1].isalpha() or name[:1] in "OVSUMm":
        return None
    try:
        known = np.dtype(name)
    except TypeError:
        return None
    return known.newbyteorder(dtype.order) if known.kind in "biufc" else None


def _array(shape: Any, dtype: Any, is_fortran: Any, data: Any) -> Tensor | None:
    """The tensor of an array's bytes; None where torch has no such numbers or the sizes disagree."""
    kind = _numpy_dtype(dtype)
    data = data.encode("latin-1", "replace") if isinstance(data, str) else data
    is_shape = isinstance(shape, tuple) and len(shape) <= MAX_DIMENSIONS and all(map(_is_count, shape))
    named = dtype.args[0].name if isinstance(dtype, DType) and isinstance(dtype.args[0], Global) else ""
    if named.startswith("ml_dtypes."):  # bfloat16 and float8 of JAX
        kind = _torch_dtype(Global(named.removeprefix("ml_dtypes.")))
    if kind is None or not is_shape or not isinstance(data, bytes) or prod(shape) * kind.itemsize != len(data):
        return None
    if isinstance(kind, torch.dtype):
        values = torch.frombuffer(bytearray(data), dtype=kind) if data else torch.empty(0, dtype=kind)
        return (
            values.reshape(shape) if not is_fortran else values.reshape(shape[::-1]).permute(*range(len(shape))[::-1])
        )
    native = kind.newbyteorder("=")
    if not isinstance(getattr(torch, native.name, None), torch.dtype):
        return None
    values = np.frombuffer(data, kind).astype(native)
    return torch.from_numpy(values.reshape(shape, order="F" if is_fortran else "C").copy(order="C"))


def _from_buffer(data: Any = None, dtype: Any = None, shape: Any = None, order: Any = "C", *_: Any) -> Array:
    array = Array("numpy.ndarray")
    array.tensor = _array(shape, dtype, order == "F", data)
    return array


def _scalar(dtype: Any = None, data: Any = None, *_: Any) -> Any:
    value = _array((), dtype, False, data)
    return Inert("numpy scalar") if value is None else value.item()


def _settled(content: Any) -> Any:
    """The content with complete arrays as tensors, in mappings and lists of any depth.

    A quantized tensor of torchao is replaced by its parts, under the names that they have in its safetensors files.
    """
    seen: set[int] = set()
    stack = [content]
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        places: Iterator[tuple[Any, Any]] = iter(())
        if isinstance(value, dict):
            if any(map(_of_torchao, value.values())):
                entries = [entry for key, held in value.items() for entry in _parts_of(key, held)]
                value.clear()
                value.update(entries)
            places = iter(value.items())  # values are replaced, keys stay
        elif isinstance(value, list):
            places = enumerate(value)
        elif isinstance(value, tuple):
            stack.extend(value)
        elif isinstance(value, Inert):
            stack.extend([value.args, value.state, value.pairs, value.entries])
        for key, held in places:
            if isinstance(held, Array) and held.tensor is not None:
                value[key] = held.tensor
            elif isinstance(held, (dict, list, tuple, Inert)):
                stack.append(held)
    return content.tensor if isinstance(content, Array) and content.tensor is not None else content


def _of_torchao(value: Any) -> bool:
    return isinstance(value, StoredOtherwise) and isinstance(value.state, dict) and "qdata" in value.state


def _parts_of(key: Any, value: Any) -> list[tuple[Any, Any]]:
    """Entries `fc._weight_qdata`, `fc._weight_scale` ... of torchao's tensor at `fc.weight`; else the entry itself."""
    if not isinstance(key, str) or not _of_torchao(value):
        return [(key, value)]
    module, dot, leaf = key.rpartition(".")
    return [(f"{module}{dot}_{leaf}_{part}", held) for part, held in value.state.items() if isinstance(held, Tensor)]
