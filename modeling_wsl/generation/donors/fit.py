"""A resized network fitted to its donor in closed form, on unlabeled images or tokens of the donor's domain.

One pass through the target: at every map (a convolution or matrix) the inputs that it really gets are at hand; a
ridge regression from there to the outputs of the donor's map replaces its weights, and the pass goes on with the new
ones. The last map of a residual branch is fitted at the sum, to the donor's stream after the last of the blocks that
the block stands for: other depth and all earlier errors are made up for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from ..batch_norm import model_inputs, tracked_norms
from .resize import Transfer
from .trace import Add, Event, EventMode, Map, operation_name, plain_operations


MAX_ROWS = 12_000  # rows of one regression
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # by the mean square of the inputs
# Without batch norms, which take any scale, weights far from the donor's fit the outputs and train worse: a ViT of
# 64 from donors of 96 ended at 37.2 % with these, at 34.1 with the others, at 37.5 by weight selection.
STIFF_RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
HELD_OUT = 0.25  # the share of the examples that a ridge is chosen on
MAX_OUTPUTS = 8192  # of a map that is fitted: vocabularies are left as they are
DONOR_BATCH = 128
NORM_EPS = 1e-5  # of batch norms, torch's default


@dataclass(frozen=True)
class Rows:
    """Which positions of which example a regression takes, alike for both networks.

    Args:
        examples: how many there are.
        seed: of the choice.
        first: example of this pass.
        total: examples of all passes.
    """

    examples: int
    seed: int
    first: int = 0
    total: int | None = None

    def of(self, positions: int) -> tuple[Tensor, Tensor]:
        """(example, position) of the rows, int64 `[n]` each, where every example has so many positions."""
        total = self.total or self.examples
        count = min(max(MAX_ROWS // total, 1), positions)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + positions)
        chosen = torch.rand(total, positions, generator=generator).topk(count, dim=1).indices
        chosen = chosen[self.first : self.first + self.examples].sort(1).values
        return torch.arange(self.examples).repeat_interleave(count), chosen.reshape(-1)

    def held_out(self, positions: int) -> Tensor:
        """Which of the rows are of the held-out examples, bool `[n]`."""
        return self.of(positions)[0] >= self.examples - int(self.examples * HELD_OUT)

    def take(self, value: Tensor, axis: int) -> Tensor | None:
        """Rows `[n, channels]` of a tensor with channels on `axis` (from the end); None: no examples along it."""
        value = value.movedim(axis, -1)
        if value[..., 0].numel() % self.examples:
            return None
        value = value.reshape(self.examples, -1, value.shape[-1])
        return value[self.of(value.shape[1])]


class DonorOutputs(EventMode):
    """Rows of what the donor's maps and sums give.

    Args:
        wanted: events -> the axis of their channels, from the end.
    """

    def __init__(self, wanted: Mapping[Event, int], seed: int) -> None:
        super().__init__()
        self.wanted, self.seed = wanted, seed
        self.rows: Rows | None = None
        self.found: dict[Event, list[Tensor]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        event = self.event(operation_name(function), args)
        output = function(*args, **(kwargs or {}))
        if event in self.wanted and (rows := self.rows.take(output, self.wanted[event])) is not None:
            self.found.setdefault(event, []).append(rows.clone())
        return output

    @torch.no_grad()
    def run(self, donor: nn.Module, inputs: Any) -> dict[Event, Tensor]:
        """Event -> float32 `[n, channels]` over all examples, which pass in batches."""
        total = num_examples(inputs)
        donor.eval()
        for first in range(0, total, DONOR_BATCH):
            batch = select_examples(inputs, slice(first, first + DONOR_BATCH))
            arguments, keywords = model_inputs(batch, torch.device("cpu"))
            self.rows = Rows(num_examples(batch), self.seed, first, total)
            self.counts.clear()
            with plain_operations(), self:
                donor(*arguments, **keywords)
        return {event: torch.cat(parts).float() for event, parts in self.found.items()}


@dataclass(frozen=True)
class FitPlan:
    """What is fitted to what.

    Attributes:
        maps: event of the target's map -> event of the donor's.
        sums: event of the target's sum -> event of the donor's.
        held_back: event of a map -> event of the sum at which it is fitted.
    """

    maps: dict[Event, Event]
    sums: dict[Event, Event]
    held_back: dict[Event, Event]


def plan_fit(transfer: Transfer) -> FitPlan:
    """Pairs the maps and sums of two networks by the tensors that they use."""
    target, donor, pairing = transfer.target.trace, transfer.donor.trace, transfer.pairing
    theirs = {one.weight: one for one in donor.maps}
    by_event = {one.event: one for one in target.maps}
    times = [one.weight for one in target.maps]
    maps = {}
    for one in target.maps:
        partner = theirs.get(pairing.tensors.get(one.weight))
        usable = one.simple and partner is not None and one.weight not in pairing.extra | transfer.tied
        outputs = transfer.target.trace.axes[one.weight][1 if one.transposed else 0]
        if usable and times.count(one.weight) == 1 and len(outputs) <= MAX_OUTPUTS:
            maps[one.event] = partner.event
    donor_sums = {add.map: add for add in donor.adds if add.map is not None}
    last: dict[str, Add] = {}
    for add in target.adds:
        if add.map in maps and (block := pairing.block_of(by_event[add.map].weight)):
            last[block] = add
    sums = {}
    for block, add in last.items():
        weight = by_event[add.map].weight
        partner = theirs.get(pairing.tensors[weight].replace(pairing.blocks[block], pairing.ends[block], 1))
        if partner is not None and partner.event in donor_sums:
            sums[add.event] = donor_sums[partner.event].event
    for add in target.adds:  # in front of the last one of a block, where the donor has as many
        if add.map in maps and add.event not in sums and maps[add.map] in donor_sums:
            block = pairing.block_of(by_event[add.map].weight)
            if block is None or pairing.blocks[block] == pairing.ends[block]:
                sums[add.event] = donor_sums[maps[add.map]].event
    held_back = {add.map: add.event for add in target.adds if add.event in sums}
    return FitPlan(maps, sums, held_back)


class FittingPass(EventMode):
    """The one pass of a target in which its maps are fitted.

    Args:
        target: changed in place.
        transfer, plan: of the two networks.
        wanted: what the donor gave, see `DonorOutputs.run`.
        rows: of the regressions.

    Attributes:
        fitted: weight -> (rows, ridge, relative error of the held-out rows before and after).
    """

    def __init__(
        self,
        target: nn.Module,
        transfer: Transfer,
        plan: FitPlan,
        wanted: Mapping[Event, Tensor],
        rows: Rows,
        progress: Any,
    ) -> None:
        super().__init__()
        self.tensors = target.state_dict(keep_vars=True)
        self.transfer, self.plan, self.wanted, self.rows, self.progress = transfer, plan, wanted, rows, progress
        trace = transfer.target.trace
        self.maps: dict[Event, Map] = {one.event: one for one in trace.maps}
        self.sums: dict[Event, Add] = {one.event: one for one in trace.adds}
        self.ridges = RIDGES if tracked_norms(target) else STIFF_RIDGES
        self.fitted: dict[str, dict[str, float]] = {}
        self.tapes: dict[Event, list[tuple[Any, Any, Any, Any]]] = {}
        self.inputs: dict[Event, Tensor] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation_name(function)
        event = self.event(name, args)
        if event in self.plan.maps and event not in self.plan.held_back:
            self.fit_map(event, name, args)
        if event in self.plan.sums and (add := self.sums[event]).map in self.tapes:
            args = self.fit_sum(event, add, args, kwargs)
        output = function(*args, **kwargs)
        for tape in self.tapes.values():
            tape.append((function, args, kwargs, output))
        if event in self.plan.held_back:
            self.tapes[event] = [(function, args, kwargs, output)]
        return output

    # ------------------------------------------------------------------ what is fitted

    def fit_map(self, event: Event, name: str, args: Any) -> None:
        """To the outputs of the donor's map."""
        one = self.maps[event]
        inputs, target = self.patches(name, args), self.outputs(event, one)
        if inputs is None or target is None or len(inputs[0]) != len(target):
            return
        weight, bias = self.matrix(one)
        offset = bias is not None or event in self.transfer.target.trace.normalized  # a batch norm takes the mean off
        weight, bias = self.solve(one, inputs, target, weight, bias, offset)
        self.write(one, weight, bias)

    def outputs(self, event: Event, one: Map) -> Tensor | None:
        rows = self.wanted.get(self.plan.maps[event])
        return None if rows is None else self.transfer.outputs(one.weight, 1 if one.transposed else 0, rows)

    def fit_sum(self, event: Event, add: Add, args: Any, kwargs: Any) -> Any:
        """The last map of the branch, to the donor's stream; returns the operands with the new branch."""
        tape, one = self.tapes.pop(add.map), self.maps[add.map]
        function, map_args, _, output = tape[0]
        name = operation_name(function)
        stream = self.wanted.get(self.plan.sums[event])
        inputs = self.patches(name, map_args)
        base = self.rows.take(args[1 - add.branch], add.axis)
        branch = self.rows.take(args[add.branch], add.axis)
        given = self.rows.take(output, -3 if name == "convolution" else -1)
        target = None if stream is None else self.transfer.outputs(one.weight, 1 if one.transposed else 0, stream)
        parts = (inputs, base, branch, given, target)
        if any(part is None for part in parts) or len({len(inputs[0]), *map(len, parts[1:])}) != 1:
            return args
        if kwargs.get("alpha", 1) != 1:
            return args
        weight, bias = self.matrix(one)
        target = target - base
        scale, shift, norm = self.affine(add, output)
        if scale is None or not torch.allclose(
            given * scale + shift, branch, rtol=1e-3, atol=1e-3 * float(branch.std())
        ):
            return args  # something else lies between: rows in another order, an activation
        if norm is not None:  # the norm's affine map is part of what is fitted; a norm of batches takes any scale
            weight, own = weight * scale[:, None], shift + (0 if bias is None else bias * scale)
            weight, own = self.solve(one, inputs, target, weight, own, True)
            raw = inputs[0] @ weight.T
            self.tensors[norm[0]].copy_((raw.var(0, unbiased=False) + NORM_EPS).sqrt())
            self.tensors[norm[1]].copy_(own + raw.mean(0))
            self.write(one, weight, None if bias is None else torch.zeros_like(own))
        else:
            safe = torch.where(scale.abs() < 1e-3, torch.full_like(scale, 1e-3), scale)
            weight, bias = self.solve(one, inputs, (target - shift) / safe, weight, bias, bias is not None)
            self.write(one, weight, bias)
        new = list(args)
        new[add.branch] = replay(tape, args[add.branch])
        if args[0] is not new[0]:  # in place, the sum must be the same tensor
            args[0].copy_(new[0])
            new[0] = args[0]
        return tuple(new)

    def affine(self, add: Add, output: Tensor) -> tuple[Tensor | None, Tensor, tuple[str, ...] | None]:
        """(scale, shift, names of the batch norm) of what lies between a map and its sum; scale None: not affine."""
        channels = output.movedim(1, -1).flatten(0, -2) if output.dim() > 2 else output  # [n, channels]
        scale, shift, norm = torch.ones(channels.shape[1]), torch.zeros(channels.shape[1]), None
        for kind, names in add.after:
            if kind == "scale" and len(names) == 1:
                factor = self.tensors[names[0]].detach().reshape(-1)
                if len(factor) not in (1, len(scale)):
                    return None, shift, None
                scale, shift = scale * factor, shift * factor
            elif kind == "norm" and len(names) == 4 and len(add.after) == 1:
                norm = names
                weight, bias = (self.tensors[name].detach() for name in names[:2])
                scale = weight / (channels.var(0, unbiased=False) + NORM_EPS).sqrt()
                shift = bias - channels.mean(0) * scale
            else:
                return None, shift, None
        return scale, shift, norm

    # ------------------------------------------------------------------ regressions

    def patches(self, name: str, args: Any) -> tuple[Tensor, Tensor] | None:
        """(inputs of a map as rows `[n, in]`, which of them are held out)."""
        if name == "convolution":
            x, weight, stride, padding, dilation = args[0], args[1], args[3], args[4], args[5]
            height, width = (
                (x.shape[2 + axis] + 2 * padding[axis] - dilation[axis] * (weight.shape[2 + axis] - 1) - 1)
                // stride[axis]
                + 1
                for axis in (0, 1)
            )
            example, position = self.rows.of(height * width)
            if x.shape[0] != self.rows.examples:
                return None
            padded = functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
            down = (position // width * stride[0])[:, None] + torch.arange(weight.shape[2]) * dilation[0]
            right = (position % width * stride[1])[:, None] + torch.arange(weight.shape[3]) * dilation[1]
            taken = padded.permute(0, 2, 3, 1)[example[:, None, None], down[:, :, None], right[:, None, :]]
            return taken.permute(0, 3, 1, 2).flatten(1), self.rows.held_out(height * width)
        x = args[1] if name in ("addmm", "baddbmm") else args[0]
        rows = self.rows.take(x, -1)
        return None if rows is None else (rows, self.rows.held_out(x[..., 0].numel() // self.rows.examples))

    def matrix(self, one: Map) -> tuple[Tensor, Tensor | None]:
        """(weight `[out, in]`, bias) of a map."""
        weight = self.tensors[one.weight].detach()
        weight = weight.T if one.transposed else weight.flatten(1)
        return weight, None if one.bias is None else self.tensors[one.bias].detach()

    def write(self, one: Map, weight: Tensor, bias: Tensor | None) -> None:
        own = self.tensors[one.weight]
        own.copy_((weight.T if one.transposed else weight).reshape(own.shape))
        if bias is not None and one.bias is not None:
            self.tensors[one.bias].copy_(bias)

    def solve(
        self,
        one: Map,
        inputs: tuple[Tensor, Tensor],
        target: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        offset: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Ridge regression towards `target` from where the map is; its strength is chosen on the held-out rows."""
        self.progress.update()
        rows, held_out = inputs
        mean = rows.mean(0) if offset else torch.zeros(rows.shape[1])
        rows = rows - mean
        residual = target - rows @ weight.T
        start = residual.mean(0) if offset else torch.zeros(len(weight))
        residual = residual - start
        change, facts = ridge(rows, residual, held_out, self.ridges)
        self.fitted[one.weight] = facts
        weight = weight + change
        return weight, start - weight @ mean if offset and bias is not None else bias


def ridge(
    rows: Tensor, target: Tensor, held_out: Tensor, ridges: Sequence[float] = RIDGES
) -> tuple[Tensor, dict[str, float]]:
    """(coefficients `[out, in]`, facts) of a ridge regression without an offset.

    Args:
        rows: float32 `[n, in]`.
        target: float32 `[n, out]`.
        held_out: bool `[n]`, the rows on which the strength is chosen; the regression itself takes all.
        ridges: strengths to choose from, by the mean square of the inputs.
    """
    kind = torch.float64 if rows.shape[1] <= 1024 else torch.float32
    x, y = rows.to(kind), target.to(kind)
    train = ~held_out
    gram, cross = x[train].T @ x[train], x[train].T @ y[train]  # [in, in], [in, out]
    size = float(gram.diagonal().mean())
    before = float(y[held_out].square().sum())
    best = (before, None, None)
    strengths = ridges if rows.shape[1] <= 1024 else ridges[1::2]
    for strength in strengths if held_out.any() else (0.03,):
        solution = _solved(gram, cross, strength * size)
        error = float((y[held_out] - x[held_out] @ solution).square().sum()) if held_out.any() else -1.0
        if error < best[0] or not held_out.any():
            best = (error, strength, solution)
    facts = {"rows": len(rows), "ridge": best[1], "error_before": before**0.5, "error_after": max(best[0], 0.0) ** 0.5}
    if best[1] is None:  # nothing helps on the held-out rows
        return torch.zeros(target.shape[1], rows.shape[1]), facts
    gram, cross = gram + x[held_out].T @ x[held_out], cross + x[held_out].T @ y[held_out]
    return _solved(gram, cross, best[1] * float(gram.diagonal().mean())).T.float(), facts


def _solved(gram: Tensor, cross: Tensor, strength: float) -> Tensor:
    regularized = gram + strength * torch.eye(len(gram), dtype=gram.dtype)
    factor, failed = torch.linalg.cholesky_ex(regularized)
    return torch.linalg.lstsq(regularized, cross).solution if failed else torch.cholesky_solve(cross, factor)


def replay(tape: list[tuple[Any, Any, Any, Any]], wanted: Tensor) -> Tensor:
    """Runs the operations of a tape again that depend on its first one; returns what stands for `wanted`."""
    new: dict[int, Any] = {}

    def current(value: Any) -> Any:
        if isinstance(value, Tensor):
            return new.get(id(value), value)
        return type(value)(map(current, value)) if isinstance(value, list | tuple) else value

    for place, (function, args, kwargs, output) in enumerate(tape):
        changed = tuple(map(current, args))
        if place == 0 or any(a is not b for a, b in zip(_flat(changed), _flat(args), strict=True)):
            again = function(*changed, **kwargs)
            for old, one in zip(_flat([output]), _flat([again]), strict=True):
                if isinstance(old, Tensor):
                    new[id(old)] = one
    return new[id(wanted)]


def _flat(values: Any) -> list[Any]:
    return [part for value in values for part in (_flat(value) if isinstance(value, list | tuple) else [value])]


def num_examples(inputs: Any) -> int:
    """Of images `[N, ...]`, or of a mapping of keyword arguments."""
    return len(inputs) if isinstance(inputs, Tensor) else len(next(iter(inputs.values())))


def select_examples(inputs: Any, chosen: Any) -> Any:
    """Some of the examples."""
    if isinstance(inputs, Tensor):
        return inputs[chosen]
    return {name: value[chosen] for name, value in inputs.items()}


@torch.no_grad()
def fit_network(
    target: nn.Module, donor: nn.Module, transfer: Transfer, inputs: Any, donor_inputs: Any, seed: int, progress: bool
) -> dict[str, dict[str, float]]:
    """Fits a resized target to its donor.

    Args:
        target: holds the resized weights; changed in place.
        donor: left as it is, in eval mode.
        transfer: of the two networks.
        inputs: images `[N, C, H, W]` or a mapping of token batches, for the target.
        donor_inputs: the same ones as the donor takes them.
        seed: of the positions that regressions take.
        progress: show a progress bar.

    Returns:
        weight of every fitted map -> rows, ridge, errors of the held-out rows before and after.
    """
    plan, trace = plan_fit(transfer), transfer.donor.trace
    axes = {event: -3 if event[0] == "convolution" else -1 for event in plan.maps.values()}
    axes |= {add.event: add.axis for add in trace.adds if add.event in plan.sums.values()}
    wanted = DonorOutputs(axes, seed).run(donor, donor_inputs)
    arguments, keywords = model_inputs(inputs, torch.device("cpu"))
    modes = {child: child.training for child in target.modules()}
    target.eval()
    for norm in tracked_norms(target).values():
        norm.train()  # every map gets inputs normalized as they are now
    with tqdm(total=len(plan.maps), desc="Fitting", disable=not progress) as bar:
        fitting = FittingPass(target, transfer, plan, wanted, Rows(num_examples(inputs), seed), bar)
        with plain_operations(), fitting:
            target(*arguments, **keywords)
    for child, mode in modes.items():
        child.training = mode
    return fitting.fitted
