"""The models of a tokenized dataset's validation split, read whole, and what kind each of their layers is."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from datasets_scripts.schema import MODELS, TRAIN, VALIDATION
from modeling_wsl import WeightManifest, WSLFeatureExtractor
from modeling_wsl.tokens.kinds import kind_of, stem_name
from modeling_wsl.tokens.manifest import Block, LayerSpec, TensorSpec, split_name


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
