"""Copies of models that one knows to be copies: to measure how well copies are found."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from datasets_scripts.search.weight_relations import open_source
from datasets_scripts.sources import ModelSource
from hf_wsl.files import sha256, write_json
from modeling_wsl.tokens.manifest import batch_norm_names


EXACT, CAST, PERMUTED, NOISE = "exact", "float16", "permuted", "noise"
NUMBERED = re.compile(r"(?:(?P<prefix>.*)\.)?(?P<number>\d+)\.(?P<leaf>[A-Za-z_]\w*)")
Module = dict[str, str]  # leaf -> name of the tensor
Pair = tuple[Module | None, Module, list[Module], Module]  # layer before, layer, batch norms after it, next layer
PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class PlantedCopy:
    """A copy that was written.

    Attributes:
        model_id: of the copy.
        original: model id.
        kind: "exact", "float16" (rounded to it), "permuted" (hidden neurons, by `permute_hidden`), or "noise 0.01"
            (Gaussian, as large relative to each tensor's standard deviation).
    """

    model_id: str
    original: str
    kind: str


def plant_copies(models: Sequence[ModelSource], folder: Path, noises: Sequence[float], seed: int) -> list[PlantedCopy]:
    """Writes copies of each model into folders of their own, one model in memory at a time.

    Args:
        models: the originals.
        folder: empty; gets the size of the models times the number of kinds.
        noises: relative sizes.
        seed: of noise and permutations. A model's copies do not depend on which others there are.

    Returns:
        The copies, in the order of the models. A kind that a model cannot have is left out: a permutation where
        nothing tells a hidden layer, rounding where it changes nothing or overflows.

    Raises:
        CheckpointError: a model cannot be read.
    """
    planted = []
    for model in models:
        with open_source(model) as checkpoint:
            state = {name: checkpoint.read(name) for name in checkpoint.tensors}
            for kind, tensors in copies_of(state, model.model_id, noises, seed):
                copy = PlantedCopy(f"copy-{len(planted):06d}", model.model_id, kind)
                place = folder / copy.model_id
                place.mkdir()
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place / "model.safetensors")
                write_json(place / "model.json", {"id": copy.model_id, "tensor_order": list(tensors)})
                planted.append(copy)
    return planted


def copies_of(
    state: Mapping[str, torch.Tensor], name: str, noises: Sequence[float], seed: int
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """(kind, state dict) of the copies that there can be of a model."""
    yield EXACT, dict(state)
    wide = {n for n, t in state.items() if t.is_floating_point() and t.element_size() > 2}
    half = {n: t.half().to(t.dtype) if n in wide else t for n, t in state.items()}
    if wide and all(half[n].isfinite().all() for n in wide):
        yield CAST, half
    statistics = batch_norm_names(state)
    for size in noises:
        kind = f"{NOISE} {size:g}"
        draw = _generator(seed, name, kind)
        noisy = {}
        for n, tensor in state.items():
            if tensor.is_floating_point() and n not in statistics:
                values = tensor.float()
                spread = values.std(correction=0)
                tensor = (values + size * spread * torch.randn(values.shape, generator=draw)).to(tensor.dtype)
            noisy[n] = tensor
        yield kind, noisy
    permuted = permute_hidden(state, _generator(seed, name, PERMUTED))
    if permuted is not None:
        yield PERMUTED, permuted


def _generator(seed: int, *names: str) -> torch.Generator:
    digest = sha256("\0".join([str(seed), *names]))
    return torch.Generator().manual_seed(int(digest[:16], 16) >> 1)


def permute_hidden(state: Mapping[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor] | None:
    """Permutes the hidden neurons of the chains of layers in a state dict, where that provably keeps the function.

    A chain is what `torch.nn.Sequential` names: linear layers, convolutions and batch norms with numbers under one
    prefix, in state-dict order. The output neurons of a layer are permuted, with its bias and the batch norms that
    follow, and the input of the next layer in the chain. Between the two there may be what has no weights
    (activations, pooling, dropout, flattening). Left alone is what could be something else: layers without a bias or
    batch norm, which tell the dimension of the outputs, convolutions that may be grouped or transposed, the last layer
    of a chain, and whatever is not numbered.

    Args:
        state: tensors in state-dict order.
        generator: of the permutations.

    Returns:
        A state dict in which all other tensors are the same objects; None if there is no such pair of layers.
    """
    chains: dict[str | None, dict[int, Module]] = {}
    for name in state:
        if match := NUMBERED.fullmatch(name):
            chains.setdefault(match["prefix"], {}).setdefault(int(match["number"]), {})[match["leaf"]] = name
    changed = dict(state)
    first = next(iter(state), None)
    for prefix, modules in chains.items():
        if _has_nested(state, prefix):
            continue
        for before, layer, norms, following in _pairs(state, modules):
            channels = state[before["weight"]].shape[0] if before else None  # of the input, where it has no groups
            if not _keeps_function(state, layer, norms, following, channels, layer["weight"] == first):
                continue
            order = torch.randperm(len(state[layer["weight"]]), generator=generator)
            tensors = [*layer.values(), *(norm[leaf] for norm in norms for leaf in PER_CHANNEL)]
            changed |= {name: changed[name][order] for name in tensors}
            changed[following["weight"]] = _permute_input(changed[following["weight"]], order)
    return changed if any(changed[name] is not state[name] for name in state) else None


def _has_nested(state: Mapping[str, torch.Tensor], prefix: str | None) -> bool:
    """Whether a numbered module holds further modules: residual blocks, whose order of use the names do not tell."""
    nested = re.compile((re.escape(prefix) + r"\." if prefix else "") + r"\d+\.\w+\..*")
    return any(nested.fullmatch(name) for name in state)


def _pairs(state: Mapping[str, torch.Tensor], modules: Mapping[int, Module]) -> Iterator[Pair]:
    """The pairs of a chain that follow each other; a module of another kind ends the chain."""
    statistics = batch_norm_names(state)
    before, layer, norms = None, None, []
    for number in sorted(modules):
        module = modules[number]
        leaves = set(module)
        if leaves >= set(PER_CHANNEL) and module["running_mean"] in statistics:
            norms = [*norms, module]
        elif {"weight"} <= leaves <= {"weight", "bias"} and state[module["weight"]].dim() > 1:
            if layer is not None:
                yield before, layer, norms, module
            before, layer, norms = layer, module, []
        else:
            before, layer, norms = None, None, []


def _keeps_function(
    state: Mapping[str, torch.Tensor],
    layer: Module,
    norms: list[Module],
    following: Module,
    channels: int | None,
    is_first: bool,
) -> bool:
    weight, after = state[layer["weight"]], state[following["weight"]]
    hidden = len(weight)
    of_hidden = [layer[leaf] for leaf in ("bias",) if leaf in layer] + [norm["weight"] for norm in norms]
    if not of_hidden or any(state[name].shape != (hidden,) for name in of_hidden):
        return False
    # An output of a grouped convolution reads the inputs of its own group only.
    if weight.dim() > 2 and not (weight.shape[1] == channels or is_first):
        return False
    # Transposed convolutions have input and output swapped; only where the two differ do the shapes tell.
    if any(matrix.dim() > 2 and matrix.shape[0] == matrix.shape[1] for matrix in (weight, after)):
        return False
    if weight.dim() > 2 and after.dim() == 2:
        return after.shape[1] % hidden == 0  # flattened, channels first
    return after.dim() == weight.dim() and after.shape[1] == hidden


def _permute_input(weight: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Permutes dimension 1 in as many equal groups as `order` has entries."""
    grouped = weight.reshape(len(weight), len(order), -1)
    return grouped[:, order].reshape(weight.shape)
