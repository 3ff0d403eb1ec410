"""Folders of torch.distributed.checkpoint (DCP): `.metadata` says which bytes of which file are which chunk."""

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch

from ...tokens.manifest import TensorSpec
from ..containers.container import Contents
from ..containers.pickle_reader import OddKey, read_pickle
from ..errors import CheckpointError, shorten
from ..folders import check_inside
from .layouts import DCP_METADATA


MAX_METADATA_BYTES = 100_000_000
AGAIN = "The folder is damaged or incomplete; fetch or write it again"


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and the bytes that hold it: a tensor as torch.save or safetensors writes it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Stored:
    """A tensor of the folder: its place in the nested state that was saved, its spec and its chunks."""

    place: tuple[str, ...]
    spec: TensorSpec
    chunks: tuple[Chunk, ...]


def dcp_contents(folder: Path, key: str | None) -> Contents:
    """Contents of a DCP folder: the one state dict in it, or the one that `key` names; read chunk by chunk.

    Raises:
        CheckpointError: `.metadata` is no metadata of DCP; a file or chunk is missing or contradicts it; it holds no
            or several state dicts.
    """
    stored, ignored = read_metadata(folder)
    group, chosen = choose_group(folder, stored, key)
    states = (training_state(tensor.place) for tensor in stored)
    ignored = (
        list(dict.fromkeys(f"{place}: passed over, a state of training, no weights" for place in states if place))
        + ignored
    )
    tensors = {tensor.spec.name: tensor for tensor in chosen}
    return Contents(
        {name: tensor.spec for name, tensor in tensors.items()},
        lambda name: read_tensor(folder, tensors[name]),
        nested=bool(group),
        ignored=ignored,
    )


def read_metadata(folder: Path) -> tuple[list[Stored], list[str]]:
    """The tensors that `.metadata` lists, and a line for each other thing."""
    path = folder / DCP_METADATA
    with path.open("rb") as stream:
        data = stream.read(MAX_METADATA_BYTES + 1)
    if len(data) > MAX_METADATA_BYTES:
        raise CheckpointError(path, f"is larger than {MAX_METADATA_BYTES:,} bytes", AGAIN)
    try:
        metadata = fields(read_pickle(data, functions={"torch.Size": lambda size=(): tuple(size)})[0])
        entries, places = metadata["state_dict_metadata"], metadata["storage_data"]
        if not isinstance(entries, dict) or not isinstance(places, dict):
            raise TypeError("no mapping of tensors")
        paths = metadata.get("planner_data") if isinstance(metadata.get("planner_data"), dict) else {}
        infos: dict[tuple, Any] = {}
        for index, info in places.items():
            at = fields(index)
            infos[at["fqn"], at.get("offset") and tuple(at["offset"])] = fields(info)
        stored, ignored = [], []
        for name, entry in entries.items():
            where = tuple(map(str, paths.get(name) or (name,)))
            if getattr(entry, "state", None):
                stored.append(_stored(path, name, where, fields(entry), infos))
            elif not training_state(where):
                ignored.append(f"{name}: no tensor")
    except CheckpointError:
        raise
    except Exception as error:  # pickles break in any way
        reason = f"is no metadata of torch.distributed.checkpoint ({type(error).__name__}: {shorten(error)})"
        raise CheckpointError(path, reason, AGAIN) from error
    return stored, ignored


def _stored(path: Path, name: str, where: tuple[str, ...], entry: dict, infos: dict[tuple, dict]) -> Stored:
    """One tensor, its chunks checked to fill it."""
    state = entry["properties"].state  # a tuple, by its own __getstate__
    named = state[0] if isinstance(state, tuple) else fields(entry["properties"])["dtype"]
    dtype = getattr(torch, named.name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(path, f"tensor {shorten(name)} has an unknown dtype", AGAIN)
    spec = TensorSpec(where[-1], tuple(int(n) for n in entry["size"]), str(dtype).removeprefix("torch."))
    chunks = []
    for chunk in map(fields, entry["chunks"]):
        offsets, sizes = (tuple(int(n) for n in chunk[field]) for field in ("offsets", "sizes"))
        info = infos.get((name, offsets)) or infos.get((name, None))
        if info is None:
            raise CheckpointError(
                path, f"does not say where tensor {shorten(name)} at {list(offsets)} is stored", AGAIN
            )
        if info.get("transform_descriptors"):
            reason = f"tensor {shorten(name)} is compressed ({shorten(info['transform_descriptors'])})"
            raise CheckpointError(path, reason, "Load it with torch.distributed.checkpoint and save it plain")
        check_inside(path, info["relative_path"])
        file = path.parent / info["relative_path"]
        if not file.is_file():
            raise CheckpointError(path, f"lacks the file {shorten(info['relative_path'])}, a part of the model", AGAIN)
        start, length = int(info["offset"]), int(info["length"])
        needed = prod(sizes) * dtype.itemsize
        if min(start, length, *offsets, *sizes, 0) < 0 or start + length > file.stat().st_size or needed > length:
            reason = f"tensor {shorten(name)} needs {needed:,} bytes of {file.name} from byte {start:,}, not there"
            raise CheckpointError(path, reason, AGAIN)
        if len(offsets) != len(spec.shape) or any(
            o + n > m for o, n, m in zip(offsets, sizes, spec.shape, strict=True)
        ):
            raise CheckpointError(path, f"a chunk of tensor {shorten(name)} lies outside of it", AGAIN)
        chunks.append(Chunk(offsets, sizes, info["relative_path"], start, length))
    chunks = list({chunk.offsets: chunk for chunk in chunks}.values())
    if sum(prod(chunk.sizes) for chunk in chunks) != spec.numel or _overlap(chunks):
        raise CheckpointError(path, f"the chunks of tensor {shorten(name)} do not fill it", AGAIN)
    return Stored(where, spec, tuple(chunks))


def _overlap(chunks: list[Chunk]) -> bool:
    """True if two chunks share an entry; of very many only neighbors, which are cut along one dimension."""
    boxes = sorted((chunk.offsets, chunk.sizes) for chunk in chunks if prod(chunk.sizes))
    pairs = combinations(boxes, 2) if len(boxes) <= 64 else pairwise(boxes)
    return any(all(o < p + n and p < o + m for o, m, p, n in zip(*a, *b, strict=True)) for a, b in pairs)


def training_state(place: tuple[str, ...]) -> str:
    """The place, in the nested state, of an optimizer or the like in which a tensor lies; empty for weights."""
    for depth, name in enumerate(place, 1):
        first = name.partition(".")[0].lower()
        if "optim" in first or first in ("lr_scheduler", "train_state", "dataloader", "rng_state"):
            return ".".join((*place[: depth - 1], name.partition(".")[0]))
    return ""


def choose_group(folder: Path, stored: list[Stored], key: str | None) -> tuple[str, list[Stored]]:
    """The tensors of one state dict: those that were saved under one key, which is returned too."""
    groups: dict[str, list[Stored]] = {}
    for tensor in stored:
        if not training_state(tensor.place):
            groups.setdefault(".".join(tensor.place[:-1]), []).append(tensor)
    floats = {
        group: tensors
        for group, tensors in groups.items()
        if any(tensor.spec.torch_dtype.is_floating_point and tensor.spec.shape for tensor in tensors)
    }
    if key is not None:
        if key in groups:
            return key, groups[key]
        offered = ", ".join(shorten(group, 60) for group in list(groups)[:12]) or "nothing"
        raise CheckpointError(folder, f"has no entry {shorten(key)}", f"There it offers {offered}")
    if len(floats) == 1:
        return next(iter(floats.items()))
    if not floats:
        raise CheckpointError(folder, "holds no tensors beside those of an optimizer", "Pass the folder of the model")
    listed = "; ".join(
        f"key={group!r} ({len(tensors)} tensors, {sum(t.spec.numel for t in tensors):,} entries)"
        for group, tensors in list(floats.items())[:8]
    )
    raise CheckpointError(folder, f"holds {len(floats)} state dicts: {listed}", f"Choose one: {folder}#key")


def read_tensor(folder: Path, tensor: Stored) -> torch.Tensor:
    """Reads a tensor's chunks, and joins them."""
    pieces = [(chunk, read_chunk(folder, tensor, chunk)) for chunk in tensor.chunks]
    if len(pieces) == 1:
        return pieces[0][1]
    joined = torch.zeros(tensor.spec.shape, dtype=tensor.spec.torch_dtype)
    for chunk, piece in pieces:
        joined[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))] = piece
    return joined


def read_chunk(folder: Path, tensor: Stored, chunk: Chunk) -> torch.Tensor:
    """Reads one chunk, checked to be what the metadata says.

    Raises:
        CheckpointError: it is not, or holds more than one plain tensor.
    """
    path = folder / chunk.file
    with path.open("rb") as stream:
        stream.seek(chunk.start)
        data = stream.read(chunk.length)
    try:
        piece = next(iter(_tensors_of(data)))
    except Exception as error:
        reason = f"the bytes of tensor {shorten(tensor.spec.name)} cannot be read ({shorten(error)})"
        raise CheckpointError(path, reason, AGAIN) from error
    if tuple(piece.shape) != chunk.sizes or piece.dtype != tensor.spec.torch_dtype:
        reason = f"holds {piece.dtype} {list(piece.shape)} for tensor {shorten(tensor.spec.name)}, not {chunk.sizes}"
        raise CheckpointError(path, reason, AGAIN)
    return piece


def _tensors_of(data: bytes) -> Iterator[torch.Tensor]:
    if data[8:9] == b"{":
        from safetensors.torch import load

        yield from load(data).values()
        return
    with zipfile.ZipFile(io.BytesIO(data)) as archive:  # a packed record could unpack to any size
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise ValueError("its records are compressed")
    tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
        raise ValueError("it is no plain tensor")
    yield tensor.detach()


def fields(value: Any) -> dict[str, Any]:
    """The attributes of an inert object of a dataclass, which may be a key of a mapping."""
    state = getattr(value.held if isinstance(value, OddKey) else value, "state", None)
    if isinstance(state, tuple):  # plain attributes, slots
        state = {k: v for part in state if isinstance(part, dict) for k, v in part.items()}
    if not isinstance(state, dict):
        raise TypeError(f"{type(value).__name__} has no fields")
    return state
