"""The layers of a network as matrices `[out, in, k]` with their vectors, planned from names and shapes alone."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from ..tokens.manifest import TensorSpec, split_name


# Roles of a layer's vectors, by the names that torch, Keras and TensorFlow give them.
ROLES = ("bias", "gamma", "beta", "mean", "var")
_ROLE_OF = {
    "running_mean": "mean",
    "moving_mean": "mean",
    "running_var": "var",
    "moving_variance": "var",
    "moving_var": "var",
    "gamma": "gamma",
    "beta": "beta",
}
_COUNTER = "num_batches_tracked"  # some frameworks store it as a float
_PACKED = re.compile(r"(^|[._])(qkv|in_proj|c_attn|Wqkv)([._]|$)")  # query, key and value, one below the other
_CONV1D = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)\.weight$")  # GPT-2's linear maps are [in, out]
_HOMES = 3  # a vector belongs to one of so many layers before it
MAX_ENTRIES = 1 << 22  # of a layer that statistics look at; of a larger one they see so many, in rows drawn at random


@dataclass(frozen=True)
class LayerPlan:
    """A layer before any weight is read.

    Attributes:
        name: of its matrix.
        shape: `(out, in, k)`.
        space: height and width of the k taps.
        axes: order of the stored axes that brings outputs first and inputs second.
        part: which part of how many, of query, key and value in one matrix.
        is_depthwise: each output has one input of its own.
        vectors: role -> name of a tensor.
    """

    name: str
    shape: tuple[int, int, int]
    space: tuple[int, int]
    axes: tuple[int, ...]
    part: tuple[int, int] = (0, 1)
    is_depthwise: bool = False
    vectors: dict[str, str] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class NetworkLayer:
    """A layer whose weights can be read.

    Attributes:
        plan: its names and shapes.
        weight: float32 `[rows, in, k]`: all outputs, or some drawn at random where there are more than `MAX_ENTRIES`
            entries.
        vectors: role -> float32 `[n]`.
        respond: inputs float32 `[in * k, n]` -> responses `[out, n]` of all outputs.
    """

    plan: LayerPlan
    weight: Tensor
    vectors: Mapping[str, Tensor]
    respond: Callable[[Tensor], Tensor]

    @property
    def is_complete(self) -> bool:
        return len(self.weight) == self.plan.shape[0]


def plan_layers(specs: Iterable[TensorSpec]) -> list[LayerPlan]:
    """Groups the tensors of a network into layers: a matrix (two dimensions or more), and the vectors after it.

    A module's matrix goes before its vectors, also where a file is sorted by name. A batch norm belongs to the layer
    before it. Vectors without a layer of their length are left out.

    Args:
        specs: in state-dict order.
    """
    known = [s for s in specs if s.torch_dtype.is_floating_point and s.shape and s.numel and not _is_counter(s.name)]
    first: dict[str, int] = {}
    for index, spec in enumerate(known):
        first.setdefault(split_name(spec.name)[0], index)
    known.sort(key=lambda spec: (first[split_name(spec.name)[0]], len(spec.shape) == 1))
    plans: list[LayerPlan] = []
    for index, spec in enumerate(known):
        if len(spec.shape) > 1:
            following = known[index + 1] if index + 1 < len(known) else None
            plans += _plan_matrix(spec, following)
        elif home := _home_of(spec, plans[-_HOMES:]):
            role = _role_of(spec.name, home.vectors)
            for plan in plans[-_HOMES:]:
                if plan.name == home.name:  # the parts of one matrix share their vectors
                    plan.vectors.setdefault(role, spec.name)
    return plans


def _is_counter(name: str) -> bool:
    return split_name(name)[1] == _COUNTER


def _plan_matrix(spec: TensorSpec, following: TensorSpec | None) -> list[LayerPlan]:
    shape, leaf = spec.shape, split_name(spec.name)[1].lower()
    rank = len(shape)
    bias = following.numel if following is not None and len(following.shape) == 1 else None
    same_module = following is not None and split_name(following.name)[0] == split_name(spec.name)[0]
    if leaf.endswith(("kernel", "filter", "filters")):
        output_last = True
    elif rank == 2:
        tells = bias is not None and (same_module or not leaf.startswith("weight"))
        output_last = bool(_CONV1D.search(spec.name)) or (tells and bias == shape[1] != shape[0])
    else:
        # only Keras and TensorFlow put the taps first; torch's transposed convolutions are [in, out, ...]
        output_last = not leaf.startswith("weight") and rank == 4 and max(shape[:2]) < max(shape[2:])
    if output_last and rank > 2:
        taps = tuple(range(rank - 2))
        is_depthwise = leaf.startswith("depth") and shape[-1] == 1 < shape[-2]
        axes = (rank - 2, rank - 1, *taps) if is_depthwise else (rank - 1, rank - 2, *taps)
    elif output_last or (rank > 2 and same_module and bias == shape[1] != shape[0]):
        axes, is_depthwise = (1, 0, *range(2, rank)), False
    else:
        axes = tuple(range(rank))
        is_depthwise = rank > 2 and shape[1] == 1 < shape[0] and prod(shape[2:]) > 1
    out, into, *space = (shape[axis] for axis in axes)
    height = space[0] if len(space) > 1 else 1
    layout = (height, prod(space) // height)
    parts = 3 if rank == 2 and out == 3 * into and _PACKED.search(spec.name) else 1
    one_part = (out // parts, into, prod(space))
    return [LayerPlan(spec.name, one_part, layout, axes, (i, parts), is_depthwise) for i in range(parts)]


def _home_of(spec: TensorSpec, before: list[LayerPlan]) -> LayerPlan | None:
    """The nearest layer before with that many outputs, else with that many inputs."""
    for axis in (0, 1):
        for plan in reversed(before):
            if spec.numel in (plan.shape[axis], plan.shape[0] * plan.part[1]):
                return plan
    return None


def _role_of(name: str, taken: Mapping[str, str]) -> str:
    leaf = split_name(name)[1].lower()
    role = _ROLE_OF.get(leaf)
    if role is None and (leaf.startswith(("bias", "b_")) or leaf == "b"):
        role = "beta" if "gamma" in taken else "bias"
    elif role is None and (leaf.startswith("weight") or leaf == "scale"):
        role = "gamma"
    elif role is None:
        role = "bias"
    return "beta" if role == "bias" and role in taken else role


def read_layers(plans: Iterable[LayerPlan], read: Callable[[str], Tensor]) -> Iterator[NetworkLayer]:
    """Reads one layer after the other; memory is that of one layer's sample.

    Args:
        plans: see `plan_layers`.
        read: name -> tensor; a view on a mapped file costs what is looked at.
    """
    for plan in plans:
        stored = read(plan.name).permute(plan.axes)
        part, parts = plan.part
        outputs = len(stored) // parts
        stored = stored[part * outputs : (part + 1) * outputs]
        rows = max(1, MAX_ENTRIES // max(1, prod(plan.shape[1:])))
        sample = stored
        if outputs > rows:
            generator = torch.Generator().manual_seed(outputs)
            sample = stored[torch.randperm(outputs, generator=generator)[:rows].sort().values]
        vectors = {role: _plain(read(name)) for role, name in sorted(plan.vectors.items())}
        if parts > 1:
            vectors = {role: v.chunk(parts)[part] if len(v) == outputs * parts else v for role, v in vectors.items()}
        yield NetworkLayer(plan, _rows_of(sample, plan), vectors, _responses(stored, plan, rows))


def _plain(tensor: Tensor) -> Tensor:
    values = tensor.detach().to(torch.float32)
    return values if torch.isfinite(values.sum()) else values.nan_to_num(0.0, 0.0, 0.0)


def _rows_of(stored: Tensor, plan: LayerPlan) -> Tensor:
    return _plain(stored).reshape(len(stored), plan.shape[1], plan.shape[2])


def _responses(stored: Tensor, plan: LayerPlan, rows: int) -> Callable[[Tensor], Tensor]:
    def respond(inputs: Tensor) -> Tensor:
        return torch.cat([_rows_of(part, plan).flatten(1) @ inputs for part in stored.split(rows)])

    return respond
