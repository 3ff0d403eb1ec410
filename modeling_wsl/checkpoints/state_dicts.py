"""The state dict inside a checkpoint: it is searched for, its tensors are checked, tied ones are told apart."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from .errors import CheckpointError, shorten


MAX_DEPTH = 8
# A tensor may show few stored entries many times (a stride of 0). Past both bounds that is an attack on memory.
MAX_EXPANSION, MAX_EXPANDED_BYTES = 1000, 1 << 26


def walk_tensors(content: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested mappings and sequences, each container once (a pickle may contain itself)."""
    seen: set[int] = set()
    stack = [content]
    while stack:
        value = stack.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (Mapping, list, tuple, set, frozenset)) and id(value) not in seen:
            seen.add(id(value))
            stack.extend(value.values() if isinstance(value, Mapping) else value)


def find_state_dict(source: object, content: Any, key: str | None) -> tuple[str, dict[str, torch.Tensor]]:
    """Finds the one state dict of parameters in what a checkpoint file holds.

    A mapping is one if its keys are strings and it holds floating-point tensors. Optimizer states are passed over, and
    so are entries of a state dict that are no tensors (counters, `_extra_state`).

    Returns:
        where it was found (`""` at the top, else names joined by dots), and its tensors in the file's order.

    Raises:
        CheckpointError: none, or several: the error lists them, and `key` picks one.
    """
    if key == "" and isinstance(content, Mapping):
        return "", named_tensors(source, content)  # the tensors of the top level, whatever is nested beside them
    if key is not None:
        content = select(source, content, key)
    if isinstance(content, Mapping) and content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return key or "", named_tensors(source, content)
    nested = list(candidates(content, (), set()))
    if len(nested) == 1:
        path, mapping = nested[0]
        return ".".join(([key] if key else []) + list(path)), named_tensors(source, mapping)
    if nested:
        listed = "; ".join(describe(path, mapping, key) for path, mapping in nested[:8])
        more = f"; and {len(nested) - 8} more" if len(nested) > 8 else ""
        raise CheckpointError(source, f"holds {len(nested)} state dicts: {listed}{more}", "Choose one with key=")
    what = type(content).__name__
    if isinstance(content, Mapping):
        entries = ", ".join(
            f"{shorten(name, 40)}: {type(value).__name__}" for name, value in list(content.items())[:6]
        )
        what = f"mapping of {len(content)} entries ({entries})" if entries else "empty mapping"
    reason = f"holds no state dict: a {what} without floating-point tensors under string keys"
    raise CheckpointError(source, reason, "Pass a mapping from parameter names to tensors")


def select(source: object, content: Any, key: str) -> Any:
    """Follows `key` into nested mappings and lists; a name may itself contain dots, and the longest match wins."""
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        content = {str(index): value for index, value in enumerate(content)}
    if isinstance(content, Mapping):
        names = {str(name): value for name, value in content.items()}
        if key in names:
            return names[key]
        for name in sorted(names, key=len, reverse=True):
            if name and key.startswith(f"{name}."):
                return select(source, names[name], key[len(name) + 1 :])
    there = ", ".join(shorten(name, 40) for name in list(content)[:12]) if isinstance(content, Mapping) else "no names"
    raise CheckpointError(source, f"has no entry {shorten(key)}", f"Under key= it offers {there}")


def candidates(
    content: Any, path: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], Mapping[str, torch.Tensor]]]:
    """The mappings in `content` that hold parameters, with their paths."""
    if len(path) > MAX_DEPTH or id(content) in seen:
        return
    seen.add(id(content))
    if isinstance(content, (list, tuple)):
        content = {index: value for index, value in enumerate(content) if isinstance(value, (Mapping, list, tuple))}
    if not isinstance(content, Mapping) or {"state", "param_groups"} <= set(map(str, content)):
        return  # an optimizer's state
    nested = []
    for name, value in content.items():
        if isinstance(value, (Mapping, list, tuple)) and "optim" not in str(name).lower():
            nested += candidates(value, (*path, str(name)), seen)
    own = {n: v for n, v in content.items() if isinstance(v, torch.Tensor) and v.is_floating_point() and v.numel()}
    # Scalars (a loss, a scale) and loose tensors beside a state dict are not parameters; dotted names are.
    if own and all(isinstance(name, str) for name in content):
        dotted = any("." in name or name in ("weight", "bias") for name in own)
        if dotted or (not nested and any(value.dim() for value in own.values())):
            yield path, content
    yield from nested


def describe(path: tuple[str, ...], mapping: Mapping[str, Any], key: str | None) -> str:
    """One candidate of an ambiguous checkpoint: the key to give, and how much it holds."""
    tensors = [value for value in mapping.values() if isinstance(value, torch.Tensor)]
    size = f"{len(tensors)} tensors, {sum(t.numel() for t in tensors):,} entries"
    return f"key={'.'.join(([key] if key else []) + list(path))!r} ({size})"


def named_tensors(source: object, mapping: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, checked to be plain, readable CPU-or-device data.

    Raises:
        CheckpointError: a name is no string; an entry packs tensors into a tuple; a tensor is sparse, quantized or
            without data, or shows its few stored entries more than a thousand times.
    """
    tensors = {}
    for name, tensor in mapping.items():
        if not isinstance(name, str):
            raise CheckpointError(
                source, f"names a tensor by the {type(name).__name__} {shorten(name)}", "Use strings"
            )
        if not isinstance(tensor, torch.Tensor):
            if "." in name and isinstance(tensor, (list, tuple)) and any(True for _ in walk_tensors(tensor)):
                reason = f"entry {shorten(name)} packs tensors into a {type(tensor).__name__}"
                raise CheckpointError(source, reason, "Save the model before it was quantized or packed")
            continue
        if tensor.is_quantized or tensor.layout is not torch.strided or tensor.is_nested:
            kind = str(tensor.dtype if tensor.is_quantized else tensor.layout).removeprefix("torch.")
            advice = "Dequantize or densify it first (`.dequantize()`, `.to_dense()`)"
            raise CheckpointError(source, f"tensor {shorten(name)} is stored as {kind}", advice)
        if tensor.device.type == "meta":
            advice = "Load the weights first, then pass the model"
            raise CheckpointError(source, f"tensor {shorten(name)} is on the meta device and holds no data", advice)
        shown, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        if shown > MAX_EXPANDED_BYTES and shown > MAX_EXPANSION * stored:
            reason = (
                f"tensor {shorten(name)} of shape {tuple(tensor.shape)} shows {stored:,} stored bytes as {shown:,}"
            )
            raise CheckpointError(source, reason, "Store the entries once, without expand()")
        tensors[name] = tensor.detach()
    return tensors


def split_aliases(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Separates tied tensors: those that show the same memory with the same dtype, shape and strides.

    Returns:
        the tensors stored once, under the first of their names; alias -> stored name.
    """
    stored: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple, str] = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        owner = first.setdefault(place, name) if tensor.numel() else name
        if owner == name:
            stored[name] = tensor
        else:
            tied[name] = owner
    return stored, tied
