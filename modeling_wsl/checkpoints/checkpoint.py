"""One lazy reader for every source of weights, safe by default: nothing that a file contains is ever run."""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..tokens.manifest import TensorSpec
from .constants import with_constants
from .contents import Contents, file_contents, file_keys, memory_contents
from .errors import (
    CheckpointError,
    NonFiniteWeightsError,
    NotTokenizableError,
    TooFewParametersError,
    refuses_unknown_keywords,
    shorten,
)
from .file_names import ADAPTER_NAMES, WEIGHT_NAMES, variant_of
from .folders import choose_local, local_path, read_config
from .hub import download, is_hub_id
from .order import SIDECAR, Order, order_names
from .parts.single import refuse_cut, refuse_single_part, refuse_ungathered
from .quantization.dequantize import dequantized
from .reference import ALL, Reference, exists, parse_reference


CHUNK_BYTES = 1 << 24
# A training checkpoint whose model holds fewer numbers than this is a toy or a wrong guess at where the model is.
MIN_NESTED_PARAMETERS = 64
FINITE_CHECK_BYTES = 1 << 18  # stays in the cache when widened


class Checkpoint:
    """The tensors of one model, read on demand. Use it as a context manager, or call `close`.

    Attributes:
        source: path, Hub id, or a name in angle brackets for objects in memory.
        path: the weight file or index of shards, on this machine; None for objects in memory.
        revision: the commit, for models of the Hub.
        library: "timm", "transformers" or "peft" where the folder, id or module says so, else None.
        config: parsed config.json, or adapter_config.json (which names the base model); {} if there is none.
        tensors: every stored tensor once, in state-dict order.
        tied: alias -> stored name.
        tensor_order: all names, tied ones too, in state-dict order.
        stored_as, layouts, constants, ignored: see `Contents`; what a reader of the file must know beside its tensors.
        allow_nonfinite: whether `check_finite` lets NaN and infinite entries pass.
    """

    def __init__(
        self,
        source: str,
        contents: Contents,
        tensor_order: list[str],
        *,
        library: str | None = None,
        config: dict[str, Any] | None = None,
        path: Path | None = None,
        revision: str | None = None,
        allow_nonfinite: bool = False,
    ):
        self.source = source
        self.path = path
        self.revision = revision
        self.library = library
        self.config = config or {}
        self.allow_nonfinite = allow_nonfinite
        self.tensor_order = tuple(tensor_order)
        self.tensors: dict[str, TensorSpec] = {}
        self.tied: dict[str, str] = {}
        first: dict[str, str] = {}  # of the names of one tensor, the first in order is the stored one
        for name in tensor_order:
            stored = first.setdefault(contents.owners.get(name, name), name)
            if stored == name:
                self.tensors[name] = contents.specs[name]
            else:
                self.tied[name] = stored
        self.stored_as = contents.stored_as
        self.layouts = contents.layouts
        self.constants = contents.constants
        self.ignored = tuple(contents.ignored)
        self._contents = contents

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` (or the one it is tied to), on the CPU.

        Where the source is a file, it is a view on mapped memory: slicing it touches only the pages of the slice.
        Do not write to it: it may be the caller's own parameter.

        Raises:
            KeyError: unknown name.
            CheckpointError: the file changed on disk.
        """
        if name not in self.tensors and name not in self.tied:
            raise KeyError(f"{self.source} has no tensor {name!r}")
        return self._contents.read(self._contents.owners.get(name, name)).cpu()

    def read_entries(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Entries `[start, stop)` of a tensor in row-major order; of a quantized one, no others are dequantized.

        Raises:
            KeyError, CheckpointError: as `read`.
        """
        stored = self._contents.owners.get(name, name)
        if stored in self._contents.entries:
            return self._contents.entries[stored](stored, start, stop)
        tensor = self.read(name)
        if tensor.dim() > 1 and not tensor.is_contiguous():  # rows alone are copied
            size = max(1, tensor[0].numel())
            first = start // size
            return tensor[first : -(-stop // size)].reshape(-1)[start - first * size : stop - first * size]
        return tensor.reshape(-1)[start:stop]

    def check_finite(self, name: str, tensor: torch.Tensor) -> None:
        """Refuses NaN and infinite entries in (a part of) the tensor `name`, unless `allow_nonfinite`.

        Costs one sum: only where that is not finite are the entries looked at. Integers and constants always pass.

        Raises:
            NonFiniteWeightsError: with the first such entry, and its index if `tensor` is the whole tensor.
        """
        if self.allow_nonfinite or name in self.constants:
            return
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        if tensor.is_floating_point() and (at := first_nonfinite(tensor)) is not None:
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), tensor.shape))
            value = float(tensor[index])
            is_complete = tensor.shape == self.tensors[self.tied.get(name, name)].shape
            reason = f"tensor {shorten(name)} holds {value}" + f" at {list(index)}" * is_complete
            raise NonFiniteWeightsError(self.source, reason, "The option allow_nonfinite admits it")

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All tensors in state-dict order, checked to be finite; tied names share one tensor object.

        Raises:
            NonFiniteWeightsError: as `check_finite`.
        """
        stored = {name: self.read(name) for name in self.tensors}
        for name, tensor in stored.items():
            self.check_finite(name, tensor)
        return {name: stored[self.tied.get(name, name)] for name in self.tensor_order}

    def sha256(self) -> str:
        """SHA-256 of name, dtype, shape and bytes (little endian, row major) of every stored tensor, in name order.

        It does not depend on the file format, and on the order of the tensors only through which of the names of a
        tied tensor comes first.
        """
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            spec = self.tensors[name]
            digest.update(f"{name}\0{spec.dtype}\0{','.join(map(str, spec.shape))}\0".encode())
            for piece in pieces(self.read(name), CHUNK_BYTES):
                digest.update(piece.contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @property
    def num_parameters(self) -> int:
        """Floating-point entries, tied ones once (batch-norm statistics among them, constants not)."""
        weights = (spec for name, spec in self.tensors.items() if name not in self.constants)
        return sum(spec.numel for spec in weights if spec.torch_dtype.is_floating_point)

    def close(self) -> None:
        """Lets go of mapped files. Tensors that were read stay valid, and `read` maps the file again."""
        self._contents.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({self.source!r}, {len(self.tensors)} tensors, {self.num_parameters:,} parameters)"


def first_nonfinite(tensor: torch.Tensor) -> int | None:
    """Flat index of the first NaN or infinite entry of a floating-point tensor, or None if all are finite."""
    if tensor.dtype == torch.float4_e2m1fn_x2:  # packed in pairs, and it has neither NaN nor infinity
        return None
    before = 0
    for piece in pieces(tensor, FINITE_CHECK_BYTES):  # in pieces, for narrow dtypes are widened
        narrow = piece.element_size() == 1
        wide = piece.to(torch.float32 if narrow else torch.promote_types(piece.dtype, torch.float32))
        # One sum tells nearly always; large finite entries can overflow it.
        if not math.isfinite(wide.sum()) and not (finite := torch.isfinite(wide)).all():
            return before + int(finite.view(-1).to(torch.uint8).argmin())
        before += piece.numel()
    return None


def pieces(tensor: torch.Tensor, chunk_bytes: int) -> Iterator[torch.Tensor]:
    """Consecutive parts of a tensor in row-major order, of about `chunk_bytes` each; views, never a whole copy."""
    size = tensor.element_size()
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(max(1, chunk_bytes // size))
    elif tensor.numel() * size <= chunk_bytes or tensor.dim() < 2:
        yield tensor.reshape(-1)
    else:
        rows = chunk_bytes // max(1, size * tensor[0].numel())
        for part in tensor.split(rows) if rows else tensor:
            yield from pieces(part, chunk_bytes)


@refuses_unknown_keywords
def open_checkpoint(
    source: "Mapping[str, torch.Tensor] | torch.nn.Module | str | os.PathLike[str] | Reference | Checkpoint",
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str = "",
    key: str | None = None,
    order: Order = "auto",
    allow_nonfinite: bool = False,
    min_parameters: int | None = None,
) -> Checkpoint:
    """Opens weights for reading; only names, shapes and dtypes are read now.

    Args:
        source: a state dict, a module, a file (safetensors, torch.save, an index of shards), a folder (of
            transformers, timm or PEFT, or with one weight file), a Hub id (`org/name`), each also as a reference that
            says what of it is meant (`org/name:subfolder#key@revision`, see `reference.py`); or a `Checkpoint`, which
            is returned as it is.
        revision: branch, tag or commit of a Hub id.
        token: access token for private and gated models of the Hub.
        subfolder: folder within a folder or Hub model.
        key: which state dict of a training checkpoint is meant, names joined by dots (`"ema.model"`); needed only
            where the file holds several.
        order: where the order of the tensors comes from. "auto" takes the first that there is of: `tensor_order`
            in a `model.json` beside the weights or in their metadata; the architecture that config.json names; the
            order of the state dict, which torch.save keeps; natural order of the names. "file", "natural" and
            "architecture" insist.
        allow_nonfinite: admit NaN and infinite weights. They are looked for where weights are read.
        min_parameters: refuse models of fewer floating-point entries. By default 64 for state dicts inside a
            training checkpoint and none otherwise; 0 admits all.

    Raises:
        CheckpointError: the source cannot be read safely, contradicts itself or the options, is of a format that is
            refused, or holds no floating-point tensor; the message names the file, the reason and what to do.
        TypeError: `source` is none of the above, or options are given for a `Checkpoint`.
    """
    if isinstance(source, Checkpoint):
        options = (revision, token, subfolder, key, order, allow_nonfinite, min_parameters)
        if options != (None, None, "", None, "auto", False, None):
            raise TypeError(f"{source!r} is open already: pass its options to the open_checkpoint that opened it.")
        return source
    path: Path | None = None
    library, config, commit = None, {}, None
    if isinstance(source, torch.nn.Module):
        name = f"<{type(source).__name__}>"
        contents = memory_contents(name, source.state_dict(), key)
        root = type(source).__module__.partition(".")[0]
        library = root if root in ("timm", "transformers", "peft") else None
    elif isinstance(source, Mapping):
        name = "<state dict>"
        contents = memory_contents(name, source, key)
    elif isinstance(source, (str, os.PathLike, Reference)):
        own = parse_reference(source)
        reference = own.with_options(subfolder=subfolder, key=key, revision=revision)
        name, key = str(replace(reference, revision=None)), reference.key
        if not exists(reference.location) and not isinstance(source, os.PathLike) and is_hub_id(reference.location):
            options = {"revision": reference.revision, "subfolder": reference.subfolder}
            path, commit = download(reference.location, token=token, **options)
        else:
            path = local_path(replace(reference, revision=own.revision))  # the option is of Hub ids alone
        if own.key == ALL:
            listed = "; ".join(map(str, list_models(reference, path))) or name.removesuffix(f"#{ALL}")
            advice = "Name one of them; tokenize, embed and search read each as a model"
            raise CheckpointError(name, f"names {shorten(listed, 1000)}", advice)
        passed_over: list[str] = []
        if path.is_dir():
            choice = choose_local(path)
            library, config = read_config(choice.folder)
            path, passed_over = choice.path, choice.passed_over
        else:
            refuse_single_part(path)
            if path.name in (*WEIGHT_NAMES, *ADAPTER_NAMES) or variant_of(path.name):
                library, config = read_config(path.parent)
        contents = file_contents(path, key)
        contents.ignored = passed_over + contents.ignored
    else:
        known = "a state dict, a module, a path, a Hub id or a Checkpoint"
        raise TypeError(f"open_checkpoint reads {known}, not {type(source).__name__}.")

    refuse_ungathered(name, contents.specs)
    refuse_cut(name, contents.specs, path if path is None or path.is_dir() else path.parent, config)
    contents = with_constants(dequantized(name, contents, path, config))
    names = order_names(
        name,
        list(contents.specs),
        order,
        sidecar=(path if path.is_dir() else path.parent) / SIDECAR if path else None,
        metadata=contents.metadata,
        config=config if library != "peft" else {},
        in_state_dict_order=contents.in_state_dict_order,
    )
    checkpoint = Checkpoint(
        name,
        contents,
        names,
        library=library,
        config=config,
        path=path,
        revision=commit,
        allow_nonfinite=allow_nonfinite,
    )
    check_size(checkpoint, contents.nested, min_parameters)
    return checkpoint


def list_models(reference: Reference, path: Path | None = None) -> list[Reference]:
    """A reference to each model that `file#all` stands for: to its state dicts, or to the file, if it holds one.

    Args:
        reference: with the key `all`.
        path: the file, where it is on this machine already.

    Raises:
        CheckpointError: the file cannot be read safely.
    """
    if path is None and not exists(reference.location) and is_hub_id(reference.location):
        path, _ = download(reference.location, revision=reference.revision, token=None, subfolder=reference.subfolder)
    path = local_path(replace(reference, key=None)) if path is None else path
    path = choose_local(path).path if path.is_dir() else path
    return [replace(reference, key=key) for key in file_keys(path) or [None]]


def check_size(checkpoint: Checkpoint, nested: bool, min_parameters: int | None) -> None:
    """Refuses a checkpoint without floating-point tensors, or with too few entries."""
    if not checkpoint.num_parameters:
        kinds = sorted({spec.dtype for spec in checkpoint.tensors.values()})
        reason = f"holds no floating-point tensor ({len(checkpoint.tensors)} tensors: {', '.join(kinds) or 'none'})"
        if checkpoint.tensors and all(0 in spec.shape for spec in checkpoint.tensors.values()):
            reason = f"holds no weights: all its {len(checkpoint.tensors)} tensors are empty"
            raise NotTokenizableError(checkpoint.source, reason, "Save the weights themselves, or pass another file")
        if checkpoint.constants:
            named = ", ".join(sorted(checkpoint.constants)[:3])
            reason = f"holds no weights: all its floating-point tensors are constants ({shorten(named)})"
        raise NotTokenizableError(checkpoint.source, reason, "Dequantize the weights first, or pass another file")
    minimum = min_parameters if min_parameters is not None else MIN_NESTED_PARAMETERS * nested
    if checkpoint.num_parameters < minimum:
        reason = f"is degenerate: {checkpoint.num_parameters} floating-point entries, fewer than {minimum}"
        raise TooFewParametersError(checkpoint.source, reason, "The option min_parameters admits it (0: no limit)")
