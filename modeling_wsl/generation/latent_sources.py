"""Where the latents of a candidate come from: a density on anchors' latents, the line between two, or the prior."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..backbone.inference import inference_backbone
from ..tokens.manifest import WeightManifest
from .latent_prior import LatentPrior
from .plan import GenerationPlan
from .sampling import encode_stream, sample_latents


STREAM_WINDOW = 4096


@dataclass(frozen=True)
class AnchorDensity:
    """A kernel density on the anchors' latents `[anchors, T, latent_size]`; see `sample_latents`."""

    model: PreTrainedModel
    latents: Tensor
    bandwidth: float
    noise: str

    def draw(self, index: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        model = self.model
        options = {"noise_scale": model.noise_scale, "one_anchor": model.has_matrix_code}
        return sample_latents(self.latents, self.bandwidth, self.noise, generator, **options), {}

    def facts(self) -> dict[str, Any]:
        return {"method": "density", "bandwidth": self.bandwidth, "noise": self.noise}


@dataclass(frozen=True)
class AnchorLine:
    """`num_points` points of the straight line between the latents `[2, T, latent_size]` of two anchors."""

    latents: Tensor
    num_points: int
    with_ends: bool

    def draw(self, index: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        weight = index / (self.num_points - 1) if self.with_ends else (index + 1) / (self.num_points + 1)
        return torch.lerp(self.latents[0], self.latents[1], weight), {"weight_of_second_anchor": weight}

    def facts(self) -> dict[str, Any]:
        return {"method": "interpolation"}


@dataclass(frozen=True)
class PriorDraws:
    """The backbone's prior over the latents of a model that is laid out like `manifest`."""

    prior: LatentPrior
    manifest: WeightManifest

    def draw(self, index: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        return self.prior.sample(self.manifest, generator), {}

    def facts(self) -> dict[str, Any]:
        return {"method": "prior", "prior": {**self.prior.facts, "sha256": self.prior.sha256()}}


# `draw` gives latents `[T, latent_size]` of candidate `index`, and what provenance says about this draw alone; `facts`
# what it says about every draw.
LatentSource = AnchorDensity | AnchorLine | PriorDraws


def latent_source(plan: GenerationPlan, model: PreTrainedModel, windows: Mapping[str, Any]) -> LatentSource:
    """Encodes the anchors of a plan, where it has any, and says where candidates come from.

    Args:
        plan: what was checked.
        model: the backbone.
        windows: options of `encode_stream`.

    Raises:
        ValueError: the prior was fitted on latents of another backbone, or the backbone's latents are a matrix code,
            which has no straight line between two models.
    """
    settings = plan.settings
    if model.has_matrix_code and plan.method == "interpolation":
        raise ValueError(
            "method='interpolation' needs latents of tokens, and this backbone's are factors of matrices "
            "(latent_code=\"matrix\"): half of one model's and half of another's are no factors. Draw around "
            "the anchors (method='density'), or take a backbone with latent_code=\"token\"."
        )
    if plan.method == "prior":
        plan.prior.check(model)
        return PriorDraws(plan.prior, plan.manifest)
    fast = model
    if not model.has_matrix_code:  # whose factors need no network
        fast, dtype = inference_backbone(model, windows["autocast_dtype"])  # once for all anchors
        windows = {**windows, "autocast_dtype": dtype}
    latents = torch.empty(len(plan.anchors), plan.manifest.num_tokens, model.config.latent_size)  # on the CPU
    for anchor, out in zip(plan.anchors, latents, strict=True):
        # In the target's order and checked by name; the tokens of the anchor are never held at once.
        options = {"order": "file", "allow_nonfinite": True, "min_parameters": 0}
        state = anchor.state_dict(spec.name for layer in plan.manifest.layers for spec in layer.tensors)
        chunks = plan.feature_extractor.stream(state, window_size=STREAM_WINDOW, **options)
        for start, part in encode_stream(fast, chunks, len(out), **windows, progress=settings.progress):
            out[start : start + len(part)] = part
    if plan.method == "interpolation":
        return AnchorLine(latents, settings.num_draws, settings.interpolation_ends)
    return AnchorDensity(model, latents, settings.bandwidth, settings.noise)
