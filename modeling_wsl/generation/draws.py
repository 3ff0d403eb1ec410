"""Where the latents of a candidate come from: a density on anchors' latents, or the line between two.

The density is a kernel density estimate (paper, appendix B.2.2 and C.2).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..backbone.encoding import STREAM_WINDOW, encode_stream
from ..backbone.inference import inference_backbone
from ..tokens.manifest import check_choice
from .plan import GenerationPlan


DRAW_TOKENS = 1024


def sample_latents(
    anchors: Tensor,
    bandwidth: float = 0.2,
    noise: str = "shared",
    generator: torch.Generator | None = None,
    noise_scale: Callable[[Tensor], Tensor] | None = None,
    one_anchor: bool = False,
) -> Tensor:
    """One draw from the Gaussian kernel density estimate on the anchors' latents (paper, appendix B.2.2).

    A draw from such an estimate is a randomly chosen anchor plus `bandwidth` times a standard normal vector. The
    random numbers are made on the CPU, so that a seed means the same draw on every device.

    Args:
        anchors: `[anchors, T, latent_size]`.
        bandwidth: standard deviation of the kernel; 0 returns an anchor.
        noise: "shared": one anchor and one noise vector for all tokens of the draw, which is what the published code
            does through a fixed seed; "independent": an anchor and a noise vector of its own for each token.
        generator: source of randomness; None: torch's global one.
        noise_scale: gives, for latents `[T, latent_size]`, what one unit of noise is worth in each number
            (`WSLModel.noise_scale`); None: 1 everywhere.
        one_anchor: take all tokens from one anchor whatever the noise, and ask `noise_scale` for all of them at once:
            for latents that do not mix (`WindowCode.by_token`).

    Returns:
        `[T, latent_size]`, dtype and device of the anchors.

    Raises:
        ValueError: anchors of another rank, none of them, a negative bandwidth or an unknown kind of noise.
    """
    if anchors.dim() != 3 or len(anchors) == 0:
        raise ValueError(
            f"anchors have shape {tuple(anchors.shape)}; give [anchors, tokens, latent_size], one or more."
        )
    if not 0 <= bandwidth < float("inf"):
        raise ValueError(f"bandwidth is {bandwidth}; it is a standard deviation: give 0 (no noise) or more.")
    check_choice("noise", noise, ("shared", "independent"))
    num_anchors, num_tokens, latent_size = anchors.shape
    if noise == "shared" or one_anchor:
        chosen = anchors[int(torch.randint(num_anchors, (1,), generator=generator))]
    else:
        index = torch.randint(num_anchors, (num_tokens,), generator=generator).to(anchors.device)
        chosen = anchors[index, torch.arange(num_tokens, device=anchors.device)]  # [T, latent_size]
    shape = (latent_size,) if noise == "shared" else (num_tokens, latent_size)  # the same for every token, or its own
    epsilon = torch.randn(shape, generator=generator)
    steps = (bandwidth * epsilon.to(chosen)).expand_as(chosen)
    draw = torch.empty_like(chosen)
    # In pieces, which stay in the cache from one operation to the next.
    size = num_tokens if one_anchor else DRAW_TOKENS
    for here, step, out in zip(*(tensor.split(size) for tensor in (chosen, steps, draw)), strict=True):
        torch.add(here, step if noise_scale is None else step * noise_scale(here), out=out)
    return draw


def draw_seeds(seed: int, num_draws: int) -> list[int]:
    """A seed for each draw, so that any one can be made again without the others.

    The first seeds do not depend on how many are asked for.
    """
    generator = torch.Generator().manual_seed(seed)
    return [int(torch.randint(2**63 - 1, (), generator=generator)) for _ in range(num_draws)]


@dataclass(frozen=True)
class AnchorDensity:
    """A kernel density on the anchors' latents `[anchors, T, latent_size]`; see `sample_latents`."""

    model: PreTrainedModel
    latents: Tensor
    bandwidth: float
    noise: str

    def draw(self, index: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        model = self.model
        options = {"noise_scale": model.noise_scale, "one_anchor": not model.code.by_token}
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


# `draw` gives latents `[T, latent_size]` of candidate `index`, and what provenance says about this draw alone; `facts`
# what it says about every draw.
LatentSource = AnchorDensity | AnchorLine


def latent_source(plan: GenerationPlan, model: PreTrainedModel, windows: Mapping[str, Any]) -> LatentSource:
    """Encodes the anchors of a plan and says where candidates come from.

    Args:
        plan: what was checked.
        model: the backbone.
        windows: options of `encode_stream`.

    Raises:
        ValueError: there is no straight line between the latents of two models.
    """
    settings = plan.settings
    if plan.method == "interpolation":
        model.code.check_interpolation()
    fast = model
    if model.code.in_context:  # else no network is needed
        fast, dtype = inference_backbone(model, windows["autocast_dtype"], settings.precision)  # once for all anchors
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
    noise = settings.noise or ("shared" if model.code.by_token else "independent")
    return AnchorDensity(model, latents, settings.bandwidth, noise)
