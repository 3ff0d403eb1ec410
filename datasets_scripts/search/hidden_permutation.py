"""Copies of a network that compute the same with their hidden neurons in another order."""

import re
from collections.abc import Iterator, Mapping

import torch

from modeling_wsl.tokens.manifest import batch_norm_names


NUMBERED = re.compile(r"(?:(?P<prefix>.*)\.)?(?P<number>\d+)\.(?P<leaf>[A-Za-z_]\w*)")
Module = dict[str, str]  # leaf -> name of the tensor
Pair = tuple[Module | None, Module, list[Module], Module]  # layer before, layer, batch norms after it, next layer
PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")


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
            whole = state[before["weight"]].shape[0] if before else None  # what an ungrouped convolution takes in
            if not _keeps_function(state, layer, norms, following, whole, layer["weight"] == first):
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
