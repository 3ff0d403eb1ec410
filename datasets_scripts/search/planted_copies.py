"""Copies of models that one knows to be copies: to measure how well copies are found."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_wsl.files import write_json
from modeling_wsl.tokens.manifest import batch_norm_names

from ..sources import ModelSource
from .hidden_permutation import permute_hidden
from .related_models import open_source


EXACT, CAST, PERMUTED, NOISE = "exact", "float16", "permuted", "noise"


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
    digest = hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
