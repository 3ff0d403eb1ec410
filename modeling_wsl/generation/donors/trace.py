"""Which neurons the axes of a network's tensors stand for, seen in one forward pass.

Beside every tensor of the pass go whole numbers that name its neurons. What moves numbers (views, concatenations,
slices) moves them alike; a product unites the neurons that it sums over; arithmetic unites those that it joins. So
residual streams, heads, concatenations, groups, gates and tied weights are found without knowing any architecture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ..batch_norm import model_inputs


NONE = -1  # the number of an entry that is no neuron, such as a channel of padding
MOVES = frozenset(
    """view _unsafe_view view_copy _reshape_alias _reshape_copy reshape permute transpose t expand squeeze unsqueeze
    slice select split split_with_sizes chunk unbind cat stack roll flip clone alias detach index index_select gather
    repeat repeat_interleave constant_pad_nd pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle
    unfold im2col copy narrow diagonal movedim lift_fresh contiguous as_strided tile swapaxes slice_scatter""".split()  # noqa: SIM905
)
REDUCTIONS = frozenset(
    "mean sum amax amin max min var std var_mean linalg_vector_norm norm argmax all any".split()  # noqa: SIM905
)
PRODUCTS = frozenset(["mm", "addmm", "bmm", "baddbmm"])
NORMS = {
    # name: places of weight, bias, running mean and variance among the arguments
    "native_batch_norm": (1, 2, 3, 4),
    "_native_batch_norm_legit": (1, 2, 3, 4),
    "_native_batch_norm_legit_no_training": (1, 2, 3, 4),
    "cudnn_batch_norm": (1, 2, 3, 4),
    "native_group_norm": (1, 2),
    "native_layer_norm": (2, 3),
    "_fused_rms_norm": (2,),
}
BATCH_NORMS = frozenset(name for name in NORMS if "batch_norm" in name)
COUNTED = frozenset(["convolution", "add", "embedding", *PRODUCTS])

Event = tuple[str, int]  # an operation and how often it was called before, among floating-point tensors


def operation_name(function: Any) -> str:
    """`add` of `aten.add_.Tensor`."""
    name = function.overloadpacket.__name__
    return name.rstrip("_") if not name.startswith("_") or name.endswith("_") else name


class EventMode(TorchDispatchMode):
    """Counts the operations of a forward pass, so that another pass can name them again."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def event(self, name: str, arguments: Sequence[Any]) -> Event | None:
        """Of an operation that is about to run, where it is one of those that are counted."""
        first = next((value for value in arguments if isinstance(value, Tensor)), None)
        if name not in COUNTED or first is None or not first.is_floating_point():
            return None
        self.counts[name] += 1
        return name, self.counts[name] - 1


@contextmanager
def plain_operations():
    """Attention by products, and no fused encoder layers: what a pass is made of is seen."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@dataclass(frozen=True)
class Map:
    """A product of activations with a parameter.

    Attributes:
        event: the operation.
        weight, bias: names; the bias may lack.
        transposed: the weight is stored [in, out] (transformers' Conv1D), not [out, in].
        before: the parameters of a norm whose result the map takes, where one comes right before it.
        simple: a matrix or an ungrouped convolution used as it is stored: it can be fitted in closed form.
    """

    event: Event
    weight: str
    bias: str | None
    transposed: bool
    simple: bool
    before: tuple[str, ...] = ()


@dataclass(frozen=True)
class Add:
    """A residual sum: a branch that ends in a map joins the stream.

    Attributes:
        event: the operation.
        branch: which of the two operands the branch is.
        axis: of the channels in the sum, counted from the end.
        map: the event of the branch's last map; None: it has none.
        after: what lies between that map and the sum: ("norm" | "scale", names of its parameters).
        last: the names of the last parameters of the branch; with zeros there it adds nothing.
    """

    event: Event
    branch: int
    axis: int
    map: Event | None
    after: tuple[tuple[str, tuple[str, ...]], ...]
    last: tuple[str, ...]


@dataclass
class Trace:
    """What a forward pass shows of a network.

    Attributes:
        axes: tensor name -> for each axis the numbers of its entries, int64 `[size]`; united ones differ still.
        edges: pairs of numbers that are one neuron, int64 `[n, 2]` each.
        members: pairs (number of a head or group, number of a neuron in it).
        reading: (tensor, axis) that products sum over: repeated neurons share what they hold.
        groups: name of a grouped convolution's weight -> the input's numbers `[in]`, number of groups.
        queries: numbers of what enters a product of two activations from the left.
        outputs: numbers of the network's outputs.
        maps, adds: in the order of their use.
        normalized: event of a map -> the parameters of the batch norm right after it.
        embeddings: names of weights whose rows are looked up.
        positions: those of them that are looked up in their order, by position.
        order: tensor names in the order of their first use.
        count: of numbers.
    """

    axes: dict[str, list[Tensor]] = field(default_factory=dict)
    edges: list[Tensor] = field(default_factory=list)
    members: list[Tensor] = field(default_factory=list)
    reading: set[tuple[str, int]] = field(default_factory=set)
    groups: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    queries: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    maps: list[Map] = field(default_factory=list)
    adds: list[Add] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    normalized: dict[Event, tuple[str, ...]] = field(default_factory=dict)
    embeddings: list[str] = field(default_factory=list)
    positions: set[str] = field(default_factory=set)
    count: int = 0


def trace_network(module: nn.Module, inputs: Any) -> Trace:
    """Runs a module once, in eval mode and without gradients, and follows its neurons.

    Args:
        module: left as it was; on the CPU.
        inputs: what it takes, as `model_inputs` reads it; one or two examples are enough.

    Raises:
        ValueError: the module cannot be run on these inputs; the message has the module's own error.
    """
    modes = {child: child.training for child in module.modules()}
    arguments, keywords = model_inputs(inputs, torch.device("cpu"))
    module.eval()
    tracer = _Tracer(module)
    try:
        with torch.no_grad(), plain_operations(), tracer:
            output = module(*arguments, **keywords)
    except Exception as error:
        raise ValueError(
            f"{type(module).__name__} could not be run on {_shapes(arguments, keywords)} ({type(error).__name__}: "
            f"{error}). Give images or token batches that it takes."
        ) from error
    finally:
        for child, mode in modes.items():
            child.training = mode
    for value in tree_flatten(output if not hasattr(output, "to_tuple") else output.to_tuple())[0]:
        if isinstance(value, Tensor):
            tracer.trace.outputs += [ids.flatten().long() for ids in tracer.ids(value)]
            break  # the first is the logits, also of transformers' outputs
    return tracer.trace


def _shapes(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> str:
    shapes = [list(value.shape) for value in (*arguments, *keywords.values()) if isinstance(value, Tensor)]
    return f"inputs of shape {', '.join(map(str, shapes))}"


@dataclass
class _Value:
    """What is known of one tensor.

    Attributes:
        tensor: held, or another could get its `id`.
        ids: int32 tensors that broadcast against it, one for each kind of neurons that it has; size 1 where constant.
        names: of the parameters that it is made of alone; none for activations.
        map, after, last: see `Add`, of the operations that made it.
        depth: the number of maps on the longest way from the input.
    """

    tensor: Tensor
    ids: list[Tensor]
    names: tuple[str, ...] = ()
    map: Event | None = None
    after: tuple[tuple[str, tuple[str, ...]], ...] = ()
    last: tuple[str, ...] = ()
    depth: int = 0


class _Tracer(EventMode):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.trace = Trace()
        self.values: dict[int, _Value] = {}
        self.named: dict[int, str] = {}
        for name, value in module.state_dict(keep_vars=True).items():
            if value.is_floating_point():
                self.named.setdefault(id(value), name)

    # ------------------------------------------------------------------ numbers

    def fresh(self, count: int) -> Tensor:
        start = self.trace.count
        self.trace.count += count
        return torch.arange(start, start + count, dtype=torch.int32)

    def value(self, tensor: Any) -> _Value | None:
        if not isinstance(tensor, Tensor):
            return None
        if (known := self.values.get(id(tensor))) is not None:
            return known
        if (name := self.named.get(id(tensor))) is None:
            return None
        shape, ids = tensor.shape, []
        for axis, size in enumerate(shape):
            own = self.fresh(size)
            self.trace.axes.setdefault(name, []).append(own.long())
            if size > 1 or tensor.dim() == 1:
                ids.append(own.view([size if other == axis else 1 for other in range(len(shape))]))
        self.trace.axes.setdefault(name, [])
        self.trace.order.append(name)
        known = self.values[id(tensor)] = _Value(tensor, ids, (name,))
        return known

    def ids(self, tensor: Any) -> list[Tensor]:
        value = self.value(tensor)
        return [] if value is None else value.ids

    def set(self, tensor: Tensor, ids: list[Tensor], **facts: Any) -> None:
        if tensor.is_floating_point():
            self.values[id(tensor)] = _Value(tensor, [_compact(one) for one in ids], **facts)

    def unite(self, first: Tensor, second: Tensor) -> None:
        pairs = torch.stack([side.reshape(-1) for side in torch.broadcast_tensors(first, second)], 1).long()
        pairs = pairs[(pairs >= 0).all(1) & (pairs[:, 0] != pairs[:, 1])]
        if len(pairs):
            self.trace.edges.append(pairs.unique(dim=0))

    # ------------------------------------------------------------------ operations

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation_name(function)
        event = self.event(name, args)
        output = function(*args, **kwargs)
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        known = [value for tensor in tensors if (value := self.value(tensor)) is not None]
        if not known:
            return output
        depth = max(value.depth for value in known)  # now, for an operation in place replaces its input
        if name in MOVES:
            self.move(function, name, args, kwargs, output)
        elif name == "convolution":
            self.convolution(event, args, output)
        elif name in PRODUCTS:
            self.product(event, name, args, output)
        elif name == "embedding":
            self.embedding(event, args, output)
        elif name in NORMS:
            self.norm(name, args, output[0] if isinstance(output, tuple) else output)
        elif name in REDUCTIONS:
            self.reduce(args, kwargs, output)
        else:
            self.elementwise(event, name, tensors, output)
        depth += bool(self.trace.maps) and self.trace.maps[-1].event == event and event is not None
        for part in output if isinstance(output, list | tuple) else [output]:
            if isinstance(part, Tensor) and (value := self.values.get(id(part))) is not None:
                value.depth = depth
        return output

    def made_of(self, tensors: Sequence[Tensor]) -> tuple[str, ...]:
        """The names of parameters, where nothing but them (and constants) went in."""
        values = [value for tensor in tensors if (value := self.value(tensor)) is not None]
        if all(value.names for value in values):
            return tuple(dict.fromkeys(name for value in values for name in value.names))
        return ()

    def move(self, function: Any, name: str, args: Any, kwargs: Any, output: Any) -> None:
        several = isinstance(args[0], list | tuple)
        sources = list(args[0]) if several else [args[0]]
        values = [self.value(source) for source in sources]
        rest = args[1:]
        if name == "copy":
            sources, values, rest = [args[1]], [self.value(args[1])], ()
            function = lambda ids: ids.expand(args[0].shape)  # noqa: E731
        if name in ("view", "_unsafe_view", "view_copy", "_reshape_alias"):  # numbers are laid out otherwise
            function, rest = torch.ops.aten.reshape.default, (output.shape,)
        if name == "constant_pad_nd":
            rest = (args[1], NONE)
        if name == "slice_scatter":
            return
        outputs = list(output) if isinstance(output, list | tuple) else [output]
        moved: list[list[Tensor]] = [[] for _ in outputs]
        for place in range(max((len(value.ids) for value in values if value), default=0)):
            full = []
            for source, value in zip(sources, values, strict=True):
                if value is None or place >= len(value.ids):
                    full.append(torch.full((), NONE, dtype=torch.int32).expand(source.shape))
                else:
                    full.append(value.ids[place].expand(source.shape))
            result = function(full if several else full[0], *rest, **kwargs)
            for ids, part in zip(moved, result if isinstance(result, list | tuple) else [result], strict=True):
                ids.append(part.clone() if part.numel() < 2 else part)
        single = values[0] if len([value for value in values if value]) == 1 and values[0] else None
        facts = {"map": single.map, "after": single.after, "last": single.last} if single else {}
        for tensor, ids in zip(outputs, moved, strict=True):
            self.set(tensor, ids, names=self.made_of(sources), **facts)

    def convolution(self, event: Event, args: Any, output: Tensor) -> None:
        x, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
        w = self.value(weight)
        if w is None:
            return
        ones = [1] * (weight.dim() - 2)
        into, out = (0, 1) if transposed else (1, 0)
        rows = next((ids for ids in w.ids if ids.shape[out] > 1), None)
        columns = next((ids for ids in w.ids if ids.shape[into] > 1), None)
        if rows is None:  # one output channel
            rows = self.axis_ids(w, out)
        if columns is None:
            columns = self.axis_ids(w, into)
        read = next((ids for ids in self.ids(x) if ids.dim() == x.dim() and ids.shape[1] > 1 or x.shape[1] == 1), None)
        rows, columns = rows.reshape(-1), columns.reshape(-1)
        if len(rows) != weight.shape[out] or len(columns) != weight.shape[into]:
            return
        channels = None if read is None else read.amax(dim=[0, *range(2, read.dim())]).reshape(-1)
        name = w.names[0]
        if groups > 1 and channels is not None and len(channels) == x.shape[1]:
            if len(rows) == groups * 1 and weight.shape[1] == 1 and not transposed:
                self.unite(rows, channels)
            else:
                group = self.fresh(groups).repeat_interleave(len(rows) // groups)
                self.trace.members.append(torch.stack([group, rows], 1).long())
                group = group[:: len(rows) // groups].repeat_interleave(len(channels) // groups)
                self.trace.members.append(torch.stack([group, channels], 1).long())
            self.trace.groups[name] = (channels.long(), groups)
        elif groups == 1:
            self.trace.reading.add((name, into))
            if channels is not None and len(channels) == len(columns):
                self.unite(channels, columns)
        names = self.bias(bias, rows)
        simple = groups == 1 and not transposed and weight.dim() == 4 and self.named.get(id(weight)) == name
        self.trace.maps.append(Map(event, name, names[0] if names else None, bool(transposed), simple))
        self.set(output, [rows.view(1, -1, *ones)], map=event, last=(name, *names))

    def axis_ids(self, value: _Value, axis: int) -> Tensor:
        return self.trace.axes[value.names[0]][axis].int()

    def bias(self, bias: Tensor | None, rows: Tensor) -> tuple[str, ...]:
        value = self.value(bias)
        if value is None or not value.names:
            return ()
        for ids in value.ids:
            self.unite(ids.reshape(-1), rows.reshape(-1))
        return value.names

    def embedding(self, event: Event, args: Any, output: Tensor) -> None:
        w = self.value(args[0])
        if w is None or not w.names:
            return
        self.trace.embeddings.append(w.names[0])
        places = args[1].reshape(-1, args[1].shape[-1])[0] if args[1].dim() else args[1].reshape(1)
        if bool((places.diff() == 1).all()):
            self.trace.positions.add(w.names[0])
        columns = self.trace.axes[w.names[0]][1].int()
        self.set(output, [columns.view(*[1] * (output.dim() - 1), -1)], last=w.names)

    def product(self, event: Event, name: str, args: Any, output: Tensor) -> None:
        bias = args[0] if name in ("addmm", "baddbmm") else None
        left, right = args[1:3] if bias is not None else args[:2]
        a, b = self.value(left), self.value(right)
        contracted, kept = [], []
        for value, axis in ((a, -1), (b, -2)):
            ids = [] if value is None else value.ids
            contracted.append([one for one in ids if one.shape[axis] > 1])
            kept.append([one for one in ids if one.shape[axis] == 1])
        weights = [value for value in (a, b) if value is not None and value.names]
        for first, second in zip(contracted[0], contracted[1], strict=False):
            one, other = first.unsqueeze(-1), second.unsqueeze(-3)  # [.., M, K, 1], [.., 1, K, N]
            self.unite(one, other)
        batch = left.shape[0] if left.dim() == 3 else 1
        heads: list[Tensor] = []
        if not weights and contracted[0] and contracted[1]:  # queries and keys
            self.trace.queries.append(contracted[0][0].flatten().long())
            if batch > 1 and contracted[0][0].shape[0] > 1:
                head = self.fresh(batch).view(-1, 1, 1)
                for side in (contracted[0][0], contracted[1][0]):
                    self.belong(head, side)
                heads = [head]
        ids = [*kept[0], *kept[1], *heads]
        # The heads of scores meet the neurons of values: a head owns them, and is not carried further.
        wide = [one for one in ids if one.dim() == 3 and one.shape[0] > 1 and max(one.shape[1:]) > 1]
        if wide and not heads:
            for head in [one for one in kept[0] if one.dim() == 3 and one.shape[0] > 1 and max(one.shape[1:]) == 1]:
                self.belong(head, wide[0])
                ids = [one for one in ids if one is not head]
        facts: dict[str, Any] = {}
        if weights:
            w, tensor = (b, right) if b in weights else (a, left)
            weight = w.names[0]
            stored = self.trace.axes[weight]
            rows = next((one for one in w.ids if one.shape[-1 if w is b else -2] > 1), None)
            for into, axis in enumerate(stored):
                if any(bool(torch.isin(axis, one.flatten()).any()) for one in contracted[1 if w is b else 0]):
                    self.trace.reading.add((weight, into))
            names = self.bias(bias, rows) if bias is not None and rows is not None else ()
            transposed = bool(rows is not None and len(stored) > 1 and torch.isin(stored[1], rows.flatten()).any())
            whole = len(w.names) == 1 and len(stored) == 2 and tensor.numel() == stored[0].numel() * stored[1].numel()
            simple = whole and w is b and left.dim() == 2
            x = a if w is b else b
            before = x.last if x is not None and x.map is None else ()
            self.trace.maps.append(Map(event, weight, names[0] if names else None, transposed, simple, before))
            facts = {"map": event, "last": (weight, *names)}
        elif bias is not None:
            self.elementwise(None, name, [bias, output], output)
        self.set(output, ids, **facts)

    def belong(self, heads: Tensor, neurons: Tensor) -> None:
        pairs = torch.stack([side.reshape(-1) for side in torch.broadcast_tensors(heads, neurons)], 1).long()
        self.trace.members.append(pairs[(pairs >= 0).all(1)].unique(dim=0))

    def norm(self, name: str, args: Any, output: Tensor) -> None:
        x = self.value(args[0])
        layer = name in ("native_layer_norm", "_fused_rms_norm")
        names: list[str] = []
        for place in NORMS[name]:
            parameter = self.value(args[place]) if len(args) > place else None
            if parameter is None:
                continue
            names += parameter.names
            for own in parameter.ids:
                if layer or args[0].dim() < 2:
                    shaped = own.view(*[1] * (args[0].dim() - own.dim()), *own.shape)
                else:
                    shaped = own.view(1, -1, *[1] * (args[0].dim() - 2))
                for ids in [] if x is None else x.ids:
                    if _axes(ids) & _axes(shaped):
                        self.unite(ids, shaped)
        if x is None:
            return
        if name == "native_group_norm" and args[6] > 1:
            for ids in x.ids:
                if ids.shape[1] > 1:
                    flat = ids.amax(dim=[0, *range(2, ids.dim())]).reshape(-1)
                    group = self.fresh(args[6]).repeat_interleave(len(flat) // args[6])
                    self.trace.members.append(torch.stack([group, flat], 1).long())
        if x.map is not None and not x.after and name in BATCH_NORMS:
            self.trace.normalized[x.map] = tuple(names)
        after = (*x.after, ("norm" if name in BATCH_NORMS else "other", tuple(names)))
        own = tuple(names) if x.names else ()
        self.set(
            output, x.ids, map=x.map, after=after, last=tuple(names[:2]) or x.last, names=x.names and (x.names + own)
        )

    def reduce(self, args: Any, kwargs: Any, output: Any) -> None:
        x, value = args[0], self.value(args[0])
        tensor = output[0] if isinstance(output, tuple) else output
        if value is None or not isinstance(tensor, Tensor):
            return
        dims = kwargs.get("dim", args[1] if len(args) > 1 and isinstance(args[1], int | list | tuple) else None)
        if operation_takes_order(args):
            dims = args[2] if len(args) > 2 else None
        dims = range(x.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        dims = sorted({axis % x.dim() for axis in dims}) if x.dim() else []
        ids = []
        for one in value.ids:
            if all(one.shape[axis] == 1 for axis in dims):
                ids.append(one if tensor.dim() == x.dim() else one.squeeze(dims))
        for part in output if isinstance(output, tuple) else [output]:
            self.set(part, ids, names=value.names, map=value.map, after=(*value.after, ("other", ())), last=value.last)

    def elementwise(self, event: Event | None, name: str, tensors: Sequence[Tensor], output: Any) -> None:
        parts = output if isinstance(output, tuple | list) else [output]
        shaped = next((part for part in parts if isinstance(part, Tensor)), None)
        if shaped is None:
            return
        values = [value for tensor in tensors if (value := self.value(tensor)) is not None]
        values = list({id(value): value for value in values}.values())
        ids = self.joined(values, shaped)
        active = [value for value in values if not value.names]
        facts: dict[str, Any] = {"names": self.made_of(tensors)}
        if len(active) == 1:
            x, names = active[0], tuple(one for value in values for one in value.names)
            facts |= {"map": x.map, "after": x.after, "last": x.last}
            if names and name in ("mul", "add"):
                kind = "scale" if name == "mul" else "other"
                facts |= {"after": (*x.after, (kind, names)), "last": names if name == "mul" else x.last}
            elif name not in ("add", "to", "_to_copy", "dropout"):
                facts["after"] = (*x.after, ("other", ()))
        elif name == "add" and event is not None and len(active) == 2 and len(tensors) == 2:
            self.residual(event, [self.value(tensor) for tensor in tensors])
        for part in parts:
            if isinstance(part, Tensor) and part.shape == shaped.shape:
                self.set(part, ids, **facts)

    def joined(self, values: Sequence[_Value], output: Tensor) -> list[Tensor]:
        """The numbers of what arithmetic makes of several tensors, those of one neuron united."""
        ids: list[Tensor] = []
        active = any(not value.names for value in values)
        for value in sorted(values, key=lambda value: bool(value.names)):
            for own in value.ids:
                if own.dim() > output.dim():
                    continue
                own = own.view(*[1] * (output.dim() - own.dim()), *own.shape)
                if any(size not in (1, wanted) for size, wanted in zip(own.shape, output.shape, strict=True)):
                    continue  # its neurons do not reach the output
                matches = [place for place, one in enumerate(ids) if _axes(one) & _axes(own)]
                if not matches:
                    if not (active and value.names and ids):  # a parameter's other axes are no neurons
                        ids.append(own)
                    continue
                # the same axes, or else the last in common: channels come last where tokens have numbers too
                best = min(
                    matches, key=lambda place: (_axes(ids[place]) != _axes(own), -max(_axes(ids[place]) & _axes(own)))
                )
                if value.names and active and max(_axes(own)) < max(_axes(ids[best])):
                    continue
                self.unite(ids[best], own)
                first, second = torch.broadcast_tensors(ids[best], own)
                ids[best] = torch.where(first >= 0, first, second)
        return ids

    def residual(self, event: Event, operands: Sequence[_Value]) -> None:
        """The operand behind more maps is the branch; the other is the stream, or a projection of it."""
        depths = [value.depth for value in operands]
        if operands[0].tensor.shape != operands[1].tensor.shape or depths[0] == depths[1]:
            return
        branch = depths.index(max(depths))
        value = operands[branch]
        axes = _axes(value.ids[0]) if value.ids else set()
        if len(axes) == 1:
            axis = axes.pop() - value.tensor.dim()
            self.trace.adds.append(Add(event, branch, axis, value.map, value.after, value.last))


def operation_takes_order(args: Sequence[Any]) -> bool:
    """Of a norm: the order comes before the axes."""
    return len(args) > 2 and isinstance(args[1], int | float) and isinstance(args[2], list | tuple)


def _axes(ids: Tensor) -> set[int]:
    return {axis for axis, size in enumerate(ids.shape) if size > 1}


def _compact(ids: Tensor) -> Tensor:
    """Size 1 along every axis on which nothing varies."""
    for axis, size in enumerate(ids.shape):
        if size > 1 and (ids.stride(axis) == 0 or bool((ids == ids.narrow(axis, 0, 1)).all())):
            ids = ids.narrow(axis, 0, 1)
    return ids.contiguous()
