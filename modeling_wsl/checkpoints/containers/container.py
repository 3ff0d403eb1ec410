"""The contents that every kind of file gives, whatever it is."""

import importlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...tokens.manifest import TensorSpec
from ..errors import CheckpointError


@dataclass
class Contents:
    """The contents of files or of an object, before their tensors are put into order.

    Attributes:
        specs: every name, tied ones too, in the order found.
        read: name of a stored tensor -> its data.
        owners: alias -> the name under which `read` has it.
        metadata: `__metadata__` of safetensors files.
        in_state_dict_order: the order found is the state dict's.
        nested: the state dict was found inside a larger checkpoint.
        stored_as: name of a stored tensor -> how the file stores it, where that is not the tensor itself
            ("gptq, 4 bits, groups of 128"). `specs` and `read` have the dequantized tensor.
        entries: name of a tensor that is made when it is read -> a function of the name, a first and an end entry in
            row-major order that makes these entries alone.
        layouts: name of a stored tensor -> the axes with which `permute` gives it the layout that the file has:
            (1, 0) for a file's `[in, out]`. `specs` and `read` have `[out, in, ...]`.
        constants: stored tensors that the architecture computes (causal masks, rotary tables): not weights.
        ignored: what the file holds beside the weights and was not read, one line each.
        close: lets go of mapped files.
    """

    specs: dict[str, TensorSpec]
    read: Callable[[str], torch.Tensor]
    owners: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    in_state_dict_order: bool = True
    nested: bool = False
    stored_as: dict[str, str] = field(default_factory=dict)
    entries: dict[str, Callable[[str, int, int], torch.Tensor]] = field(default_factory=dict)
    layouts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)
    ignored: list[str] = field(default_factory=list)
    close: Callable[[], None] = lambda: None

    @property
    def listed(self) -> list[str]:
        """The names that the file itself lists; aliases in the metadata of a safetensors file are not."""
        return [name for name in self.specs if self.in_state_dict_order or name not in self.owners]


@dataclass(frozen=True)
class StoredArray:
    """An array of a file of another framework.

    Attributes:
        shape, dtype: as the file has them; the dtype by torch's name.
        read: gives it in the file's layout; a view on mapped memory where the format allows.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], torch.Tensor]


def array_contents(
    source: object,
    arrays: Mapping[str, StoredArray],
    axes: Mapping[str, tuple[int, ...]] | None = None,
    **more: Any,
) -> Contents:
    """Contents of named arrays; those in `axes` are brought to `[out, in, ...]` by permuting the file's axes so.

    The array read last is kept: a matrix that is turned would otherwise be turned anew for each of its windows.

    Args:
        more: further attributes of `Contents`.

    Raises:
        CheckpointError: there is no array.
    """
    if not arrays:
        raise CheckpointError(source, "holds no array of numbers", "Pass the file that has the weights")
    axes = {name: order for name, order in (axes or {}).items() if order != tuple(range(len(order)))}
    specs = {}
    for name, array in arrays.items():
        shape = tuple(array.shape[axis] for axis in axes[name]) if name in axes else tuple(array.shape)
        specs[name] = TensorSpec(name, shape, array.dtype)
    last: dict[str, torch.Tensor] = {}

    def read(name: str) -> torch.Tensor:
        if name not in last:
            last.clear()
            tensor = arrays[name].read()
            last[name] = tensor.permute(axes[name]).contiguous() if name in axes else tensor
        return last[name]

    layouts = {name: inverse(order) for name, order in axes.items()}
    return Contents(specs, read, layouts=layouts, close=last.clear, **more)


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes `order`."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def torch_dtype_name(name: str) -> str | None:
    """The name that torch has for a dtype of NumPy or of ml_dtypes: the same, if any; None for parts of a byte."""
    whole = not re.fullmatch("u?int[1-7]", name)
    return name if whole and isinstance(getattr(torch, name, None), torch.dtype) else None


def tensor_of(array: Any) -> torch.Tensor:
    """A tensor of the entries of a NumPy array (of ml_dtypes too, and of either byte order), in memory."""
    array = np.asarray(array)
    dtype = getattr(torch, array.dtype.newbyteorder("=").name)
    array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(array.reshape(-1).view(np.uint8)).view(dtype).reshape(array.shape)


def mapped_tensor(path: Path, offset: int, shape: Sequence[int], dtype: str) -> torch.Tensor:
    """A view on bytes of a file, which is mapped into memory: only the pages that are used are ever read.

    Raises:
        CheckpointError: the file ends before the array does.
    """
    element = getattr(torch, dtype)
    size = prod(shape) * element.itemsize
    if offset + size > os.stat(path).st_size:
        reason = f"ends before an array of {size:,} bytes that it should hold from byte {offset:,} on"
        raise CheckpointError(path, reason, "The file is damaged or cut off; fetch or write it again")
    if not size:
        return torch.empty(tuple(shape), dtype=element)
    data = torch.from_file(str(path), shared=False, size=offset + size, dtype=torch.uint8)[offset:]
    data = data if offset % element.itemsize == 0 else data.clone()
    return data.view(element).reshape(tuple(shape))


def optional_package(source: object, name: str, extra: str) -> Any:
    """Imports an optional package that a format needs.

    Raises:
        CheckpointError: it is not installed; names the pip extra that brings it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        reason = f"needs the package {name}, which is not installed"
        raise CheckpointError(source, reason, f"pip install 'hf-wsl[{extra}]'") from error
