"""The controls of a generated model: what else can be made of an anchor without a backbone (or with none at all)."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from datasets_scripts.embedding.linear_projection import LinearBaseline, standardize
from modeling_wsl.feature_extraction_wsl import WSLFeatureExtractor


def with_noise(
    anchor: Mapping[str, Tensor], generated: Mapping[str, Tensor], names: Iterable[str], seed: int
) -> dict[str, Tensor]:
    """The anchor plus Gaussian noise, tensor by tensor as long as the way from the anchor to the generated model.

    Args:
        anchor, generated: state dicts of one architecture.
        names: the tensors to disturb (those that were sampled); the others stay the anchor's.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {name: value.clone() for name, value in anchor.items()}
    for name in sorted(names):
        noise = torch.randn(anchor[name].shape, generator=generator)
        distance = (generated[name].float() - anchor[name].float()).norm()
        state[name] += (noise * (distance / noise.norm().clamp_min(1e-12))).to(anchor[name].dtype)
    return state


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
