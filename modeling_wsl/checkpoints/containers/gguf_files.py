"""GGUF files of llama.cpp, by the `gguf` package: mapped into memory, blocks dequantized some rows at a time."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...tokens.manifest import TensorSpec
from ..errors import CheckpointError, PartOfModelError, QuantizedError, shorten
from ..file_names import SHARD
from ..quantization.packed import Packed, PackedReader
from .container import Contents, optional_package


MAX_TEXT = 500  # characters of a fact that is kept
PLAIN = {"F32": torch.float32, "F16": torch.float16, "F64": torch.float64, "BF16": torch.bfloat16}
INTEGERS = {"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}


def gguf_contents(path: Path, key: str | None) -> Contents:
    """Contents of a GGUF file, or of the parts of a split one: names, shapes as torch has them, blocks as float32.

    Raises:
        CheckpointError: it needs the package; damage ends in errors of many kinds.
        PartOfModelError: it is not the first of the parts, or others are missing.
        QuantizedError: a tensor has blocks of a kind that the package does not dequantize.
    """
    gguf = optional_package(path, "gguf", "formats")
    if key is not None:
        raise CheckpointError(path, f"is GGUF: it has no nested state dict for key={key!r}", "Leave key= out")
    readers = [gguf.GGUFReader(path)]
    readers += [gguf.GGUFReader(part) for part in other_parts(path, readers[0])]
    tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    specs, packed = {}, []
    for name, tensor in tensors.items():
        kind = tensor.tensor_type.name
        shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
        specs[name] = TensorSpec(name, shape, str((PLAIN | INTEGERS).get(kind, torch.float32)).removeprefix("torch."))
        if kind not in PLAIN | INTEGERS:
            if tensor.tensor_type not in getattr(gguf.quants, "_type_traits", {tensor.tensor_type: None}):
                reason = f"tensor {shorten(name)} has blocks of {kind}, which the gguf package does not dequantize"
                raise QuantizedError(path, reason, "Pass the original model, or another quantization of it")
            packed.append(Packed(specs[name], (name,), f"gguf {kind}", partial(_rows, gguf, tensor), shape[-1]))
    reader = PackedReader(packed)

    def read(name: str) -> torch.Tensor:
        if name in reader.weights:
            return reader.read(name)
        data = np.ascontiguousarray(tensors[name].data).reshape(-1).view(np.uint8)
        data = data if data.flags.writeable else data.copy()
        return torch.from_numpy(data).view(specs[name].torch_dtype).reshape(specs[name].shape)

    return Contents(
        specs,
        read,
        metadata=_facts(readers[0]),
        stored_as={weight.spec.name: weight.stored_as for weight in packed},
        entries=dict.fromkeys(reader.weights, reader.entries),
    )


def other_parts(path: Path, reader: Any) -> list[Path]:
    """The other files of a split model, `name-00002-of-00003.gguf` and so on, beside the first."""
    count, number = (int(f.contents()) if (f := reader.fields.get(n)) else 0 for n in ("split.count", "split.no"))
    if count < 2:
        return []
    match = SHARD.fullmatch(path.name)
    reason = f"is part {number + 1} of {count} of a model"
    if number or not match or int(match["rank"]) != 1:
        raise PartOfModelError(path, reason, "Pass the first part (-00001-of-), the others beside it, or their folder")
    parts = [path.with_name(f"{match['stem']}-{n:05d}-of-{count:05d}.gguf") for n in range(2, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise PartOfModelError(path, f"{reason}, and {missing[0]} is not there", "Fetch all parts into one folder")
    return parts


def _rows(gguf: Any, tensor: Any, start: int, stop: int) -> torch.Tensor:
    """Rows of the last dimension, each of whole blocks."""
    data = tensor.data.reshape(-1, tensor.data.shape[-1])[start:stop]
    return torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(data, tensor.tensor_type), dtype=np.float32))


def _facts(reader: Any) -> dict[str, str]:
    """The short texts and numbers of the file: architecture, name, license."""
    facts = {}
    for name, field in reader.fields.items():
        if len(field.types) == 1 and not name.startswith("GGUF."):
            facts[name] = str(field.contents())[:MAX_TEXT]
    return facts
