"""The make-up of every token of a model: the tensors, the layers they form, and the blocks that are cut into tokens.

A manifest is made from names, shapes and dtypes alone; no weight is read. It is all that `WSLFeatureExtractor.decode`
needs to turn tokens back into the tensors they came from, and it round-trips through JSON.
"""

import json
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import torch


# Wider than any of these, or packed (float4), would not survive the way through float32 or float64 tokens.
TOKENIZED_DTYPES = {
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
}
# A batch norm is recognized by its running mean, never by its name: the leaf names of torch and of Keras.
BATCH_NORM_STATISTICS = {
    "running_mean": ("running_mean", "running_var", "num_batches_tracked"),
    "moving_mean": ("moving_mean", "moving_variance"),
}
# Which tensor of the same layer is appended to the output rows of a weight (sparse tokens).
BIAS_OF = {"weight": "bias", "kernel": "bias", "gamma": "beta"}


def split_name(name: str) -> tuple[str, str]:
    """Splits a parameter name into module prefix and leaf: `blocks.0.attn.qkv.weight` or Keras' `conv/kernel`."""
    cut = max(name.rfind("."), name.rfind("/"))
    return (name[:cut], name[cut + 1 :]) if cut >= 0 else ("", name)


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype ("float32", "bfloat16", ...) of one tensor.

    Raises:
        ValueError: a dtype that torch does not have.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self):
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"Tensor {self.name!r} has dtype {self.dtype!r}, which torch does not know.")

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> "TensorSpec":
        return cls(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


@dataclass(frozen=True)
class LayerSpec:
    """The tokenized tensors that share a module prefix, and where their tokens lie in the model's sequence."""

    name: str
    tensors: tuple[TensorSpec, ...]
    first_token: int
    num_tokens: int


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one layer: the j-th of `length` tokens has k = `position` + j // `stride`."""

    layer: int
    position: int
    stride: int
    length: int


@dataclass(frozen=True)
class Block:
    """Tensors seen as matrices `[rows, width]`, put side by side; each row is cut into `row_tokens` tokens.

    Dense tokens: one block a layer, one row. Sparse tokens: one block a weight (with its bias as the last column).
    """

    layer: int
    tensors: tuple[TensorSpec, ...]
    rows: int
    row_entries: int
    row_tokens: int
    first_token: int
    first_row: int  # rows of the same layer's earlier blocks

    @property
    def num_tokens(self) -> int:
        return self.rows * self.row_tokens

    @property
    def end_token(self) -> int:
        return self.first_token + self.num_tokens


def positions_from_segments(token_start: int, segments: Sequence[Segment]) -> torch.Tensor:
    """Positions of consecutive tokens (paper, section 3.3).

    Args:
        token_start: n of the first token.
        segments: runs of tokens, in order, that follow each other without a gap.

    Returns:
        int64 `[tokens, 3]`, columns n (index in the model), l (layer index), k (index within the layer).
    """
    length = torch.tensor([s.length for s in segments], dtype=torch.int64)
    total = int(length.sum())
    positions = torch.empty(total, 3, dtype=torch.int64)
    index = torch.arange(total)
    positions[:, 0] = index + token_start
    if not segments:
        return positions

    def spread(values: list[int]) -> torch.Tensor:
        return torch.repeat_interleave(torch.tensor(values, dtype=torch.int64), length, output_size=total)

    positions[:, 1] = spread([s.layer for s in segments])
    first = length.cumsum(0) - length  # [segments], index of each segment's first token
    if all(s.stride == 1 for s in segments):
        positions[:, 2] = index + spread([s.position - f for s, f in zip(segments, first.tolist(), strict=True)])
    else:
        within = index - spread(first.tolist())
        positions[:, 2] = spread([s.position for s in segments]) + within // spread([s.stride for s in segments])
    return positions


def mask_from_valid_entries(valid_entries: torch.Tensor, token_size: int) -> torch.Tensor:
    """The boolean mask `[..., token_size]` of tokens whose first `valid_entries` `[...]` entries hold weights."""
    return torch.arange(token_size, device=valid_entries.device) < valid_entries[..., None]


@dataclass(frozen=True, repr=False)
class WeightManifest:
    """All that a token sequence is made of. Build one with `from_tensors`, or with `WSLFeatureExtractor.manifest`.

    Attributes:
        tokenization: "dense" (layers flattened) or "sparse" (output rows, the SANE baseline).
        token_size: d_t, entries per token.
        position_unit: k counts tokens ("token") or output rows ("row", sparse only: what fits SANE's 550 positions).
        layers: the tokenized tensors, grouped by module prefix, in state-dict order.
        carried: tensors that are not tokenized (integers, batch-norm running statistics, constants).
        tied: alias -> name of the tensor that it shares memory with; stored once.
        tensor_order: every name of the source, in state-dict order.
        stored_as: name -> how the source stores a weight that was dequantized ("gptq, 4 bits, groups of 128").
        layouts: name -> the axes with which `permute` gives a tensor the layout that its file has; without those that
            the file has as they are tokenized (`[out, in, ...]`).
        carried_values: the carried tensors themselves; in memory only, never part of the JSON.
    """

    tokenization: str
    token_size: int
    layers: tuple[LayerSpec, ...]
    carried: tuple[TensorSpec, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    tensor_order: tuple[str, ...] = ()
    position_unit: str = "token"
    layouts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    stored_as: Mapping[str, str] = field(default_factory=dict)
    carried_values: Mapping[str, torch.Tensor] | None = field(default=None, compare=False)

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, TensorSpec],
        tied: Mapping[str, str] | None = None,
        *,
        tokenization: str = "dense",
        token_size: int = 230,
        position_unit: str = "token",
        batch_norm_statistics: str = "carry",
        tensor_order: Sequence[str] | None = None,
        constants: Collection[str] = (),
        layouts: Mapping[str, tuple[int, ...]] | None = None,
        stored_as: Mapping[str, str] | None = None,
    ) -> "WeightManifest":
        """Lays out tensors, given in state-dict order, as tokens. Empty tensors are carried: they hold no entry.

        `tensor_order` says where the tied names stand among the others; by default they come last. `constants` names
        tensors that are not weights (causal masks), which are carried too.

        Raises:
            ValueError: an unknown tokenization, position unit or treatment of batch-norm statistics.
        """
        check_layout(tokenization, token_size, position_unit)
        check_choice("batch_norm_statistics", batch_norm_statistics, ("carry", "tokenize"))
        aside = {*constants, *(batch_norm_names(tensors) if batch_norm_statistics == "carry" else ())}
        groups: dict[str, list[TensorSpec]] = {}
        carried = []
        for name, spec in tensors.items():
            if spec.torch_dtype in TOKENIZED_DTYPES and name not in aside and spec.numel > 0:
                groups.setdefault(split_name(name)[0], []).append(spec)
            else:
                carried.append(spec)
        layers = lay_out_layers([(prefix, tuple(specs)) for prefix, specs in groups.items()], tokenization, token_size)
        return cls(
            tokenization=tokenization,
            token_size=token_size,
            layers=layers,
            carried=tuple(carried),
            tied=dict(tied or {}),
            tensor_order=tuple(tensor_order or (*tensors, *(tied or {}))),
            position_unit=position_unit,
            layouts=dict(layouts or {}),
            stored_as=dict(stored_as or {}),
        )

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(
            block
            for index, layer in enumerate(self.layers)
            for block in lay_out(layer.tensors, index, layer.first_token, self.tokenization, self.token_size)
        )

    @property
    def num_tokens(self) -> int:
        return self.layers[-1].first_token + self.layers[-1].num_tokens if self.layers else 0

    @property
    def num_parameters(self) -> int:
        """Tokenized entries; tied tensors count once, carried ones not at all."""
        return sum(spec.numel for layer in self.layers for spec in layer.tensors)

    @property
    def padding(self) -> float:
        """The fraction of all token entries that are padding."""
        return 1 - self.num_parameters / (self.num_tokens * self.token_size) if self.layers else 0.0

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the tokens: float32, which holds every narrower format exactly, or float64 where a tensor needs it."""
        wide = any(spec.dtype == "float64" for layer in self.layers for spec in layer.tensors)
        return torch.float64 if wide else torch.float32

    def __repr__(self) -> str:
        tokens = f"{self.num_tokens:,} {self.tokenization} tokens of {self.token_size}"
        return f"WeightManifest({len(self.layers)} layers, {self.num_parameters:,} parameters, {tokens})"

    def blocks_between(self, start: int, stop: int) -> list[Block]:
        """The blocks that tokens `[start, stop)` touch, in order."""
        first = max(bisect_right(self._block_starts, start) - 1, 0)
        last = bisect_right(self._block_starts, stop - 1)
        return [block for block in self.blocks[first:last] if block.num_tokens]

    @cached_property
    def _block_starts(self) -> list[int]:
        return [block.first_token for block in self.blocks]

    def valid_entries(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Int64 `[tokens]`: how many entries of each token `[start, stop)` hold a weight, always the first ones."""
        start, stop = self._range(start, stop)
        valid = torch.full((stop - start,), self.token_size, dtype=torch.int64)
        for block in self.blocks_between(start, stop):
            rest = block.row_entries - (block.row_tokens - 1) * self.token_size
            if rest < self.token_size:
                # The last token of each row is the padded one; `first` is the first of them at or after `start`.
                row = max(-(-(start - block.first_token + 1) // block.row_tokens), 1)
                first = block.first_token + row * block.row_tokens - 1
                valid[first - start : min(block.end_token, stop) - start : block.row_tokens] = rest
        return valid

    def token_mask(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Boolean `[tokens, d_t]`, true where a token holds a weight."""
        start, stop = self._range(start, stop)
        mask = torch.ones(stop - start, self.token_size, dtype=torch.bool)
        valid = self.valid_entries(start, stop)
        padded = (valid < self.token_size).nonzero().squeeze(1)
        mask[padded] = mask_from_valid_entries(valid[padded], self.token_size)
        return mask

    def segments(self, start: int = 0, stop: int | None = None) -> list[Segment]:
        """The layers (and output rows) of tokens `[start, stop)` as runs: all that positions follow from."""
        start, stop = self._range(start, stop)
        runs: list[Segment] = []
        for block in self.blocks_between(start, stop):
            first, last = max(start, block.first_token), min(stop, block.end_token)
            if self.position_unit == "token":
                k = first - self.layers[block.layer].first_token
                if runs and runs[-1].layer == block.layer:  # tokens of one layer follow each other across blocks
                    runs[-1] = Segment(block.layer, runs[-1].position, 1, runs[-1].length + last - first)
                else:
                    runs.append(Segment(block.layer, k, 1, last - first))
                continue
            row, within = divmod(first - block.first_token, block.row_tokens)
            if within:  # the window starts inside a row: the rest of that row is a run of its own
                length = min(block.row_tokens - within, last - first)
                runs.append(Segment(block.layer, block.first_row + row, block.row_tokens, length))
                first, row = first + length, row + 1
            if first < last:
                runs.append(Segment(block.layer, block.first_row + row, block.row_tokens, last - first))
        return runs

    def positions(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Int64 `[tokens, 3]`: [n, l, k] of tokens `[start, stop)` (paper, section 3.3)."""
        start, stop = self._range(start, stop)
        return positions_from_segments(start, self.segments(start, stop))

    def row_sizes(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Int64 `[tokens]`: the row size of the largest tensor of each token's layer, all sizes but the first."""
        start, stop = self._range(start, stop)
        sizes = torch.zeros(stop - start, dtype=torch.int64)
        for block in self.blocks_between(start, stop):
            largest = max(self.layers[block.layer].tensors, key=lambda spec: spec.numel)
            rows = largest.shape[0] if len(largest.shape) > 1 else 1
            sizes[max(block.first_token - start, 0) : block.end_token - start] = largest.numel // rows
        return sizes

    def _range(self, start: int, stop: int | None) -> tuple[int, int]:
        stop = self.num_tokens if stop is None else stop
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"Tokens [{start}, {stop}) lie outside of the {self.num_tokens} tokens of this manifest.")
        return start, stop

    def in_file_layout(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors that `decode` gives, with their axes as the file of another framework has them: views."""
        stored = {name: self.layouts.get(self.tied.get(name, name)) for name in state}
        return {name: state[name] if axes is None else state[name].permute(axes) for name, axes in stored.items()}

    def to_json(self) -> str:
        """The manifest as JSON; `carried_values` stay out of it."""
        record = {
            "tokenization": self.tokenization,
            "token_size": self.token_size,
            "position_unit": self.position_unit,
            "layers": [[layer.name, [[s.name, s.shape, s.dtype] for s in layer.tensors]] for layer in self.layers],
            "carried": [[s.name, s.shape, s.dtype] for s in self.carried],
            "tied": dict(self.tied),
            "tensor_order": self.tensor_order,
        }
        if self.layouts:
            record["layouts"] = dict(self.layouts)
        if self.stored_as:
            record["stored_as"] = dict(self.stored_as)
        return json.dumps(record, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "WeightManifest":
        """The manifest that `to_json` wrote.

        Raises:
            ValueError: the text is not such a manifest.
        """
        try:
            record = json.loads(text)
            check_layout(record["tokenization"], record["token_size"], record["position_unit"])
            specs = [(name, tuple(map(spec_of, rows))) for name, rows in record["layers"]]
            return cls(
                tokenization=record["tokenization"],
                token_size=record["token_size"],
                layers=lay_out_layers(specs, record["tokenization"], record["token_size"]),
                carried=tuple(map(spec_of, record["carried"])),
                tied=record["tied"],
                tensor_order=tuple(record["tensor_order"]),
                position_unit=record["position_unit"],
                layouts={name: tuple(axes) for name, axes in record.get("layouts", {}).items()},
                stored_as=dict(record.get("stored_as", {})),
            )
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"This is not a weight manifest written by WeightManifest.to_json: {error!r}.") from error


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises a ValueError that names the option, the value and the choices, unless the value is one of them."""
    if value not in choices:
        raise ValueError(f"{option}={value!r} is not known; choose one of {', '.join(map(repr, choices))}.")


def check_layout(tokenization: str, token_size: int, position_unit: str) -> None:
    """Raises a ValueError for settings that no token sequence can have."""
    check_choice("tokenization", tokenization, ("dense", "sparse"))
    check_choice("position_unit", position_unit, ("token", "row"))
    if tokenization == "dense" and position_unit == "row":
        raise ValueError("position_unit='row' needs tokenization='sparse': dense tokens have no output rows.")
    if token_size < 1:
        raise ValueError(f"token_size is {token_size}; it must be at least 1.")


def spec_of(row: list) -> TensorSpec:
    """The spec that JSON holds as [name, shape, dtype]."""
    name, shape, dtype = row
    return TensorSpec(name, tuple(shape), dtype)


def lay_out_layers(
    groups: Sequence[tuple[str, tuple[TensorSpec, ...]]], tokenization: str, token_size: int
) -> tuple[LayerSpec, ...]:
    """The layers of (module prefix, tensors) pairs, their tokens one after the other."""
    layers, first_token = [], 0
    for name, specs in groups:
        num_tokens = sum(b.num_tokens for b in lay_out(specs, len(layers), first_token, tokenization, token_size))
        layers.append(LayerSpec(name, specs, first_token, num_tokens))
        first_token += num_tokens
    return tuple(layers)


def batch_norm_names(tensors: Mapping[str, TensorSpec]) -> set[str]:
    """The running statistics (and their counter, whatever its dtype) of every batch norm among the tensors."""
    names = set()
    for name in tensors:
        prefix, leaf = split_name(name)
        for statistic in BATCH_NORM_STATISTICS.get(leaf, ()):
            sibling = name[: len(name) - len(leaf)] + statistic
            if sibling in tensors:
                names.add(sibling)
    return names


def lay_out(
    specs: tuple[TensorSpec, ...], layer: int, first_token: int, tokenization: str, token_size: int
) -> list[Block]:
    """The blocks of one layer (paper, section 3.3 and appendix B.2.1)."""
    if tokenization == "dense":
        groups = [(specs, 1, sum(spec.numel for spec in specs))]
    else:
        groups = [(group, *_rows(group)) for group in _weights_with_biases(specs)]
    blocks, first_row = [], 0
    for group, rows, row_entries in groups:
        row_tokens = -(-row_entries // token_size)
        blocks.append(Block(layer, group, rows, row_entries, row_tokens, first_token, first_row))
        first_token += rows * row_tokens
        first_row += rows
    return blocks


def _weights_with_biases(specs: tuple[TensorSpec, ...]) -> list[tuple[TensorSpec, ...]]:
    by_name = {spec.name: spec for spec in specs}
    bias_of: dict[str, TensorSpec] = {}
    for spec in specs:
        for weight_leaf, bias_leaf in BIAS_OF.items():
            prefix, leaf = split_name(spec.name)
            if not leaf.startswith(weight_leaf):  # `weight`, but also an RNN's `weight_ih_l0` with its `bias_ih_l0`
                continue
            bias = by_name.get(spec.name[: len(spec.name) - len(leaf)] + leaf.replace(weight_leaf, bias_leaf, 1))
            if bias is not None and spec.shape and bias.shape == spec.shape[:1]:
                bias_of[spec.name] = bias
    taken = {bias.name for bias in bias_of.values()}
    return [
        (spec, bias_of[spec.name]) if spec.name in bias_of else (spec,) for spec in specs if spec.name not in taken
    ]


def _rows(group: tuple[TensorSpec, ...]) -> tuple[int, int]:
    rows = group[0].shape[0] if group[0].shape else 1  # a 0-d scale is one row of one entry
    return rows, sum(spec.numel for spec in group) // rows
