"""The matrix code: the numbers of a window are low-rank factors of its weight matrices (`latent_code="matrix"`).

Token by token, trained weights are nearly white noise; as matrices they are far from it. So the numbers of a window
are no vectors of single tokens here but one sequence that describes the window layer by layer. Each piece of a layer
is laid out as a matrix and approximated by one of lower rank, in a form without redundancy (`low_rank.Factors`): a
matrix [rows, width] of rank r has r (rows + width - r) degrees of freedom and takes as many numbers, and r indices.
What takes fewer numbers as it is is kept as it is. The ranks of a window's pieces are chosen together, so that the
error, of each token in units of its own standard deviation, is least for the numbers that there are.

The sequence, filled up with zeros to [tokens, latent_size]:

    number of tokens of the window
    of every piece: number of weights, index of the first one within its row, width, rank
        width 0, rank 0: the weights as they are
        width 0, rank 1: nothing more, the weights are 0
        else: pivots [rank], their rows [rank, long], combinations [short - rank, rank], weights outside of the matrix

It says itself where a window ends, so that the latents of a model may be decoded together.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from transformers import PreTrainedModel

from ..backbone.inference import run_in_order
from ..backbone.losses import masked_moments
from ..backbone.positions import default_positions
from ..backbone.window_inputs import attendable_tokens, check_inputs
from .code import CodedWindows, WindowCode
from .low_rank import Factors, Layout, Piece, Spectrum, allocate, best_spectrum, factorize, others


HEADER = 4  # number of weights, index of the first one within the layer modulo the width, width, rank
TINY = 1e-30
MAX_LENGTH = 2**24  # the integers that float32 holds
ADVICE = "Decode whole windows as `encode` gave them, in float32."
MIN_RELATIVE_STD = 1e-3  # a token's deviation counts as at least this share of the root mean square of its piece


class MatrixCodeError(ValueError):
    """Latents that are not the matrix code of whole windows."""


class MatrixCode(WindowCode):
    """Latents are the numbers of `encode_window` (`latent_code="matrix"`), and the network corrects what they give.

    Encoder and decoder come after the code is undone: the encoder reads the tokens that the factors give, the decoder
    its features beside those tokens. What embeddings pool are the encoder's features of the tokens themselves.
    """

    name = "matrix"
    by_token = False
    in_context = False
    starts_silent = True
    holds_statistics = False

    @property
    def decoder_size(self) -> int:
        """The decoder sees the tokens that it corrects beside the encoder's features."""
        return self.config.latent_size + self.config.token_size

    @property
    def summary(self) -> str:
        return (
            f"writes a window as {self.config.latent_size} numbers a token: low-rank factors of its weight matrices, "
            "for which nothing is learned, and which the network corrects"
        )

    def check_config(self) -> None:
        config = self.config
        if config.tokenization != "dense":
            raise ValueError(
                f'latent_code="matrix" needs tokenization="dense", got {config.tokenization!r}: matrices are found in '
                "weights that follow each other without padding."
            )
        if not config.token_standardization or config.linear_path:
            raise ValueError(
                'latent_code="matrix" needs token_standardization=True (what the factors give is corrected in units '
                "of each token's deviation) and linear_path=False (the factors take its place); got "
                f"{config.token_standardization} and {config.linear_path}."
            )

    @torch.compiler.disable  # one window at a time, on the CPU
    @torch.no_grad()
    def encode(
        self,
        model: PreTrainedModel,
        tokens: torch.Tensor,
        token_mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        row_sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The numbers of each window, float32; zeros for the tokens that are not attended to."""
        _check_token_level(attention_mask)
        if row_sizes is not None and row_sizes.shape != tokens.shape[:2]:
            raise ValueError(
                f"row_sizes must have shape {list(tokens.shape[:2])} ([batch, tokens]), got {list(row_sizes.shape)}. "
                "A single window needs its batch dimension: row_sizes[None]."
            )
        if positions is None:
            positions = default_positions(1, tokens.shape[1])
        attended = attendable_tokens(token_mask, attention_mask)
        fields = [tokens, token_mask, positions.expand(len(tokens), -1, -1), attended, row_sizes]
        fields = [None if field is None else field.cpu() for field in fields]
        latents = torch.zeros(*tokens.shape[:2], self.config.latent_size, dtype=torch.float32, device="cpu")

        def encode_row(row: int) -> tuple[int, Any, torch.Tensor]:
            window, mask, places, kept, sizes = (None if field is None else field[row] for field in fields)
            kept = slice(None) if kept is None else kept.bool().nonzero().squeeze(1)
            window, mask, places, sizes = (
                None if part is None else part[kept] for part in (window, mask, places, sizes)
            )
            empty = latents.new_zeros(0, latents.shape[-1])
            numbers = encode_window(window, mask, places, latents.shape[-1], sizes) if len(window) else empty
            return row, kept, numbers

        for row, kept, numbers in _in_parallel(encode_row, range(len(latents))):
            latents[row, kept] = numbers
        return latents.to(tokens.device)

    def decode(
        self,
        model: PreTrainedModel,
        latents: torch.Tensor,
        positions: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `WSLModel.decode`; raises MatrixCodeError for latents that are not those of whole windows."""
        return self.refine(model, *self.undo(latents, attention_mask), positions, attention_mask)

    @torch.compiler.disable
    def undo(
        self, latents: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first half of `decode`: the tokens that the factors give.

        Latents [batch, tokens, latent_size] -> float32 [batch, tokens, token_size], and bool of that shape, true where
        an entry is a weight. Without `attention_mask`, padding within a window is not told from its numbers.
        """
        _check_token_level(attention_mask)
        shape = (*latents.shape[:2], self.config.token_size)
        tokens = torch.zeros(shape, dtype=torch.float32, device="cpu")
        token_mask = torch.zeros(shape, dtype=torch.bool, device="cpu")
        for row, window in enumerate(latents.cpu()):
            kept = slice(None) if attention_mask is None else attention_mask[row].bool().cpu()
            tokens[row, kept], token_mask[row, kept] = decode_windows(window[kept], self.config.token_size)
        return tokens.to(latents.device), token_mask.to(latents.device)

    def refine(
        self,
        model: PreTrainedModel,
        tokens: torch.Tensor,
        token_mask: torch.Tensor,
        positions: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The second half: corrects the tokens of `undo`, [batch, tokens, token_size] -> the same."""
        check_inputs("tokens", tokens, self.config.token_size, token_mask, positions, attention_mask)
        attention_mask = attendable_tokens(token_mask, attention_mask)
        embedded = model.embed_positions(tokens, positions)
        return self._refine(model, tokens, token_mask, embedded, attention_mask).reconstruction

    def forward(
        self,
        model: PreTrainedModel,
        tokens: torch.Tensor,
        token_mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> CodedWindows:
        embedded = model.embed_positions(tokens, positions)
        latents = self.encode(model, tokens, token_mask, positions, attention_mask)
        decoded_tokens, decoded_mask = self.undo(latents, attention_mask)
        refined = self._refine(model, decoded_tokens, decoded_mask, embedded, attention_mask, **kwargs)
        return refined._replace(latents=latents)

    def decoding(
        self, model: PreTrainedModel, latents: torch.Tensor, positions: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], Callable[..., torch.Tensor]]:
        """Whole windows are undone first; the halo is the network's."""
        tokens, token_mask = (part[0] for part in self.undo(latents[None]))
        fields = {"tokens": tokens, "token_mask": token_mask, "positions": positions}
        return fields, partial(self.refine, model)

    def noise_scale(self, latents: torch.Tensor) -> torch.Tensor:
        """See the function of that name."""
        rows = [noise_scale(row, self.config.token_size) for row in latents.reshape(-1, *latents.shape[-2:])]
        return torch.stack(rows).view(latents.shape).to(latents)

    def size(self, latents: torch.Tensor) -> tuple[int, int]:
        ((_, _, pieces),) = read_windows(latents, self.config.token_size)
        pivots = sum(len(piece.factors.pivots) for piece in pieces if piece.factors is not None)
        return 1 + HEADER * len(pieces) + pivots, pieces[-1].first_number + len(pieces[-1].noise_scale())

    def check_interpolation(self) -> None:
        raise ValueError(
            "method='interpolation' needs latents of tokens, and this backbone's are factors of matrices "
            "(latent_code=\"matrix\"): half of one model's and half of another's are no factors. Draw around "
            "the anchors (method='density'), or take a backbone with latent_code=\"token\"."
        )

    def _refine(
        self,
        model: PreTrainedModel,
        tokens: torch.Tensor,
        token_mask: torch.Tensor,
        position_embeddings: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> CodedWindows:
        """Corrected tokens and features; `latents` is left to the caller, and holds the features."""
        features, encoded = model.run_encoder(tokens, token_mask, position_embeddings, attention_mask, **kwargs)
        content, mean, log_std = features.split([features.shape[-1] - 2, 1, 1], dim=-1)
        tokens, token_mask = tokens.to(mean.device), token_mask.to(mean.device)
        standardized = torch.where(token_mask, (tokens - mean) * (-log_std).exp(), 0)
        inputs = torch.cat([content, mean.asinh(), log_std, standardized], dim=-1)
        inputs = inputs.to(model.decoder.proj_in.weight.dtype)
        correction, decoded = model.run_decoder(inputs, position_embeddings, attention_mask, **kwargs)
        correction = correction.float() * log_std.exp().to(correction.device)
        return CodedWindows(features, features, tokens.to(correction.device) + correction, encoded, decoded)


def _check_token_level(attention_mask: torch.Tensor | None) -> None:
    """Raises ValueError for a mask that does not say which tokens the factors are of."""
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f'With latent_code="matrix" attention_mask must be [batch, tokens], got {list(attention_mask.shape)}: '
            "it says which tokens the factors are of."
        )


@dataclass(frozen=True)
class CodedPiece:
    """A piece as read from the numbers of a window; after its header, they begin at index `first_number`."""

    length: int
    first_number: int
    layout: Layout | None
    factors: Factors | None
    kept: torch.Tensor  # the weights as they are: all of them, none, or those outside of the matrix

    def weights(self) -> torch.Tensor:
        """float32 [length]."""
        if self.factors is None:
            return self.kept if len(self.kept) else self.kept.new_zeros(self.length)
        layout = self.layout
        middle = self.factors.matrix(layout).reshape(-1)
        return torch.cat([self.kept[: layout.first], middle, self.kept[layout.first :]])

    def noise_scale(self) -> torch.Tensor:
        """Float, one entry a number: noise of one unit in all moves each weight by about its row's deviation."""
        if self.factors is None:
            return _local_deviation(self.kept)
        factors = self.factors
        # In float64: squares of the smallest weights would be 0 in float32, and quotients by them infinite.
        matrix, given = factors.matrix(self.layout).double(), factors.rows.double()
        matrix = matrix.T if self.layout.rows > self.layout.width else matrix  # [short, long]
        rank, is_other = len(factors.pivots), others(factors.pivots, len(matrix))
        of_rows = matrix.std(1, correction=0)
        of_pivots, of_others = of_rows[factors.pivots], of_rows[is_other]
        columns = matrix.square().mean(0).sqrt()
        columns = columns / columns.square().mean().sqrt().clamp_min(TINY)
        # A weight is sum_j combination_j row_j. Half of its variance comes from the noise in each of the two.
        combinations = of_others[:, None] / (given.square().mean(1).sqrt().clamp_min(TINY) * (2 * rank) ** 0.5)
        # The pivots' noise reaches the other rows through combinations: how much of a row's own deviation.
        reach = (factors.combinations.double() * of_pivots).square().sum(1) / of_others.square().clamp_min(TINY**2)
        share = (len(matrix) / (2 * (rank + reach.sum()))).sqrt().clamp_max(1)
        rows = of_pivots[:, None] * columns * share
        parts = (torch.zeros(rank), rows.reshape(-1), combinations.reshape(-1), _local_deviation(self.kept))
        return torch.cat(parts).float()


def _local_deviation(values: torch.Tensor, size: int = 32) -> torch.Tensor:
    """The standard deviation of every `size` consecutive values, given back to each of them; of fewer at the end.

    Float [n] -> float64 [n].
    """
    values = values.double()
    end = len(values) - len(values) % size
    parts = [values[:end].view(-1, size)]
    if end < len(values):
        parts.append(values[end:].view(1, -1))
    deviations = [(part - part.mean(1, keepdim=True)).square().mean(1, keepdim=True).sqrt() for part in parts]
    return torch.cat([one.expand_as(part).reshape(-1) for one, part in zip(deviations, parts, strict=True)])


def _on_its_own(function: Callable) -> Callable:
    """Runs it on the CPU, outside of gradients, autocast (it rounds) and compiled graphs (this loops over numbers)."""

    @torch.compiler.disable
    @wraps(function)
    def run(*args, **kwargs):
        # A default device is a mode that every call of torch goes through in Python: only where another one is set.
        on_cpu = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
        with torch.no_grad(), torch.autocast("cpu", enabled=False), on_cpu:
            return function(*args, **kwargs)

    return run


def _in_parallel(function: Callable[[Any], Any], windows: Iterable[Any]) -> Iterator[Any]:
    """`map(function, windows)` on torch's threads, one a window: for matrices of this size several would mostly wait
    for each other, and the last digits would depend on how many there are."""
    return run_in_order(function, windows, torch.get_num_threads(), threads=1)


@_on_its_own
def encode_window(
    tokens: torch.Tensor,
    token_mask: torch.Tensor | None,
    positions: torch.Tensor,
    latent_size: int,
    row_sizes: torch.Tensor | None = None,
) -> torch.Tensor:
    """The numbers of a window.

    Args:
        tokens: [tokens, d_t], dense tokens.
        token_mask: bool [tokens, d_t], true where an entry is a weight: the first ones of a token, at least one; None
            for all. What the other entries hold is ignored.
        positions: integers [tokens, 3].
        latent_size: numbers there are per token.
        row_sizes: integers [tokens], `WeightManifest.row_sizes`; None: matrices are found by trying many sizes, which
            takes several times longer and now and then misses the best one.

    Returns:
        float32 [tokens, latent_size] on the CPU, where all of this is computed, in float64.

    Raises:
        MatrixCodeError: too few numbers for the headers of all pieces, a weight that is not finite (or too large for
            float32), or a mask that is not of dense tokens.
    """
    tokens, positions = tokens.detach().to("cpu", torch.float64), positions.cpu()
    if token_mask is not None:
        token_mask = token_mask.cpu()
        _check_dense(token_mask)
        tokens = torch.where(token_mask, tokens, 0)
    _check_finite(tokens, "tokens", "no low-rank factors describe them. Mend or leave out those weights.")
    num_tokens, token_size = tokens.shape
    pieces = cut_pieces(tokens, token_mask, positions, row_sizes)
    if max(map(len, pieces)) > MAX_LENGTH:
        raise MatrixCodeError(
            f"A layer has {max(map(len, pieces)):,} weights in one window, and float32 counts no further than "
            f"{MAX_LENGTH:,}. Encode it in smaller windows (window_size)."
        )
    budget = num_tokens * latent_size - 1 - HEADER * len(pieces)
    if budget < 0:
        raise MatrixCodeError(
            f"A window of {num_tokens} tokens of {len(pieces)} layers has {num_tokens * latent_size} numbers, and the "
            f"headers alone take {HEADER * len(pieces) + 1}. Raise latent_size above {HEADER}."
        )
    spectra = [best_spectrum(piece, -(-len(piece) // token_size) * latent_size - HEADER) for piece in pieces]
    parts = [torch.tensor([num_tokens], dtype=torch.float64)]
    for piece, spectrum, rank in zip(pieces, spectra, allocate(pieces, spectra, budget), strict=True):
        parts += write_piece(piece, spectrum, rank)
    numbers = torch.cat(parts)
    latents = torch.zeros(num_tokens * latent_size, dtype=torch.float32)
    latents[: len(numbers)] = numbers
    _check_finite(latents, "the factors of these tokens", "their weights are too large for float32. Scale them down.")
    return latents.view(num_tokens, latent_size)


@_on_its_own
def decode_windows(latents: torch.Tensor, token_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of whole windows, one after the other.

    Rows of zeros between windows are tokens without weights.

    Args:
        latents: [tokens, latent_size].

    Returns:
        tokens float32 [tokens, d_t], and bool of that shape, true where there is a weight; on the CPU.

    Raises:
        MatrixCodeError: the latents are not what `encode_window` gave.
    """
    tokens = torch.zeros(len(latents), token_size, dtype=torch.float32)
    token_mask = torch.zeros(tokens.shape, dtype=torch.bool)

    def weights_of(window: tuple[int, int, list[CodedPiece]]) -> tuple[int, list[torch.Tensor]]:
        return window[0], [piece.weights() for piece in window[2]]

    for start, weights in _in_parallel(weights_of, read_windows(latents, token_size)):
        for values in weights:
            count = -(-len(values) // token_size)
            tokens[start : start + count].view(-1)[: len(values)] = values
            token_mask[start : start + count].view(-1)[: len(values)] = True
            start += count
    return tokens, token_mask


@_on_its_own
def noise_scale(latents: torch.Tensor, token_size: int) -> torch.Tensor:
    """The worth of one unit of noise in each number, float32 [tokens, latent_size] on the CPU.

    With noise of one unit in all numbers a weight moves by about its row's standard deviation. Counts, widths,
    ranks and indices get none, nor do the zeros that fill a window up.
    """
    scale = torch.zeros(latents.shape, dtype=torch.float32)

    def scales_of(window: tuple[int, int, list[CodedPiece]]) -> tuple[int, int, list[tuple[int, torch.Tensor]]]:
        start, stop, pieces = window
        return start, stop, [(piece.first_number, piece.noise_scale()) for piece in pieces]

    for start, stop, scales in _in_parallel(scales_of, read_windows(latents, token_size)):
        flat = scale[start:stop].view(-1)
        for first, values in scales:
            flat[first : first + len(values)] = values
    return scale


def window_bounds(latents: torch.Tensor) -> list[tuple[int, int]]:
    """First token and end of each window in latents [tokens, latent_size].

    Raises:
        MatrixCodeError: a window that says another number of tokens than there are.
    """
    bounds, start, counts, empty = [], 0, latents[:, 0].tolist(), (latents == 0).all(1).tolist()
    while start < len(counts):
        count = counts[start]
        if empty[start]:
            start += 1
            continue
        if not (count.is_integer() and 1 <= count <= len(counts) - start):
            raise MatrixCodeError(
                f"Token {start} should begin a window, and its first number, {count:g}, is no number of tokens from 1 "
                f"to {len(counts) - start}. {ADVICE}"
            )
        bounds.append((start, start + int(count)))
        start += int(count)
    return bounds


def read_windows(latents: torch.Tensor, token_size: int) -> Iterator[tuple[int, int, list[CodedPiece]]]:
    """First token, end, and pieces of each window; see `decode_windows`."""
    latents = latents.detach().to("cpu", torch.float32)
    _check_finite(latents, "latents", "decode what `encode` gave, with noise of finite size.")
    for start, stop in window_bounds(latents):
        yield start, stop, read_pieces(latents[start:stop].reshape(-1), stop - start, token_size)


def read_pieces(numbers: torch.Tensor, num_tokens: int, token_size: int) -> list[CodedPiece]:
    """The pieces of one window; see `decode_windows`."""
    pieces, at, held = [], 1, 0
    while held < num_tokens:
        header = numbers[at : at + HEADER].tolist()
        at += HEADER
        length, layout, sizes = _read_header(header)
        held += -(-length // token_size)
        if length < 1 or held > num_tokens or at + sum(sizes) > len(numbers):
            raise MatrixCodeError(
                f"Number {at - HEADER} of a window of {num_tokens} tokens should begin a layer, and the {HEADER} from "
                f"there, {header}, are no number of weights, offset, width and rank that fit. {ADVICE}"
            )
        parts = numbers[at : at + sum(sizes)].split(sizes)
        factors = None if layout is None else _read_factors(layout, *parts[:3])
        pieces.append(CodedPiece(length, at, layout, factors, parts[-1]))
        at += sum(sizes)
    if numbers[at:].any():
        raise MatrixCodeError(
            f"A window of {num_tokens} tokens ends after {at} numbers, and those that follow are not all 0. {ADVICE}"
        )
    return pieces


def _read_header(header: list[float]) -> tuple[int, Layout | None, list[int]]:
    """Length (0 if impossible), layout (None without factors), and how many numbers each part of a piece takes."""
    impossible = 0, None, []
    if len(header) < HEADER or not all(value.is_integer() for value in header):
        return impossible
    length, offset, width, rank = map(int, header)
    if width == 0:
        return (length, None, [0 if rank else length]) if offset == 0 and rank in (0, 1) else impossible
    layout = Layout.of(length, offset, width) if 0 <= offset < width else None
    if layout is None or not 0 < rank < layout.short:
        return impossible
    return length, layout, [rank, rank * layout.long, (layout.short - rank) * rank, layout.outside]


def _read_factors(layout: Layout, pivots: torch.Tensor, rows: torch.Tensor, combinations: torch.Tensor) -> Factors:
    rank, indices = len(pivots), pivots.long()
    ascending = (indices[1:] > indices[:-1]).all()
    if not ascending or (indices != pivots).any() or indices[0] < 0 or indices[-1] >= layout.short:
        raise MatrixCodeError(
            f"The {rank} pivots of a matrix with {layout.short} rows must be ascending indices of rows, and are "
            f"{pivots.tolist()}. {ADVICE}"
        )
    return Factors(indices, rows.view(rank, layout.long), combinations.view(layout.short - rank, rank))


def write_piece(piece: Piece, spectrum: Spectrum | None, rank: int | None) -> list[torch.Tensor]:
    """The numbers of a piece, as several float64 vectors; rank None keeps the weights, -1 nothing."""
    if rank is None or rank < 0:
        header = piece.values.new_tensor([len(piece), 0, 0, 0 if rank is None else 1])
        return [header, piece.values] if rank is None else [header]
    layout = spectrum.layout
    factors = factorize(piece, spectrum, rank)
    return [
        piece.values.new_tensor([len(piece), piece.offset % layout.width, layout.width, rank]),
        factors.pivots.double(),
        factors.rows.reshape(-1),
        factors.combinations.reshape(-1),
        piece.values[: layout.first],
        piece.values[layout.last :],
    ]


def cut_pieces(
    tokens: torch.Tensor,
    token_mask: torch.Tensor | None,
    positions: torch.Tensor,
    row_sizes: torch.Tensor | None = None,
) -> list[Piece]:
    """The pieces of layers in a window, in order: consecutive tokens of one layer, all but the last one full."""
    num_tokens, token_size = tokens.shape
    counts = torch.full((num_tokens,), token_size) if token_mask is None else token_mask.sum(-1)
    # In float64: float32 has no squares of weights below 1e-22 or above 1e19. Around the first entry, so that the
    # variance of a constant token is exactly 0.
    _, variance, _ = masked_moments(tokens - tokens[:, :1], token_mask)
    std = variance.sqrt()  # [tokens, 1]
    _, layer, index = positions.unbind(-1)
    follows = (layer[1:] == layer[:-1]) & (index[1:] == index[:-1] + 1) & (counts[:-1] == token_size)
    starts = [0, *(torch.nonzero(~follows).squeeze(1) + 1).tolist(), num_tokens]
    pieces = []
    for start, stop in zip(starts, starts[1:], strict=False):
        length = int(counts[start:stop].sum())
        values = tokens[start:stop].reshape(-1)[:length]
        least = (MIN_RELATIVE_STD * values.square().mean().sqrt()).clamp_min(TINY)
        weights = 1 / torch.maximum(std[start:stop], least)
        weights = weights.expand(-1, token_size).reshape(-1)[:length]
        row_size = 0 if row_sizes is None else int(row_sizes[start])
        pieces.append(Piece(values, weights, int(index[start]) * token_size, row_size))
    return pieces


def _check_finite(values: torch.Tensor, name: str, advice: str) -> None:
    if not torch.isfinite(values).all():
        raise MatrixCodeError(f"{name} hold a NaN or an infinity: {advice}")


def _check_dense(token_mask: torch.Tensor) -> None:
    wrong = ~token_mask[:, 0] | (token_mask[:, 1:] & ~token_mask[:, :-1]).any(1)
    if wrong.any():
        raise MatrixCodeError(
            f"token_mask: token {int(wrong.nonzero()[0])} of a window does not begin with its weights, at least one, "
            "as dense tokens do. Leave tokens without weights out (attention_mask), or use another latent_code."
        )
