"""Ways to say a model's weights in few numbers, all with the same budget: so many numbers a token, all counted; and
the models that they are measured on, those of a tokenized dataset's validation split.

What a code needs beside its numbers is what every model's file says: names and shapes of the tensors.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from datasets_scripts.embedding.linear_projection import LinearBaseline, standardize
from datasets_scripts.inspection.tensor_kinds import kind_of, stem_name
from datasets_scripts.schema import MODELS, TRAIN, VALIDATION
from modeling_wsl import WeightManifest, WSLFeatureExtractor, WSLModel
from modeling_wsl.backbone.losses import MIN_STD, token_moments
from modeling_wsl.codes.low_rank import Layout, Piece, weighted_matrix
from modeling_wsl.tokens.manifest import Block, LayerSpec, TensorSpec, split_name


STATISTICS = 2  # mean and log standard deviation of a token
TINY = 1e-30
Parts = list[torch.Tensor]
LAYER_KINDS = (
    "convolution",
    "depthwise convolution",
    "1x1 convolution",
    "linear",
    "recurrent",
    "embedding",
    "normalization",
    "other",
)
LAYER_SIZES = {"< 1k": 1_000, "1k - 10k": 10_000, "10k - 100k": 100_000, "> 100k": float("inf")}
_RECURRENT = re.compile(r"(_ih|_hh)(_|$)|recurrent|(^|[./_])(lstm|gru|rnn)(_?cell)?(_?\d+)?[./]", re.IGNORECASE)
_EMBEDDING = re.compile(r"(^|[./_])embeddings?$", re.IGNORECASE)


@dataclass(frozen=True)
class HeldOutModel:
    """A model that nothing was fitted on.

    Args:
        tokens: float32 [tokens, d_t], dense.
        token_mask: bool of that shape, true where an entry is a weight.
        positions: int64 [tokens, 3].
        outputs_last: whether tensors have their outputs in the last dimension (Keras), not in the first (torch).
    """

    model_id: str
    owner: str
    tokens: torch.Tensor
    token_mask: torch.Tensor
    positions: torch.Tensor
    manifest: WeightManifest
    outputs_last: bool

    @property
    def num_weights(self) -> int:
        return self.manifest.num_parameters

    @property
    def layers(self) -> list[tuple[LayerSpec, slice]]:
        """Each layer and its tokens."""
        return [(self.manifest.layers[block.layer], tokens_of(block)) for block in self.manifest.blocks]

    def layer_kinds(self) -> list[str]:
        """One of `LAYER_KINDS` for each of `layers`, by its largest tensor's name and shape."""
        stem = stem_name(self.manifest)
        return [layer_kind(layer, stem, self.outputs_last) for layer, _ in self.layers]

    def matrix_shape(self, spec: TensorSpec) -> tuple[int, int]:
        """Outputs by inputs, or inputs by outputs with `outputs_last`; both without changing the weights' order."""
        if self.outputs_last:
            return prod(spec.shape[:-1]), spec.shape[-1]
        return spec.shape[0], prod(spec.shape[1:])


def tokens_of(block: Block) -> slice:
    return slice(block.first_token, block.end_token)


def size_class(weights: int) -> str:
    return next(name for name, limit in LAYER_SIZES.items() if weights < limit)


def layer_kind(layer: LayerSpec, stem: str | None, outputs_last: bool) -> str:
    """Convolutions in more than one and less than all groups cannot be told from whole ones by their shape."""
    if any(_RECURRENT.search(spec.name) for spec in layer.tensors if len(spec.shape) == 2):
        return "recurrent"
    largest = max(layer.tensors, key=lambda spec: spec.numel)
    kinds = [kind_of(spec, layer, stem) for spec in layer.tensors]
    kind = kinds[layer.tensors.index(largest)]
    if len(largest.shape) >= 3:
        if "depthwise" in largest.name or (kind == "depthwise kernel" and not outputs_last):
            return "depthwise convolution"
        spatial = largest.shape[:-2] if outputs_last else largest.shape[2:]
        return "1x1 convolution" if prod(spatial) == 1 else "convolution"
    if kind == "table" or (len(largest.shape) == 2 and _EMBEDDING.search(split_name(largest.name)[1])):
        return "embedding"
    if kind == "matrix":
        return "linear"
    return "normalization" if "norm scale" in kinds else "other"


def read_held_out(models: Path, dataset: Path, extractor: WSLFeatureExtractor) -> list[HeldOutModel]:
    """The accepted models of the validation split, from the folder that the dataset was made of.

    Raises:
        SystemExit: tokens are not dense, the split is empty, or a model is missing or not the one that was tokenized.
    """
    if extractor.tokenization != "dense":
        raise SystemExit(f"{dataset} holds {extractor.tokenization} tokens; matrices are looked for in dense ones.")
    found = [read_model(models, row, extractor) for row in accepted_rows(dataset, VALIDATION)]
    if not found:
        raise SystemExit(f"{dataset} has no accepted model in its validation split. Tokenize with a larger one.")
    return found


def accepted_rows(dataset: Path, split: str) -> list[dict[str, Any]]:
    """Of the config `models`."""
    rows = []
    for file in sorted(dataset.glob(f"{MODELS}/{split}-*.parquet")):
        rows += pq.read_table(file).to_pylist()
    return [row for row in rows if row["status"] == "accepted"]


def check_unseen(models: Sequence[HeldOutModel], trained_on: Path, name: str) -> bool:
    """False where the folder `trained_on` is not here to be asked.

    Raises:
        SystemExit: what the backbone `name` was trained on holds models of these owners.
    """
    rows = accepted_rows(trained_on, TRAIN)
    seen = {row["owner"] or row["model_id"] for row in rows} & {model.owner for model in models}
    if seen:
        raise SystemExit(
            f"{name} was trained on {trained_on}, which holds models of {', '.join(sorted(seen))} for training. "
            "Measure it on the validation split of the dataset that it was trained on."
        )
    return bool(rows)


def read_model(models: Path, row: dict[str, Any], extractor: WSLFeatureExtractor) -> HeldOutModel:
    folder = models / row["model_id"]
    if not folder.exists():
        raise SystemExit(f"The dataset's validation model {row['model_id']} is not in {models}.")
    batch = extractor(folder)
    manifest = batch["manifest"]
    if manifest.layers != WeightManifest.from_json(row["manifest"]).layers:
        raise SystemExit(f"{folder} has other tensors than when it was tokenized. Tokenize {models} again.")
    record = folder / "model.json"
    layout = json.loads(record.read_text()).get("layout", "torch") if record.is_file() else "torch"
    return HeldOutModel(
        row["model_id"],
        row["owner"] or row["model_id"],
        batch["tokens"].float(),
        batch["token_mask"],
        batch["positions"],
        manifest,
        outputs_last=layout.startswith(("keras", "tf", "tensorflow")),
    )


@dataclass(frozen=True)
class Encoded:
    """A model in numbers.

    Args:
        parts: float32, any shapes.
        scales: what one unit of noise is worth in each number, same shapes; 0 for an index, a count or a filler. One
            unit in all low-rank factors moves a weight by about its token's (or row's) standard deviation, one in the
            mean or in the log standard deviation of a token by as much; one in all coefficients of a projection is 1
            of standardized weights, and moves a weight by sqrt(coefficients / d_t) of its deviation.
        decode: parts to tokens float32 [tokens, d_t].
        indices: how many of the numbers are indices or counts.
        unused: fillers, which no one needs to keep.
    """

    parts: Parts
    scales: Parts
    decode: Callable[[Parts], torch.Tensor]
    indices: int = 0
    unused: int = 0

    @property
    def numbers(self) -> int:
        return sum(part.numel() for part in self.parts) - self.unused

    def rounded(self) -> Parts:
        """All numbers but those with scale 0, rounded to bfloat16."""
        pairs = zip(self.parts, self.scales, strict=True)
        return [torch.where(scale > 0, part.bfloat16().float(), part) for part, scale in pairs]

    def noisy(self, units: float, generator: torch.Generator) -> Parts:
        pairs = zip(self.parts, self.scales, strict=True)
        return [part + units * scale * torch.randn(part.shape, generator=generator) for part, scale in pairs]


def token_statistics(model: HeldOutModel) -> tuple[torch.Tensor, Parts, Parts]:
    """Standardized tokens, [mean, log std], and their scales."""
    standardized, mean, std = standardize(model.tokens, model.token_mask)
    std = std.clamp_min(MIN_STD)
    return standardized, [mean, std.log()], [std, torch.ones_like(std)]


def with_statistics(standardized: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    return standardized * log_std.exp() + mean


def projection_code(model: HeldOutModel, projection: LinearBaseline) -> Encoded:
    """Every token by itself: its coefficients once standardized, mean, log standard deviation."""
    standardized, statistics, scales = token_statistics(model)
    coefficients = (standardized - projection.mean) @ projection.components.T

    def decode(parts: Parts) -> torch.Tensor:
        return with_statistics(parts[0] @ projection.components + projection.mean, *parts[1:])

    return Encoded([coefficients, *statistics], [torch.ones_like(coefficients), *scales], decode)


def largest_entries(model: HeldOutModel, budget: int) -> Encoded:
    """The largest standardized entries of every token, each a value and an index; mean, log standard deviation."""
    standardized, statistics, scales = token_statistics(model)
    index = standardized.abs().topk((budget - STATISTICS) // 2, dim=1).indices
    values = standardized.gather(1, index)

    def decode(parts: Parts) -> torch.Tensor:
        values, index, *statistics = parts
        return with_statistics(torch.zeros_like(standardized).scatter(1, index.long(), values), *statistics)

    parts, part_scales = [values, index.float()], [torch.ones_like(values), torch.zeros_like(values)]
    return Encoded([*parts, *statistics], [*part_scales, *scales], decode, indices=index.numel())


def window_svd(model: HeldOutModel, budget: int, window_size: int) -> Encoded:
    """The truncated SVD of the standardized tokens of every window: r coefficients a token and r basis vectors.

    r is the largest with r (tokens + d_t) + 2 tokens <= budget x tokens.
    """
    standardized, statistics, scales = token_statistics(model)
    parts, part_scales = [], []
    for window in standardized.split(window_size):
        count, size = window.shape
        rank = min((budget - STATISTICS) * count // (count + size), count, size)
        left, singular, right = torch.linalg.svd(window, full_matrices=False)
        coefficients, basis = left[:, :rank] * singular[:rank], right[:rank]
        parts += [coefficients, basis]
        # A half of a weight's variance by noise comes from either side.
        energy = coefficients.square().sum(1).mean().clamp_min(TINY)
        part_scales.append(torch.full_like(coefficients, (size / (2 * max(rank, 1))) ** 0.5))
        part_scales.append(torch.full_like(basis, float((1 / (2 * energy)).sqrt())))

    def decode(parts: Parts) -> torch.Tensor:
        *factors, mean, log_std = parts
        windows = [left @ right for left, right in zip(factors[::2], factors[1::2], strict=True)]
        return with_statistics(torch.cat(windows), mean, log_std)

    return Encoded([*parts, *statistics], [*part_scales, *scales], decode)


def matrix_svd(model: HeldOutModel, budget: int, otherwise: LinearBaseline) -> Encoded:
    """The truncated SVD of every weight matrix in the shape that its name has, outputs by inputs.

    The budget is spent layer by layer, budget x tokens of the layer. Vectors (biases) are kept as they are; what is
    left is shared by the layer's matrices in proportion to their weights, r (rows + columns) numbers for rank r, and a
    matrix is kept as it is where that takes no more. Errors count in units of each token's standard deviation, as far
    as a product of row and column multipliers can say so (`low_rank.weighted_matrix`); the decoder need not know them.
    Layers without a matrix, or without room for rank 1, are coded by the projection `otherwise`, that of the tokens.
    """
    _, variance, _ = token_moments(model.tokens, model.token_mask)
    least = 1e-3 * model.tokens.square().mean(1, keepdim=True).sqrt()  # of a token's deviation: as in `cut_pieces`
    weights = 1 / torch.maximum(variance.sqrt(), least).clamp_min(MIN_STD)
    parts, scales, decoders = [], [], []
    for layer, place in model.layers:
        encoded = layer_svd(model, layer, place, weights[place], budget)
        if encoded is None:
            whole = projection_code(part_of(model, place), otherwise)
            encoded = whole.parts, whole.scales, whole.decode
        parts.append(encoded[0])
        scales += encoded[1]
        decoders.append(encoded[2])
    ends = torch.tensor([0, *map(len, parts)]).cumsum(0).tolist()

    def decode(parts: Parts) -> torch.Tensor:
        layers = [read(parts[a:b]) for read, a, b in zip(decoders, ends, ends[1:], strict=False)]
        return torch.cat(layers)

    return Encoded([number for layer in parts for number in layer], scales, decode)


def part_of(model: HeldOutModel, place: slice) -> HeldOutModel:
    """Some of a model's tokens."""
    parts = model.tokens[place], model.token_mask[place], model.positions[place]
    return HeldOutModel(model.model_id, model.owner, *parts, model.manifest, model.outputs_last)


def layer_svd(
    model: HeldOutModel, layer: LayerSpec, place: slice, weights: torch.Tensor, budget: int
) -> tuple[Parts, Parts, Callable[[Parts], torch.Tensor]] | None:
    """Parts, scales and decoder of a layer; None where it has no matrix of rank 1 within the budget.

    Args:
        weights: [tokens, 1], what an error in a token's weights counts.
    """
    tokens = model.tokens[place]
    sizes = [spec.numel for spec in layer.tensors]
    flat = tokens.reshape(-1)[: sum(sizes)].split(sizes)
    counts = weights.expand(tokens.shape).reshape(-1)[: sum(sizes)].split(sizes)
    shapes = [model.matrix_shape(spec) if len(spec.shape) > 1 else (1, spec.numel) for spec in layer.tensors]
    in_matrices = sum(size for size, shape in zip(sizes, shapes, strict=True) if min(shape) > 1)
    left = len(tokens) * budget - (sum(sizes) - in_matrices)
    if in_matrices == 0 or left < 0:
        return None
    parts, scales, ranks = [], [], []
    for values, count, size, (rows, columns) in zip(flat, counts, sizes, shapes, strict=True):
        rank = left * size // in_matrices // (rows + columns)
        if min(rows, columns) == 1 or rank * (rows + columns) >= size:
            ranks.append(None)
            parts.append(values)
            scales.append(values.std(correction=0).clamp_min(TINY).expand(size))
        elif rank == 0:
            return None
        else:
            ranks.append(rank)
            factors = low_rank_factors(values, count, rows, columns, rank)
            parts += factors
            scales += factor_scales(*factors)

    def decode(parts: Parts) -> torch.Tensor:
        numbers, tensors = iter(parts), []
        for rank in ranks:
            first = next(numbers)
            tensors.append(first if rank is None else (first @ next(numbers)).reshape(-1))
        result = torch.zeros_like(tokens)
        result.view(-1)[: sum(sizes)] = torch.cat(tensors)
        return result

    return parts, scales, decode


def low_rank_factors(values: torch.Tensor, weights: torch.Tensor, rows: int, columns: int, rank: int) -> Parts:
    """[rows, rank] and [rank, columns], float32, of the weighted low-rank approximation, of about equal size."""
    piece = Piece(values.double(), weights.double(), offset=0)
    matrix, of_rows, of_columns = weighted_matrix(piece, Layout.of(rows * columns, 0, columns))
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    root = singular[:rank].sqrt()
    return [(left[:, :rank] * root / of_rows).float(), (root[:, None] * right[:rank] / of_columns).float()]


def factor_scales(left: torch.Tensor, right: torch.Tensor) -> Parts:
    """Noise of which a half of a weight's variance comes from either factor, and which adds up to its row's."""
    of_rows = (left @ right).std(1, correction=0)[:, None]
    of_left = of_rows / (2 * right.square().mean(1).sum()).sqrt().clamp_min(TINY)
    reach = (2 * (left / of_rows.clamp_min(TINY))[of_rows.squeeze(1) > TINY].square().sum() / len(left)).sqrt()
    of_right = (1 / reach if reach > TINY else torch.zeros(())).expand(right.shape)
    return [of_left.expand(left.shape), of_right]


@torch.no_grad()
def backbone_code(model: HeldOutModel, backbone: WSLModel) -> Encoded:
    """The latents of a backbone, window by window of its own size; the matrix code fills a window up with zeros."""
    parts, scales, places, indices, used = [], [], [], 0, 0
    row_sizes = model.manifest.row_sizes()
    for start in range(0, len(model.tokens), backbone.config.window_size):
        place = slice(start, start + backbone.config.window_size)
        window = (model.tokens[None, place], model.token_mask[None, place], model.positions[None, place])
        latents = backbone.encode(*window, row_sizes=row_sizes[None, place])[0].float()
        of_window = backbone.code.size(latents)
        indices, used = indices + of_window[0], used + of_window[1]
        parts.append(latents)
        scales.append(backbone.noise_scale(latents[None])[0])
        places.append(place)

    @torch.no_grad()
    def decode(parts: Parts) -> torch.Tensor:
        pairs = zip(parts, places, strict=True)
        windows = [backbone.decode(latents[None], model.positions[None, place])[0] for latents, place in pairs]
        return torch.cat(windows).float()

    unused = sum(latents.numel() for latents in parts) - used
    return Encoded(parts, scales, decode, indices, unused)
