"""Whole models through a backbone, which sees windows: haloed encoding and decoding (paper, appendix B.2.2).

A model has far more tokens than a backbone sees at once. It is cut into core windows; each is processed together with
`halo` tokens of context on both sides, which are dropped from the result. Rows are shifted inwards at both ends of the
sequence, so that all rows of a sequence have the same length, every token in them is real, and no attention mask is
needed. Which row a token's result comes from is computed from the token's index alone, for any length.

Latents that do not come out of the network (`WindowCode.in_context`) need none of this: their windows are cut without
context and encoded as they are.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, islice

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils.logging import is_progress_bar_enabled

from .inference import (
    autocast_type,
    batch_sizes,
    inference_backbone,
    num_workers,
    rows_per_pass,
    run_in_order,
)


STREAM_WINDOW = 4096  # tokens in a piece of a model that is read


@dataclass(frozen=True)
class HaloedWindows:
    """The rows that a sequence of `num_tokens` tokens is processed in, and the tokens of each row that are kept.

    Core window i is tokens `[i * window_size, (i + 1) * window_size)`; its row holds `halo` more on both sides. A row
    that would begin before the sequence or end after it is shifted inwards. A last core window of at most `halo`
    tokens would get the same row as the one before it; the two are one window here.

    Raises:
        ValueError: a window without tokens or a negative halo.
    """

    num_tokens: int
    window_size: int = 512
    halo: int = 64

    def __post_init__(self):
        if self.window_size < 1:
            raise ValueError(f"window_size is {self.window_size}; a window holds at least one token.")
        if self.halo < 0:
            raise ValueError(f"halo is {self.halo}; give 0 for windows without context, or a positive number.")

    @property
    def row_length(self) -> int:
        """Tokens in every row, halo included."""
        return min(self.num_tokens, self.window_size + 2 * self.halo)

    def __len__(self) -> int:
        if self.num_tokens <= self.window_size + 2 * self.halo:
            return min(self.num_tokens, 1)
        return -(-(self.num_tokens - self.halo) // self.window_size)

    def row_start(self, index: int) -> int:
        """The first token of a row."""
        return min(max(index * self.window_size - self.halo, 0), self.num_tokens - self.row_length)

    def core(self, index: int) -> tuple[int, int]:
        """The tokens `[start, stop)` whose results are taken from this row."""
        last = index == len(self) - 1
        return index * self.window_size, self.num_tokens if last else (index + 1) * self.window_size


def encode_stream(
    model: PreTrainedModel,
    chunks: Iterable[Mapping[str, Tensor]],
    num_tokens: int,
    *,
    window_size: int = 512,
    halo: int = 64,
    batch_size: int = 8,
    autocast_dtype: torch.dtype | str | None = None,
    progress: bool = False,
    features: bool = False,
) -> Iterator[tuple[int, Tensor]]:
    """Encodes a sequence that arrives in pieces, in the memory of one piece and of the batches that are worked on.

    Args:
        model: a backbone with `encode`.
        chunks: consecutive pieces with `tokens` `[n, d_t]`, `token_mask` `[n, d_t]` and `positions` `[n, 3]`, such as
            `WSLFeatureExtractor.stream` yields.
        num_tokens: of all pieces together.
        window_size, halo: see `HaloedWindows`.
        batch_size: rows per forward pass, at most. On a CPU each of torch's threads has a pass of its own.
        autocast_dtype: run the backbone under autocast to this type ("bfloat16").
        progress: show a progress bar, unless transformers' switch turns them off.
        features: give what embeddings pool (`WSLModel.token_features`) instead of what `decode_haloed` takes. The two
            differ where latents do not come out of the network; these need no halo and no batches.

    Yields:
        (index of the first token, latents `[n, latent_size]` float32 on the model's device, or on the CPU where they
        do not come out of the network), in order, without gaps.

    Raises:
        ValueError: the pieces hold more or fewer than `num_tokens` tokens.
    """
    if not (features or model.code.in_context):
        workers = min(torch.get_num_threads(), -(-num_tokens // window_size))

        def encode_alone(window: tuple[int, dict[str, Tensor]]) -> tuple[int, Tensor]:
            start, fields = window
            return start, model.encode(**{name: value[None] for name, value in fields.items()})[0].float().cpu()

        with _progress_bar(num_tokens, "Encoding", progress, unit="token") as bar:
            windows = cut_windows(chunks, num_tokens, window_size)
            for start, latents in run_in_order(encode_alone, windows, workers, threads=1):
                yield start, latents
                bar.update(len(latents))
        return
    windows = HaloedWindows(num_tokens, window_size, halo)
    rows = haloed_rows(chunks, windows)
    model, autocast_dtype = inference_backbone(model, autocast_dtype)
    method = model.token_features if features else model.encode
    workers = num_workers(model, len(windows))
    most = rows_per_pass(model, windows.row_length, batch_size)

    def batches() -> Iterator[list[tuple[int, dict[str, Tensor]]]]:
        for size in batch_sizes(len(windows), most, workers):
            yield list(islice(rows, size))
        yield from rows  # none is left, or the pieces are refused here

    def encode(batch: list[tuple[int, dict[str, Tensor]]]) -> tuple[range, Tensor]:
        indices = range(batch[0][0], batch[-1][0] + 1)
        fields = {name: torch.stack([row[name] for _, row in batch]) for name in batch[0][1]}
        outputs = run_batch(model, method, fields, autocast_dtype)
        latents = outputs.new_empty(_num_tokens(windows, indices), outputs.shape[-1], dtype=torch.float32)
        _keep_cores(outputs, latents, windows, indices)
        return indices, latents

    with _progress_bar(len(windows), "Encoding", progress) as bar:
        for indices, latents in run_in_order(encode, batches(), workers):
            yield windows.core(indices[0])[0], latents
            bar.update(len(indices))


def cut_windows(
    chunks: Iterable[Mapping[str, Tensor]], num_tokens: int, window_size: int
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Cuts a sequence that arrives in pieces into windows without a halo, the last one as long as what is left.

    Args:
        chunks: see `encode_stream`. Where a piece has the `manifest` and `token_start` that
            `WSLFeatureExtractor.stream` gives, windows have `row_sizes` too.
        num_tokens: of all pieces together.
        window_size: tokens per window.

    Yields:
        (index of the first token, `tokens`, `token_mask`, `positions` and `row_sizes`, each `[n, ...]`), in order.

    Raises:
        ValueError: the pieces hold more or fewer than `num_tokens` tokens.
    """
    held: dict[str, Tensor] = {}
    start = stop = 0
    for chunk in chunks:
        fields = {name: chunk[name] for name in ("tokens", "token_mask", "positions") if chunk.get(name) is not None}
        count = len(fields["tokens"])
        if chunk.get("manifest") is not None:
            first = int(chunk["positions"][0, 0])
            fields["row_sizes"] = chunk["manifest"].row_sizes(first, first + count)
        stop += count
        held = {name: torch.cat([held[name], value]) if held else value for name, value in fields.items()}
        while stop - start >= window_size or (stop == num_tokens and start < stop):
            length = min(window_size, stop - start)
            yield start, {name: value[:length] for name, value in held.items()}
            held = {name: value[length:] for name, value in held.items()}
            start += length
    if stop != num_tokens:
        raise ValueError(
            f"The pieces hold {stop} tokens, num_tokens says {num_tokens}. Pass the number of tokens of the whole "
            "sequence (manifest.num_tokens)."
        )


def haloed_rows(
    chunks: Iterable[Mapping[str, Tensor]], windows: HaloedWindows
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Cuts a sequence that arrives in pieces into rows, in the memory of one piece and what is taken from here.

    Args:
        chunks: see `encode_stream`.
        windows: of the whole sequence.

    Yields:
        (index of the row, its `tokens`, `token_mask` and `positions`, each `[row_length, ...]`), in order.

    Raises:
        ValueError: the pieces hold more or fewer than `windows.num_tokens` tokens.
    """
    num_tokens = windows.num_tokens
    held: dict[str, Tensor] = {}
    held_start = held_stop = index = 0
    for chunk in chunks:
        fields = {name: chunk[name] for name in ("tokens", "token_mask", "positions") if chunk.get(name) is not None}
        held_stop += len(fields["tokens"])
        if held_stop > num_tokens:
            break
        held = {name: torch.cat([held[name], value]) if held else value for name, value in fields.items()}
        while index < len(windows) and windows.row_start(index) + windows.row_length <= held_stop:
            start = windows.row_start(index) - held_start
            yield index, {name: value[start : start + windows.row_length] for name, value in held.items()}
            index += 1
        if index < len(windows):  # what lies before the next row is not needed again
            drop = windows.row_start(index) - held_start
            held = {name: value[drop:] for name, value in held.items()}
            held_start += drop
    if held_stop != num_tokens:
        raise ValueError(
            f"The pieces hold {'at least ' if held_stop > num_tokens else ''}{held_stop} tokens, num_tokens says "
            f"{num_tokens}. Pass the number of tokens of the whole sequence (manifest.num_tokens)."
        )


def decode_haloed(
    model: PreTrainedModel,
    latents: Tensor,
    positions: Tensor,
    window_size: int = 512,
    halo: int = 64,
    batch_size: int = 8,
    autocast_dtype: torch.dtype | str | None = None,
    progress: bool = False,
) -> Tensor:
    """Decodes the latents of a whole model of any length, window by window (paper, appendix B.2.2).

    Args:
        model: a backbone with `decode`.
        latents: `[T, latent_size]`.
        positions: `[T, 3]` int64.
        window_size, halo, batch_size, autocast_dtype, progress: see `encode_stream`.

    Returns:
        tokens `[T, d_t]` float32, on the device of the latents.
    """
    _check_positions(positions, len(latents))
    windows = HaloedWindows(len(latents), window_size, halo)
    model, autocast_dtype = inference_backbone(model, autocast_dtype)
    with torch.inference_mode(False):  # threads that write to it are not in the caller's inference mode
        tokens = torch.empty(len(latents), model.config.token_size, dtype=torch.float32, device=latents.device)
    workers = num_workers(model, len(windows))
    most = rows_per_pass(model, windows.row_length, batch_size)
    ends = [0, *accumulate(batch_sizes(len(windows), most, workers))]
    inputs, method = model.code.decoding(model, latents, positions)

    def decode(rows: range) -> int:
        batch = {name: _rows(sequence, windows, rows) for name, sequence in inputs.items()}
        outputs = run_batch(model, method, batch, autocast_dtype)
        start = windows.core(rows[0])[0]
        _keep_cores(outputs, tokens[start : start + _num_tokens(windows, rows)], windows, rows)
        return len(rows)

    with _progress_bar(len(windows), "Decoding", progress) as bar:
        for num_rows in run_in_order(decode, map(range, ends, ends[1:]), workers):
            bar.update(num_rows)
    return tokens


def run_batch(
    model: PreTrainedModel, method: Callable, batch: Mapping[str, Tensor], autocast_dtype: torch.dtype | str | None
) -> Tensor:
    """`encode` or `decode` of a batch on the model's device, without gradients: `[rows, row_length, width]`."""
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    dtype = autocast_type(autocast_dtype)
    with torch.no_grad(), torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
        return method(**inputs)


def _rows(sequence: Tensor, windows: HaloedWindows, rows: range) -> Tensor:
    """`[rows, row_length, ...]`."""
    starts = [windows.row_start(row) for row in rows]
    return torch.stack([sequence[start : start + windows.row_length] for start in starts])


def _num_tokens(windows: HaloedWindows, rows: range) -> int:
    """Tokens in the cores of consecutive rows."""
    return windows.core(rows[-1])[1] - windows.core(rows[0])[0]


def _keep_cores(outputs: Tensor, out: Tensor, windows: HaloedWindows, rows: range) -> None:
    """Writes the core of each row of `outputs` `[rows, row_length, width]` into `out` `[tokens, width]`."""
    first = windows.core(rows[0])[0]
    for output, row in zip(outputs, rows, strict=True):
        start, stop = windows.core(row)
        offset = windows.row_start(row)
        out[start - first : stop - first] = output[start - offset : stop - offset]


def _check_positions(positions: Tensor, num_tokens: int) -> None:
    if tuple(positions.shape) != (num_tokens, 3):
        raise ValueError(
            f"positions have shape {tuple(positions.shape)}, expected {(num_tokens, 3)}: [n, l, k] of every token."
        )


def _progress_bar(total: int, description: str, progress: bool, unit: str = "window") -> tqdm:
    hidden = not progress or not is_progress_bar_enabled()
    return tqdm(total=total, desc=description, unit=unit, leave=False, disable=hidden)
