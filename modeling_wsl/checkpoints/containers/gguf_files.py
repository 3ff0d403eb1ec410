"""GGUF files of llama.cpp, by the `gguf` package: mapped into memory, blocks dequantized tensor by tensor."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...tokens.manifest import TensorSpec
from ..errors import CheckpointError, QuantizedError, shorten
from .container import Contents, optional_package


MAX_TEXT = 500  # characters of a fact that is kept
PLAIN = {"F32": torch.float32, "F16": torch.float16, "F64": torch.float64, "BF16": torch.bfloat16}
INTEGERS = {"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}


def gguf_contents(path: Path, key: str | None) -> Contents:
    """Contents of a GGUF file: its names, shapes as torch has them, blocks as float32.

    Raises:
        CheckpointError: it is a part of several, or needs the package; damage ends in errors of many kinds.
        QuantizedError: a tensor has blocks of a kind that the package does not dequantize.
    """
    gguf = optional_package(path, "gguf", "formats")
    if key is not None:
        raise CheckpointError(path, f"is GGUF: it has no nested state dict for key={key!r}", "Leave key= out")
    reader = gguf.GGUFReader(path)
    parts = reader.fields.get("split.count")
    if parts is not None and int(parts.contents()) > 1:
        reason = f"is one of {int(parts.contents())} parts of a model"
        raise CheckpointError(path, reason, "Join them with `llama-gguf-split --merge`")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    specs, stored_as = {}, {}
    for name, tensor in tensors.items():
        kind = tensor.tensor_type.name
        dtype = (PLAIN | INTEGERS).get(kind, torch.float32)
        shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
        if kind not in PLAIN | INTEGERS:
            if not _can_dequantize(gguf, tensor.tensor_type):
                reason = f"tensor {shorten(name)} has blocks of {kind}, which the gguf package does not dequantize"
                raise QuantizedError(path, reason, "Pass the original model, or another quantization of it")
            stored_as[name] = f"gguf {kind}"
        specs[name] = TensorSpec(name, shape, str(dtype).removeprefix("torch."))
    return Contents(
        specs,
        lambda name: _read(gguf, tensors[name], specs[name]),
        metadata=_facts(reader),
        stored_as=stored_as,
    )


def _can_dequantize(gguf: Any, kind: Any) -> bool:
    return kind in getattr(gguf.quants, "_type_traits", {kind: None})


def _read(gguf: Any, tensor: Any, spec: TensorSpec) -> torch.Tensor:
    kind = tensor.tensor_type.name
    if kind in PLAIN | INTEGERS:
        data = np.ascontiguousarray(tensor.data).reshape(-1).view(np.uint8)
        data = data if data.flags.writeable else data.copy()
        return torch.from_numpy(data).view(spec.torch_dtype).reshape(spec.shape)
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).reshape(spec.shape)


def _facts(reader: Any) -> dict[str, str]:
    """The short texts and numbers of the file: architecture, name, license."""
    facts = {}
    for name, field in reader.fields.items():
        if len(field.types) == 1 and not name.startswith("GGUF."):
            facts[name] = str(field.contents())[:MAX_TEXT]
    return facts
