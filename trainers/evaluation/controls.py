"""The controls of a generated model: what can be made of an anchor without a backbone, or without an anchor too."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from datasets_scripts.embedding.linear_projection import LinearBaseline, standardize
from hf_wsl.files import replacing, sha256
from modeling_wsl.feature_extraction_wsl import WSLFeatureExtractor

from ..data.windows.dataset_source import DatasetSource
from ..data.windows.window_data import WindowDataset
from ..pretraining.baselines import fit_pca


logger = logging.getLogger(__name__)
TINY = 1e-12


def with_noise(
    anchor: Mapping[str, Tensor],
    origin: Mapping[str, Tensor],
    generated: Mapping[str, Tensor],
    names: Iterable[str],
    seed: int,
) -> dict[str, Tensor]:
    """The anchor plus Gaussian noise, tensor by tensor as long as the way from the origin to the generated model.

    Args:
        anchor, origin, generated: state dicts of one architecture; the origin is the anchor that was drawn around.
        names: the tensors to disturb (those that were sampled); the others stay the anchor's.
        seed: of the noise.
    """
    state = {name: value.clone() for name, value in anchor.items()}
    for name, noise in _noise(anchor, names, seed):
        distance = (generated[name].float() - origin[name].float()).norm()
        state[name] += (noise * distance).to(anchor[name].dtype)
    return state


def rotated(
    anchor: Mapping[str, Tensor],
    origin: Mapping[str, Tensor],
    generated: Mapping[str, Tensor],
    names: Iterable[str],
    seed: int,
) -> dict[str, Tensor]:
    """The anchor turned in a random direction, tensor by tensor by the angle between origin and generated model.

    Its length changes as theirs does. `with_noise` goes as far and yet keeps more of the anchor's direction, because
    noise makes a tensor longer where a reconstruction makes it shorter. Arguments as there.
    """
    state = {name: value.clone() for name, value in anchor.items()}
    for name, noise in _noise(anchor, names, seed):
        own, before, after = (states[name].float() for states in (anchor, origin, generated))
        length, unit = before.norm().clamp_min(TINY), own / own.norm().clamp_min(TINY)
        along = (after * before).sum() / length**2
        across = (after - along * before).norm() / length
        noise = noise - (noise * unit).sum() * unit
        turned = own * along + noise * (own.norm() * across / noise.norm().clamp_min(TINY))
        # Zeros have no direction: what replaces them is noise.
        turned = turned if bool(before.any()) and bool(own.any()) else own + noise * after.norm()
        state[name] = turned.to(anchor[name].dtype)
    return state


def _noise(anchor: Mapping[str, Tensor], names: Iterable[str], seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, Gaussian direction of length 1) of each tensor."""
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(names):
        noise = torch.randn(anchor[name].shape, generator=generator)
        yield name, noise / noise.norm().clamp_min(TINY)


def permuted(anchor: Mapping[str, Tensor], names: Iterable[str], seed: int) -> dict[str, Tensor]:
    """The anchor with the entries of each named tensor in random order."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: value.clone() for name, value in anchor.items()}
    for name in sorted(names):
        order = torch.randperm(anchor[name].numel(), generator=generator)
        state[name] = anchor[name].flatten()[order].view(anchor[name].shape)
    return state


def inherited_only(
    generated: Mapping[str, Tensor], origins: Mapping[str, str], scratch: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    """Scratch with the tensors that the generated model took from its anchor; None where it took none.

    Args:
        generated: state dict of the generated model.
        origins: `provenance["tensors"]` of it.
        scratch: state dict of the random initialization.
    """
    taken = {name for name, origin in origins.items() if origin.startswith("inherited")}
    if not taken:
        return None
    return {name: (generated[name] if name in taken else value).clone() for name, value in scratch.items()}


def projected(
    feature_extractor: WSLFeatureExtractor,
    baseline: LinearBaseline,
    anchor: Mapping[str, Tensor],
    names: Sequence[str],
) -> dict[str, Tensor]:
    """The anchor with the named tensors taken through a linear map of their standardized tokens and back.

    Args:
        anchor: state dict.
        names: the tensors that generation samples, in state-dict order; the others stay the anchor's.
    """
    batch = feature_extractor({name: anchor[name] for name in names}, order="file", min_parameters=0)
    standardized, mean, std = standardize(batch["tokens"].float(), batch["token_mask"])  # [T, d_t], [T, 1], [T, 1]
    decoded = feature_extractor.decode(baseline.reconstruct(standardized) * std + mean, batch["manifest"])
    return {name: decoded.get(name, value).clone() for name, value in anchor.items()}


def cached_pca(source: DatasetSource, rank: int, max_tokens: int, cache_dir: Path) -> LinearBaseline:
    """The leading directions of a dataset's standardized training tokens.

    Args:
        source: the tokenized dataset.
        rank: latent size.
        max_tokens: tokens to fit on, about.
        cache_dir: keeps `pca-<key>.safetensors`; the key follows from the dataset's files and the numbers above.

    Raises:
        DatasetError: the dataset cannot be read.
    """
    path = cache_dir / f"pca-{_pca_key(source, rank, max_tokens)}.safetensors"
    if not path.is_file():
        logger.info("fitting PCA on %s", source.name)
        fitted = fit_pca(WindowDataset(source.load()["train"], split="train"), rank, max_tokens)
        with replacing(path) as temporary:
            save_file({"components": fitted.components, "mean": fitted.mean}, temporary)
    return LinearBaseline(**load_file(path))


def _pca_key(source: DatasetSource, rank: int, max_tokens: int) -> str:
    files = [source.name, source.commit()]
    if source.folder is not None:
        paths = sorted(source.folder.glob("windows/*.parquet"))
        files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    return sha256(json.dumps([files, rank, max_tokens]))[:16]
