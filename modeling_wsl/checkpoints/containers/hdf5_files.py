"""Keras files: HDF5 of Keras 1 to 3 (a model, or weights alone), and the .keras archive around one.

Names are the paths in the file. Links to other places and other files, virtual and external data are refused; layers'
code (a Lambda's) lies in the config, of which nothing is read here.
"""

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO, RawIOBase
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, shorten
from ..formats import data_offset
from .axes import STATISTICS, kernel_axes, unknown_axes
from .container import (
    Contents,
    StoredArray,
    array_contents,
    mapped_tensor,
    optional_package,
    tensor_of,
    torch_dtype_name,
)


WEIGHTS = "model.weights.h5"  # in a .keras archive
OWN_FILTERS = (1, 2, 3, 32000)  # gzip, shuffle, fletcher32, lzf: h5py has them; others load a plugin
MAX_DEPTH, MAX_GROUPS = 64, 100_000
MAX_EXPANSION, MAX_EXPANDED_BYTES = 1100, 1 << 26  # gzip packs 1030 to 1 at best
NOT_WEIGHTS = ("optimizer", "optimizer_weights", "metrics", "_metrics", "loss")
DAMAGED = "The file is damaged or forged; fetch or write it again"
# Variables by number, as Keras 3 stores them, of layers whose path tells their class.
VARIABLES = {
    "separable_conv": ("depthwise_kernel", "pointwise_kernel", "bias"),
    "cell": ("kernel", "recurrent_kernel", "bias"),
    "embedding": ("embeddings",),
    "layer_normalization": ("gamma", "beta"),
    "dense": ("kernel", "bias"),
    "conv": ("kernel", "bias"),
}


def hdf5_contents(path: Path, key: str | None) -> Contents:
    """Contents of a Keras model or of weights alone in HDF5.

    Raises:
        CheckpointError: h5py is missing, the file is damaged, or links to data elsewhere.
    """
    refuse_key(path, key)
    return read_hdf5(path, lambda: path, 0)


def keras_contents(path: Path, key: str | None) -> Contents:
    """Contents of a .keras archive: the weights in it; a stored file is mapped, a compressed one read into memory.

    Raises:
        CheckpointError: as `hdf5_contents`.
    """
    refuse_key(path, key)
    with zipfile.ZipFile(path) as archive, path.open("rb") as stream:
        record = next(r for r in archive.infolist() if r.filename == WEIGHTS)
        stored = record.compress_type == zipfile.ZIP_STORED and record.file_size == record.compress_size
        offset = data_offset(path, stream, record) if stored else 0
        if not stored and record.file_size > max(MAX_EXPANDED_BYTES, 50 * record.compress_size):
            reason = f"its {WEIGHTS} claims {record.file_size:,} bytes, packed into {record.compress_size:,}"
            raise CheckpointError(path, reason, "Save the model again")
        data = None if stored else archive.read(record)
    if stored:
        contents = read_hdf5(path, lambda: Section(path, offset, record.file_size), offset)
    else:
        contents = read_hdf5(path, lambda: BytesIO(data), None)
    contents.ignored.append("config.json: the architecture, and code of Lambda layers if there is any")
    return contents


def refuse_key(path: Path, key: str | None) -> None:
    """Refuses a key: a Keras file holds one model.

    Raises:
        CheckpointError: there is one.
    """
    if key is not None:
        raise CheckpointError(path, f"is a Keras file: it has nothing under key={key!r}", "Leave the key out")


class Section(RawIOBase):
    """A part of a file, read as a file of its own."""

    def __init__(self, path: Path, start: int, size: int):
        self._stream, self._start, self._size, self._at = path.open("rb"), start, size, 0

    def readinto(self, buffer: Any) -> int:
        self._stream.seek(self._start + self._at)
        view = memoryview(buffer).cast("B")[: max(self._size - self._at, 0)]
        count = self._stream.readinto(view)
        self._at += count
        return count

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._stream.close()
        super().close()


def read_hdf5(path: Path, opened: Callable[[], Any], base: int | None) -> Contents:
    """Contents of an HDF5 file.

    Args:
        path: for messages, and mapped where `base` is given.
        opened: gives what h5py opens: a path, or a file-like object.
        base: where in the file at `path` the HDF5 file begins; None: it is not stored there as it is.
    """
    h5py = optional_package(path, "h5py", "formats")
    with h5py.File(opened(), "r") as file:
        root = file["model_weights"] if isinstance(file.get("model_weights"), h5py.Group) else file
        datasets = dict(walk(h5py, path, root, "", set()))
        ordered = listed_names(root)
        known = [name for name in ordered if name in datasets]
        in_order = bool(known) and len(known) == len(datasets)
        datasets = {name: datasets[name] for name in (*known, *datasets)}
        ignored = [f"{name}: state of training" for name in file if name in NOT_WEIGHTS]
        arrays, owners, first = {}, {}, {}
        for name, data in datasets.items():
            check_data(h5py, path, name, data)
            kind = text(data.attrs.get("dtype", data.dtype.newbyteorder("=").name))
            if torch_dtype_name(kind) is None or getattr(torch, kind).itemsize != data.dtype.itemsize:
                ignored.append(f"{shorten(name, 60)}: no array of numbers ({shorten(data.dtype, 40)})")
                continue
            owner = first.setdefault(h5py.h5o.get_info(data.id).addr, name)
            if owner != name:
                owners[name] = owner
            arrays[name] = stored_array(h5py, path, opened, base, data, kind)
        classes = layer_classes(file.attrs.get("model_config"))
    roles = roles_of({name: array.shape for name, array in arrays.items()}, classes)
    refuse_quantized(path, arrays)
    axes, unknown = kernel_axes({name: array.shape for name, array in arrays.items()}, roles)
    return array_contents(
        path,
        arrays,
        axes,
        owners=owners,
        in_state_dict_order=in_order,
        constants={name for name, (_, leaf) in roles.items() if leaf in STATISTICS},
        ignored=ignored + unknown_axes(unknown),
    )


def walk(h5py: Any, path: Path, group: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """The datasets below a group by their paths; training state at the top is left out.

    Raises:
        CheckpointError: a link that is not a plain one leads elsewhere; groups contain each other or nest too deeply.
    """
    address = h5py.h5o.get_info(group.id).addr
    if address in seen or prefix.count("/") > MAX_DEPTH or len(seen) + len(group) > MAX_GROUPS:
        raise CheckpointError(
            path, f"its group {shorten(prefix)} is linked twice, nested too deeply or too large", DAMAGED
        )
    seen.add(address)
    for name in group:
        if not prefix and name in NOT_WEIGHTS:
            continue
        link = group.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            what = "another file" if isinstance(link, h5py.ExternalLink) else "another place"
            reason = f"its entry {shorten(prefix + name)} is a link to {what}, which is not followed"
            raise CheckpointError(path, reason, "Save the weights again, in one file without such links")
        item = group[name]
        if isinstance(item, h5py.Group):
            yield from walk(h5py, path, item, f"{prefix}{name}/", seen)
        elif isinstance(item, h5py.Dataset):
            yield prefix + name, item


def check_data(h5py: Any, path: Path, name: str, data: Any) -> None:
    """Refuses data that lies in other files, needs a plugin, or is larger than the file can hold.

    Raises:
        CheckpointError: naming the dataset.
    """
    plan = data.id.get_create_plist()
    filters = [plan.get_filter(index)[0] for index in range(plan.get_nfilters())]
    size = prod(data.shape or ()) * data.dtype.itemsize
    if data.external or data.is_virtual:
        reason = f"the data of {shorten(name)} lies in other files"
    elif foreign := [number for number in filters if number not in OWN_FILTERS]:
        reason = f"the data of {shorten(name)} is packed by filter {foreign[0]}, which needs a plugin"
    elif size > MAX_EXPANDED_BYTES and size > MAX_EXPANSION * data.id.get_storage_size():
        reason = f"{shorten(name)} claims {size:,} bytes, of which {data.id.get_storage_size():,} are stored"
    elif data.shape is None:
        reason = f"{shorten(name)} has no shape"
    else:
        return
    raise CheckpointError(path, reason, "Save the weights again, in one file with data of its own")


def stored_array(
    h5py: Any, path: Path, opened: Callable[[], Any], base: int | None, data: Any, kind: str
) -> StoredArray:
    """A dataset: mapped where it lies in one piece, else read by h5py."""
    offset, place, shape = data.id.get_offset(), data.name, data.shape
    if base is not None and offset is not None and data.dtype.isnative and not data.file.userblock_size:
        return StoredArray(shape, kind, lambda: mapped_tensor(path, base + offset, shape, kind))

    def read() -> torch.Tensor:
        with h5py.File(opened(), "r") as file:
            return tensor_of(file[place][()])

    return StoredArray(shape, kind, read)


def text(value: Any) -> str:
    """An attribute that is text, of either kind that HDF5 has."""
    return value.decode() if isinstance(value, bytes) else str(value)


def listed_names(root: Any) -> list[str]:
    """The paths of the weights in the model's order, where Keras lists them (versions 1 and 2)."""

    def listed(group: Any, attribute: str) -> list[str]:
        parts = [attribute] if attribute in group.attrs else [f"{attribute}{i}" for i in range(len(group.attrs))]
        return [text(name) for part in parts if part in group.attrs for name in group.attrs[part]]

    layers = [name for name in listed(root, "layer_names") if name in root]
    return [f"{layer}/{name}" for layer in layers for name in listed(root[layer], "weight_names")]


def layer_classes(config: Any) -> dict[str, str]:
    """Layer name -> its class, as a saved model's config tells them; nothing is made of it."""
    try:
        stack, classes = [json.loads(text(config or "{}"))], {}
        while stack:
            value = stack.pop()
            if isinstance(value, dict):
                inner = value.get("config")
                if isinstance(inner, dict) and isinstance(inner.get("name"), str):
                    classes[inner["name"]] = str(value.get("class_name", ""))
                stack.extend(value.values())
            elif isinstance(value, list):
                stack.extend(value)
    except (ValueError, RecursionError):
        return {}
    return classes


def roles_of(shapes: Mapping[str, tuple[int, ...]], classes: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Name -> (module, variable) of every array, by its path; Keras 3 numbers the variables of a layer."""
    roles, numbered = {}, {}
    for name in shapes:
        module, _, leaf = name.partition(":")[0].rpartition("/")
        if leaf.isdecimal() and module.rpartition("/")[2] == "vars":
            numbered.setdefault(module.removesuffix("/vars"), []).append(name)
        else:
            layer = module.rpartition("/")[2]
            roles[name] = (f"{module}/{classes.get(layer, layer)}", leaf)
    for module, names in numbered.items():
        names.sort(key=lambda name: int(name.rpartition("/")[2]))
        for name, leaf in zip(names, variables(module.rpartition("/")[2], [shapes[n] for n in names]), strict=False):
            roles[name] = (module, leaf)
    return roles


def variables(layer: str, shapes: list[tuple[int, ...]]) -> tuple[str, ...]:
    """The names of a layer's numbered variables, by its class or attribute name and their shapes."""
    vectors = all(len(shape) == 1 and shape == shapes[0] for shape in shapes)
    if layer.startswith("normalization"):
        return ("moving_mean", "moving_variance", "count")
    if vectors and (layer.startswith("batch_normalization") or len(shapes) == 4):
        return ("gamma", "beta")[: len(shapes) - 2] + STATISTICS
    if known := next((names for part, names in VARIABLES.items() if part in layer), None):
        return known
    pair = len(shapes) == 2 and len(shapes[0]) > 1 and len(shapes[1]) == 1 and shapes[1][0] in shapes[0][-2:]
    return ("kernel", "bias") if pair else ("variable",) * len(shapes)


def refuse_quantized(path: Path, arrays: Mapping[str, StoredArray]) -> None:
    """Refuses the 8-bit codes that Keras' `quantize` stores: their scales are not weights.

    Raises:
        CheckpointError: naming one.
    """
    for name, array in arrays.items():
        if array.dtype in ("int8", "uint8") and len(array.shape) > 1:
            reason = f"is quantized by Keras ({shorten(name)} is {array.dtype})"
            raise CheckpointError(path, reason, "Pass the model as it was before quantize()")
