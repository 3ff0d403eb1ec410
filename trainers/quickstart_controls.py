"""The controls of a generated model: what else can be made of an anchor without a backbone (or with none at all)."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from modeling_wsl.feature_extraction_wsl import WSLFeatureExtractor

from .baselines import LinearBaseline, standardize


# arm -> what its initial weights are; the order of tables and legends.
ARMS = {
    "anchor": "the held-out trained model itself: the upper bound",
    "generated": "drawn by the backbone around the anchor's latents, the best draws on the validation images",
    "reconstructed": "the anchor through the backbone and back, without the noise of a draw",
    "PCA": "the anchor through PCA over tokens to the same latent size, fitted on the same training models",
    "random projection": "the anchor through a random orthogonal projection to the same latent size",
    "anchor + noise": "the anchor plus Gaussian noise, each tensor as far off as the generated one's; the best draws",
    "anchor permuted": "the anchor with the entries of each tensor shuffled: its statistics, nothing else",
    "inherited only": "what generation took from the anchor untouched, all else as in scratch",
    "scratch": "the architecture's own random initialisation: the lower bound",
}


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
        state[name] += noise * ((generated[name] - anchor[name]).norm() / noise.norm().clamp_min(1e-12))
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
        scratch: state dict of the random initialisation.
    """
    taken = {name for name, origin in origins.items() if origin.startswith("inherited")}
    if not taken:
        return None
    return {name: (generated[name] if name in taken else value).clone() for name, value in scratch.items()}


def projected(
    feature_extractor: WSLFeatureExtractor, baseline: LinearBaseline, anchor: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The anchor through a linear map of its standardised tokens and back; what is carried stays as it is."""
    batch = feature_extractor(anchor)
    standardized, mean, std = standardize(batch["tokens"], batch["token_mask"])  # [T, d_t], [T, 1], [T, 1]
    return feature_extractor.decode(baseline.reconstruct(standardized) * std + mean, batch["manifest"])
