"""The canonical view: a model without accidents of spelling, for comparing, never for writing.

Wrappers' prefixes are off, old and new names of one thing are one, tied tensors are there once, constants and counters
are not. Experts are one matrix each, low-rank adapters their update of each base matrix, a weight norm's and a pruned
weight's factors the weight. The same network has the same view under any wrapper, in any container.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial

import torch

from ..tokens.manifest import TensorSpec
from .checkpoint import CHUNK_BYTES, Checkpoint, pieces
from .containers.container import Contents
from .identity.adapters import merge_adapters
from .identity.experts import module_of, order_key, split_experts
from .identity.part import Held, Part
from .identity.spelling import EMBEDDING, HEAD, HEAD_BIAS, is_counter, plain_names, tied_rank
from .order import natural_key


SAMPLED_ENTRIES = 256


def canonical(checkpoint: Checkpoint) -> Checkpoint:
    """The canonical view of an open checkpoint, itself a checkpoint: names in natural order, tensors read on demand.

    One tensor that is computed is in memory at a time; what is only named otherwise is read as it is.
    """
    parts, _ = _parts(checkpoint)
    return _view(checkpoint, parts, sorted(parts, key=lambda name: natural_key(order_key(name))))


def embedding_view(checkpoint: Checkpoint) -> Checkpoint:
    """The tensors that an embedding is of: the checkpoint itself, unless the same network is stored in several ways.

    Experts, weight norms and pruned weights are then as in `canonical`, low-rank adapters two factors of the stored
    size (`merge_adapters`), and all in the order of the file. What is stored in one way only embeds as it is.
    """
    parts, is_changed = _parts(checkpoint, balanced=True)
    if not is_changed:
        return checkpoint
    first: dict[str | None, int] = {}
    for name, part in parts.items():
        module = module_of(name)
        first[module] = min(first.get(module, part.place), part.place)

    def place(name: str) -> tuple:
        module = module_of(name)
        return (parts[name].place if module is None else first[module], natural_key(order_key(name)))

    return _view(checkpoint, parts, sorted(parts, key=place))


def canonical_sha256(checkpoint: Checkpoint) -> str:
    """SHA-256 of name, shape and values of every tensor of the canonical view.

    Values count, and not the dtype that holds them: a float16 file and the same numbers in float32 have one digest.
    """
    view = canonical(checkpoint)
    digest = hashlib.sha256()
    for name, spec in view.tensors.items():
        digest.update(f"{name}\0{','.join(map(str, spec.shape))}\0".encode())
        rest, is_exact = hashlib.sha256(), True
        for piece in pieces(view.read(name), CHUNK_BYTES):
            wide = widened(piece).contiguous()
            if wide.dtype == torch.float64:  # what float32 does not hold counts too, and only where there is any
                narrow = wide.float()
                lost = wide - narrow.double()
                is_exact = is_exact and not bool(lost.any())
                rest.update(lost.numpy())
                wide = narrow
            digest.update(wide.numpy())
        if not is_exact:
            digest.update(rest.digest())
    return digest.hexdigest()


def same_network(first: Checkpoint, second: Checkpoint) -> bool:
    """Whether two models have the same canonical view; ends at the first difference."""
    views = [canonical(checkpoint) for checkpoint in (first, second)]
    shapes = [{name: spec.shape for name, spec in view.tensors.items()} for view in views]
    return shapes[0] == shapes[1] and all(equal_values(*(view.read(name) for view in views)) for name in shapes[0])


def equal_values(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers, whatever their dtypes."""
    if first.dtype == second.dtype and first.is_contiguous() and second.is_contiguous():
        return all(map(torch.equal, *(map(widened, pieces(tensor, CHUNK_BYTES)) for tensor in (first, second))))
    for one, other in zip(first.reshape(-1).split(CHUNK_BYTES), second.reshape(-1).split(CHUNK_BYTES), strict=True):
        one, other = widened(one), widened(other)
        if not torch.equal(*((one.double(), other.double()) if one.dtype != other.dtype else (one, other))):
            return False
    return True


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """Entries as float32, float64 or int64, which hold those of every narrower dtype exactly."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj()).flatten()
    if tensor.dtype == torch.float4_e2m1fn_x2:
        tensor = tensor.view(torch.uint8)
    if not tensor.is_floating_point():
        return tensor.to(torch.int64)
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _view(checkpoint: Checkpoint, parts: dict[str, Part], order: list[str]) -> Checkpoint:
    contents = Contents(
        {name: parts[name].spec for name in order}, lambda name: parts[name].read(), close=checkpoint.close
    )
    return Checkpoint(
        checkpoint.source,
        contents,
        order,
        library=checkpoint.library,
        config=checkpoint.config,
        path=checkpoint.path,
        revision=checkpoint.revision,
        allow_nonfinite=checkpoint.allow_nonfinite,
    )


def _parts(checkpoint: Checkpoint, balanced: bool = False) -> tuple[dict[str, Part], bool]:
    """The tensors of the view by name, and whether some are not just named otherwise than the stored ones."""
    held, stored = Held(), _weights(checkpoint)
    config = checkpoint.config if checkpoint.library == "peft" else {}
    parts = merge_adapters(stored, config, held, balanced)
    plain = plain_names(parts)
    named = {plain[name]: part.renamed(plain[name]) for name, part in parts.items()}
    changed = split_experts(_unfactored(named, held), held)
    steps = ((stored, parts), (named, changed))
    return changed, any(after.get(name) is not part for before, after in steps for name, part in before.items())


def _weights(checkpoint: Checkpoint) -> dict[str, Part]:
    """The stored weights, tied ones once, under the name that says most."""
    names: dict[str, list[str]] = {name: [name] for name in checkpoint.tensors}
    for alias, name in checkpoint.tied.items():
        names[name].append(alias)
    parts = {}
    for place, (name, spec) in enumerate(checkpoint.tensors.items()):
        if name in checkpoint.constants or (spec.numel == 1 and is_counter(name)):
            continue
        best = min(names[name], key=tied_rank)
        parts[best] = Part(TensorSpec(best, spec.shape, spec.dtype), partial(checkpoint.read, name), place)
    for name in _second_copies(parts):
        del parts[name]
    return parts


def _second_copies(parts: dict[str, Part]) -> Iterator[str]:
    """The names of heads and embeddings that are stored again, though they are one with an embedding."""
    tables = sorted((name for name in parts if EMBEDDING.search(name)), key=tied_rank)
    dropped = set()
    for name, part in parts.items():
        kept = parts.get(HEAD_BIAS.sub(r"\1.bias", name), part)
        if kept is not part and kept.spec.shape == part.spec.shape and equal_values(part.read(), kept.read()):
            dropped.add(name)
    for name in [*(name for name in parts if HEAD.search(name)), *reversed(tables)]:
        shape = parts[name].spec.shape
        for table in tables:
            if table == name or table in dropped or name in dropped or parts[table].spec.shape != shape:
                continue
            if len(shape) == 2 and _same_table(parts[name].read(), parts[table].read()):
                dropped.add(name)
    yield from dropped


def _same_table(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tables are copies; tables of one number, as of models without training, are not told apart."""
    step = max(1, first.numel() // SAMPLED_ENTRIES)
    sample, other = (widened(table.reshape(-1)[::step]) for table in (first, second))
    varies = bool((sample != sample[0]).any())
    return varies and torch.equal(sample, other) and equal_values(first, second)


def _unfactored(parts: dict[str, Part], held: Held) -> dict[str, Part]:
    """Parts with the factors of weight norms (length and direction) and of pruned weights (mask) multiplied."""
    whole: dict[str, Part] = {}
    taken: set[str] = set()
    for name in parts:
        for ends, fits, product in (
            (("_v", "_g"), _are_weight_norm, _weight_norm),
            (("_orig", "_mask"), _alike, _masked),
        ):
            base = name.removesuffix(ends[0])
            pair = [parts.get(base + end) for end in ends]
            if base == name or base in parts or pair[1] is None or not fits(pair[0].spec, pair[1].spec):
                continue
            spec = TensorSpec(base, pair[0].spec.shape, "float32")
            read = partial(held.get, ("product", base), partial(_product, product, pair))
            whole[base] = Part(spec, read, min(part.place for part in pair))
            taken |= {base + end for end in ends}
    return {name: part for name, part in parts.items() if name not in taken} | whole


def _product(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], pair: list[Part]) -> torch.Tensor:
    """In float64, rounded to float32: the same for factors of any dtype that hold the same numbers."""
    first, second = (part.read().double() for part in pair)
    return product(first, second).float()


def _are_weight_norm(direction: TensorSpec, length: TensorSpec) -> bool:
    if length.numel == 1:
        return True
    sizes = [(one, all_) for one, all_ in zip(length.shape, direction.shape, strict=False) if one != 1]
    return len(length.shape) == len(direction.shape) and len(sizes) == 1 and sizes[0][0] == sizes[0][1]


def _alike(first: TensorSpec, second: TensorSpec) -> bool:
    return first.shape == second.shape


def _weight_norm(direction: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """As `torch.nn.utils.weight_norm` computes it."""
    over = [at for at in range(direction.dim()) if at >= length.dim() or length.shape[at] == 1]
    norm = torch.linalg.vector_norm(direction, dim=over, keepdim=True)
    return direction * (length.reshape([1 if at in over else -1 for at in range(direction.dim())]) / norm)


def _masked(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return weight * mask
