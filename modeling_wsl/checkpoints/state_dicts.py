"""The state dict inside a checkpoint: it is searched for, its tensors are checked, tied ones are told apart."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from .containers.pickle_reader import Global, Inert
from .containers.pickle_reader import describe as in_words
from .containers.torch_files import Array, StoredOtherwise
from .errors import CheckpointError, shorten
from .formats import SAVE_SAFELY
from .reference import Reference


MAX_DEPTH = 8
# A tensor may show few stored entries many times (a stride of 0). Past both bounds that is an attack on memory.
MAX_MODULE_DEPTH = 200
MAX_LISTED = 20
SETTINGS = {"hyper_parameters", "hparams"}  # Lightning keeps there what a model was made from, whole networks too
MAX_EXPANSION, MAX_EXPANDED_BYTES = 1000, 1 << 26


def walk(content: Any) -> Iterator[Any]:
    """Every value in nested mappings, sequences and objects, each container once (a pickle may contain itself)."""
    seen: set[int] = set()
    stack = [content]
    while stack:
        value = stack.pop()
        yield value
        if isinstance(value, (Mapping, list, tuple, set, frozenset, Inert)) and id(value) not in seen:
            seen.add(id(value))
            inside = value.parts if isinstance(value, Inert) else value
            stack.extend(inside.values() if isinstance(inside, Mapping) else inside)


def holds_tensors(content: Any) -> bool:
    """Whether there is a tensor of at least one entry anywhere in it, plain or stored in another way."""
    return any(isinstance(v, StoredOtherwise) or (isinstance(v, torch.Tensor) and v.numel()) for v in walk(content))


def as_mapping(content: Any) -> Any:
    """A pickled module as its state dict, another object as a mapping of what it holds; all else as it is.

    A module's state dict is put together as torch does: parameters, persistent buffers, then the modules within.
    """
    if not isinstance(content, Inert):
        return content
    if not is_module(content):
        state = content.state[1] if isinstance(content.state, tuple) and len(content.state) == 2 else content.state
        return content.pairs or (state if isinstance(state, dict) and state else content)
    tensors: dict[str, Any] = {}
    stack: list[tuple[str, Inert, int]] = [("", content, 0)]
    seen: set[int] = set()
    while stack:
        prefix, module, depth = stack.pop()
        if id(module) in seen or depth > MAX_MODULE_DEPTH:
            continue  # a module that is used twice has its tensors under its first name
        seen.add(id(module))
        state = module.state
        transient = state.get("_non_persistent_buffers_set") or ()
        for kind in ("_parameters", "_buffers"):
            held = state.get(kind)
            for name, tensor in held.items() if isinstance(held, dict) else ():
                if tensor is not None and not (kind == "_buffers" and name in transient):
                    tensors[f"{prefix}{name}"] = tensor
        inside = state.get("_modules")
        children = [
            (f"{prefix}{name}.", child, depth + 1)
            for name, child in (inside.items() if isinstance(inside, dict) else ())
            if is_module(child)
        ]
        stack.extend(reversed(children))
    return tensors


def is_module(content: Any) -> bool:
    """Whether an object of a pickle is a module of torch, of whatever class."""
    return isinstance(content, Inert) and isinstance(content.state, dict) and "_parameters" in content.state


def list_beside(content: Any, path: Sequence[str] = ()) -> list[str]:
    """What a checkpoint holds beside the state dict at `path`: objects, optimizers, loose tensors; one line each."""
    lines: list[str] = []

    def add(name: str, value: Any, depth: int) -> None:
        if is_optimizer(value):
            lines.append(f"{name}: state of an optimizer")
        elif isinstance(value, (Inert, Global)):
            lines.append(f"{name}: {in_words(value)}")
        elif isinstance(value, torch.Tensor) and depth < 2:
            lines.append(f"{name}: a tensor beside the state dict")
        elif isinstance(value, Mapping) and depth < 3:
            if any(isinstance(tensor, torch.Tensor) and tensor.dim() for tensor in value.values()):
                lines.append(f"{name}: {len(value)} entries with tensors")
            else:
                for inner, held in list(value.items())[:MAX_LISTED]:
                    add(f"{name}.{inner}", held, depth + 1)

    for name in path:
        content = as_mapping(content)
        if isinstance(content, (list, tuple)):
            content = dict(enumerate(content))
        if not isinstance(content, Mapping):
            break
        names = {str(inner): held for inner, held in content.items()}
        for inner, held in names.items():
            if inner != name:
                add(shorten(inner, 60).strip("'\""), held, 0)
        content = names.get(name)
    own = as_mapping(content)
    for name, value in own.items() if isinstance(own, Mapping) else ():
        if isinstance(value, (Inert, Global)):
            add(shorten(name, 60).strip("'\""), value, 0)
    more = len(lines) - MAX_LISTED
    return lines if more <= 0 else [*lines[:MAX_LISTED], f"and {more} more"]


def is_optimizer(content: Any) -> bool:
    """Whether a mapping is the state of an optimizer."""
    return isinstance(content, Mapping) and {"state", "param_groups"} <= set(map(str, content))


def find_state_dict(source: object, content: Any, key: str | None) -> tuple[tuple[str, ...], dict[str, torch.Tensor]]:
    """Finds the one state dict of parameters in what a checkpoint file holds.

    A mapping is one if its keys are strings and it holds floating-point tensors, and so is a pickled module. Optimizer
    states are passed over, and so are entries of a state dict that are no tensors (counters, `_extra_state`).

    Returns:
        where it was found (`()` at the top), and its tensors in the file's order.

    Raises:
        CheckpointError: none, or several: the error lists them, and `key` picks one.
    """
    if key == "" and isinstance(content, Mapping):
        return (), named_tensors(source, content)  # the tensors of the top level, whatever is nested beside them
    chosen: tuple[str, ...] = ()
    if key is not None:
        chosen, content = select(source, content, key)
    mapping = as_mapping(content) if is_module(content) else content
    if isinstance(mapping, Mapping) and mapping and all(isinstance(value, torch.Tensor) for value in mapping.values()):
        return chosen, named_tensors(source, mapping)
    nested = all_candidates(content)
    if len(nested) == 1:
        path, mapping = nested[0]
        return (*chosen, *path), named_tensors(source, mapping)
    if nested:
        listed = "; ".join(describe(source, (*chosen, *path), mapping) for path, mapping in nested[:8])
        more = f"; and {len(nested) - 8} more" if len(nested) > 8 else ""
        advice = "Choose one; #all stands for a row each in tokenize, embed and search"
        raise CheckpointError(source, f"holds {len(nested)} state dicts: {listed}{more}", advice)
    raise no_state_dict(source, content)


def list_state_dicts(content: Any) -> list[str]:
    """The key of every state dict of parameters in what a checkpoint file holds, in the file's order."""
    return [".".join(path) for path, _ in all_candidates(content)]


def no_state_dict(source: object, content: Any) -> CheckpointError:
    """The error of a file without parameters: for the way they are stored, or with what is there instead."""
    code: dict[str, None] = {}
    for value in walk(content):
        if isinstance(value, StoredOtherwise):
            reason = f"stores its tensors as {value.kind[:60]}"
            advice = "Save plain tensors (`.dequantize()`, `.to_dense()`, `.full_tensor()`)"
            return CheckpointError(source, reason, advice)
        if isinstance(value, (Inert, Global)):
            code[value.kind if isinstance(value, Inert) else value.name] = None
    what = in_words(content)
    if isinstance(content, Mapping):
        entries = ", ".join(f"{shorten(name, 40)}: {in_words(value)}" for name, value in list(content.items())[:6])
        what = f"mapping of {len(content)} entries ({entries})" if entries else "empty mapping"
    reason = f"holds no state dict: a {what} without floating-point tensors under string keys"
    if not code:
        return CheckpointError(source, reason, "Pass a mapping from parameter names to tensors")
    listed = ", ".join(shorten(name) for name in list(code)[:6])
    return CheckpointError(source, f"{reason}; it needs code ({listed}), and nothing of it was run", SAVE_SAFELY)


def select(source: object, content: Any, key: str) -> tuple[tuple[str, ...], Any]:
    """Follows `key` into nested mappings and lists; a name may itself contain dots, and the longest match wins.

    Returns:
        the names on the way, and what is there.
    """
    content = as_mapping(content)
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        content = {str(index): value for index, value in enumerate(content)}
    if isinstance(content, Mapping):
        names = {str(name): value for name, value in content.items()}
        if key in names:
            return (key,), names[key]
        for name in sorted(names, key=len, reverse=True):
            if name and key.startswith(f"{name}."):
                path, there = select(source, names[name], key[len(name) + 1 :])
                return (name, *path), there
    there = ", ".join(shorten(name, 40) for name in list(content)[:12]) if isinstance(content, Mapping) else "no names"
    raise CheckpointError(source, f"has no entry {shorten(key)}", f"There it offers {there}")


def all_candidates(content: Any) -> list[tuple[tuple[str, ...], Mapping[str, torch.Tensor]]]:
    """The mappings that hold parameters; networks among a model's settings only where there are no others."""
    listed = list(candidates(content, (), set()))
    return [(path, mapping) for path, mapping in listed if not SETTINGS & {*path}] or listed


def candidates(
    content: Any, path: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], Mapping[str, torch.Tensor]]]:
    """The mappings in `content` that hold parameters, with their paths."""
    if len(path) > MAX_DEPTH or id(content) in seen:
        return
    seen.add(id(content))
    if isinstance(content, Inert) and content.kind.startswith("torch.nn.modules.loss."):
        return  # the weights of classes
    is_object = isinstance(content, Inert) and not is_module(content)
    containers = (Mapping, list, tuple, Inert)
    if isinstance(content, (list, tuple)):
        content = {index: value for index, value in enumerate(content) if isinstance(value, containers)}
    content = as_mapping(content)
    if not isinstance(content, Mapping) or is_optimizer(content):
        return
    nested = []
    for name, value in content.items():
        if isinstance(value, containers) and "optim" not in str(name).lower():
            nested += candidates(value, (*path, str(name)), seen)
    own = {n: v for n, v in content.items() if isinstance(v, torch.Tensor) and v.is_floating_point() and v.numel()}
    # Scalars (a loss, a scale) and loose tensors beside a state dict are not parameters; dotted names are.
    if own and all(isinstance(name, str) for name in content):
        dotted = any("." in name or name in ("weight", "bias") for name in own)
        if dotted or (not nested and not is_object and any(value.dim() for value in own.values())):
            yield path, content
    yield from nested


def describe(source: object, path: tuple[str, ...], mapping: Mapping[str, Any]) -> str:
    """One candidate of an ambiguous checkpoint: the reference to give, and what it holds."""
    tensors = {name: value for name, value in mapping.items() if isinstance(value, torch.Tensor)}
    size = f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} entries"
    shapes = ", ".join(f"{shorten(name, 40)} {list(t.shape)}" for name, t in list(tensors.items())[:2])
    key = ".".join(path)
    named = f"key={key!r}" if str(source).startswith("<") else str(Reference(str(source), key=key))
    return f"{named} ({size}: {shapes})"


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
            if isinstance(tensor, StoredOtherwise):
                advice = "Dequantize or densify it first (`.dequantize()`, `.to_dense()`, `.full_tensor()`)"
                raise CheckpointError(source, f"tensor {shorten(name)} is stored as {tensor.kind[:60]}", advice)
            if isinstance(tensor, Array) and tensor.is_numbers:
                reason = f"tensor {shorten(name)} is an array of NumPy that torch has no dtype for, or is damaged"
                raise CheckpointError(source, reason, "Save it as float32")
            is_packed = isinstance(tensor, Inert) or ("." in name and isinstance(tensor, (list, tuple)))
            if is_packed and not name.endswith("_extra_state") and holds_tensors(tensor):
                inner = tensor[0] if isinstance(tensor, (list, tuple)) else None
                what = inner.kind if isinstance(inner, StoredOtherwise) else f"tensors into a {in_words(tensor)}"
                reason = f"entry {shorten(name)} packs {what[:60]}"
                raise CheckpointError(source, reason, "Save the model before it was quantized or packed")
            continue
        if tensor.is_quantized or tensor.layout is not torch.strided or tensor.is_nested:
            kind = str(tensor.dtype if tensor.is_quantized else tensor.layout).removeprefix("torch.")
            advice = "Dequantize or densify it first (`.dequantize()`, `.to_dense()`)"
            raise CheckpointError(source, f"tensor {shorten(name)} is stored as {kind}", advice)
        if tensor.device.type == "meta":
            advice = "Load the weights first, then pass the model"
            raise CheckpointError(source, f"tensor {shorten(name)} is on the meta device and holds no data", advice)
        span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        shown, stored = (count * tensor.element_size() for count in (tensor.numel(), span))
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
