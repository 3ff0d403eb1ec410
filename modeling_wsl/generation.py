"""Draws become models: anchors -> latents -> draws -> tokens -> weights -> a model of the target's library.

`plan_generation` checks everything that can be checked from names and shapes; `generated_models` then does the work,
one candidate in memory at a time; `generate` keeps the best of them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from .anchors import Anchor, AnchorSource, match_anchors, open_anchors
from .batch_norm import reestimate_batch_norm
from .checkpoints import first_nonfinite, open_checkpoint
from .feature_extraction_wsl import WSLFeatureExtractor
from .generated_model import GeneratedModel, entries_by_origin, package_versions
from .manifest import WeightManifest, check_choice
from .ranking import Scorer, scorer
from .sampling import decode_haloed, draw_seeds, encode_stream, sample_latents
from .targets import Target, resolve_target


logger = logging.get_logger(__name__)

STREAM_WINDOW = 4096
EXTRACTOR_SETTINGS = ("tokenization", "token_size", "position_unit", "batch_norm_statistics")


@dataclass(frozen=True)
class GenerationSettings:
    """How to draw.

    Attributes:
        num_samples: models to return.
        num_candidates: models to draw, of which the best `num_samples` are kept; needs `rank`. None: `num_samples`.
        seed: of all randomness; the same seed gives the same bytes on the same machine.
        bandwidth, noise: see `sample_latents`.
        window_size, halo: see `HaloedWindows`. window_size None: the window that the backbone was trained on.
        batch_size: windows per forward pass of the backbone.
        autocast_dtype: run the backbone under autocast to this type ("bfloat16").
        batch_norm_images: images for `reestimate_batch_norm`; None: the first anchor's statistics are inherited.
        rank: a function module -> score, higher is better, or a loader of validation data `(images, labels)`; never
            test data.
        progress: show progress bars (transformers' switch turns them off too).

    Raises:
        ValueError: for an impossible combination, saying which.
    """

    num_samples: int = 1
    num_candidates: int | None = None
    seed: int = 0
    bandwidth: float = 0.2
    noise: str = "shared"
    window_size: int | None = None
    halo: int = 64
    batch_size: int = 8
    autocast_dtype: torch.dtype | str | None = None
    batch_norm_images: Tensor | Iterable[Any] | None = None
    rank: Scorer | Iterable[Any] | None = None
    progress: bool = True

    def __post_init__(self):
        check_choice("noise", self.noise, ("shared", "independent"))
        for option in ("num_samples", "batch_size"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} is {getattr(self, option)}; it must be at least 1.")
        if not 0 <= self.bandwidth < float("inf"):
            raise ValueError(f"bandwidth is {self.bandwidth}; it is a standard deviation: give 0 (no noise) or more.")
        if self.num_candidates is not None and self.rank is None:
            raise ValueError(
                f"num_candidates={self.num_candidates} needs rank=<validation loader or function>: without it nothing "
                "tells which of them to keep."
            )
        if self.num_candidates is not None and self.num_candidates < self.num_samples:
            raise ValueError(f"num_candidates={self.num_candidates} is below num_samples={self.num_samples}.")
        for option in ("batch_norm_images", "rank"):
            if self.num_draws > 1 and isinstance(getattr(self, option), Iterator):
                raise ValueError(
                    f"{option} is an iterator: it would be used up by the first of {self.num_draws} models. Give a "
                    "list or a DataLoader."
                )

    @property
    def num_draws(self) -> int:
        return self.num_candidates or self.num_samples


@dataclass(frozen=True)
class GenerationPlan:
    """A generation that has been checked and not begun.

    Attributes:
        target: what is generated.
        anchors: in the order given.
        manifest: the tokens of the tensors that are sampled.
        initialised: stored tensors that the target's library initialises.
        settings: how to draw.
    """

    target: Target
    anchors: list[Anchor]
    manifest: WeightManifest
    initialised: frozenset[str]
    settings: GenerationSettings


def plan_generation(
    feature_extractor: WSLFeatureExtractor,
    target: Any,
    anchors: AnchorSource | Sequence[AnchorSource],
    settings: GenerationSettings,
    *,
    num_classes: int | None = None,
    target_kwargs: Mapping[str, Any] | None = None,
    target_revision: str | None = None,
    initialise: Sequence[str] = (),
    **options: Any,
) -> GenerationPlan:
    """Resolves target and anchors and checks that they fit; reads no weights.

    Args:
        feature_extractor: the backbone's.
        target, num_classes, target_kwargs: see `resolve_target`.
        target_revision: branch, tag or commit, where the target is a Hub id.
        anchors: trained models of the target's architecture: paths, Hub ids, modules, state dicts, checkpoints.
        settings: how to draw.
        initialise: modules or tensors of the target to initialise anew instead of sampling them.
        options: for `open_checkpoint` (`revision`, `token`, `allow_nonfinite`, ...), applied to every anchor.

    Raises:
        ValueError: target and anchors do not fit, or a ranking by accuracy is asked for a head that is initialised.
        CheckpointError: an anchor cannot be read safely.
    """
    # A revision is that of an anchor; a token may open both.
    token = options.get("token")
    resolved = resolve_target(target, num_classes, target_kwargs, revision=target_revision, token=token)
    whole = feature_extractor.layout(resolved.tensors)
    tokenised = frozenset(spec.name for layer in whole.layers for spec in layer.tensors)
    matched, initialised = match_anchors(resolved, open_anchors(anchors, **options), tokenised, initialise)
    if settings.rank is not None and not callable(settings.rank) and initialised & resolved.head:
        raise ValueError(
            f"rank: the classifier ({', '.join(sorted(initialised & resolved.head))}) is initialised at random, so "
            "accuracy on a validation loader would rank noise. Pass a function that trains it first, or no rank."
        )
    sampled = {name: spec for name, spec in resolved.tensors.items() if name not in initialised}
    manifest = feature_extractor.layout(sampled)
    if not manifest.layers:
        raise ValueError(f"Nothing is left to sample of {resolved.name}: all its tensors are initialised or carried.")
    return GenerationPlan(resolved, matched, manifest, initialised, settings)


def generate(
    model: PreTrainedModel, feature_extractor: WSLFeatureExtractor, plan: GenerationPlan
) -> list[GeneratedModel]:
    """Carries out a plan.

    Returns:
        `num_samples` models: the best first where they are ranked, else in the order drawn.
    """
    kept: list[GeneratedModel] = []
    for candidate in generated_models(model, feature_extractor, plan):
        kept.append(candidate)
        if plan.settings.rank is not None:
            kept.sort(key=_rank_key)  # stable: the earlier draw wins a tie
            del kept[plan.settings.num_samples :]
    return kept


def generated_models(
    model: PreTrainedModel, feature_extractor: WSLFeatureExtractor, plan: GenerationPlan
) -> Iterator[GeneratedModel]:
    """All candidates of a plan, one after the other, in the order drawn."""
    settings, target = plan.settings, plan.target
    sampled = [spec.name for layer in plan.manifest.layers for spec in layer.tensors]
    windows = {
        "window_size": settings.window_size or model.config.window_size,
        "halo": settings.halo,
        "batch_size": settings.batch_size,
        "autocast_dtype": settings.autocast_dtype,
    }
    latents = torch.empty(len(plan.anchors), plan.manifest.num_tokens, model.config.latent_size)  # on the CPU
    for anchor, out in zip(plan.anchors, latents, strict=True):
        # In the target's order and checked by name; the tokens of the anchor are never held at once.
        options = {"order": "file", "allow_nonfinite": True, "min_parameters": 0}
        chunks = feature_extractor.stream(anchor.state_dict(sampled), window_size=STREAM_WINDOW, **options)
        for start, part in encode_stream(model, chunks, len(out), **windows, progress=settings.progress):
            out[start : start + len(part)] = part
    positions = plan.manifest.positions()
    first = plan.anchors[0]
    inherited = {spec.name: first.read(spec.name) for spec in plan.manifest.carried}
    origins = dict.fromkeys(sampled, "sampled")
    origins |= dict.fromkeys(inherited, f"inherited: {first.checkpoint.source}")
    origins |= dict.fromkeys(plan.initialised, "initialised")
    facts = _facts(model, feature_extractor, plan, windows)
    score, ranked_by = scorer(settings.rank) if settings.rank is not None else (None, None)
    module = None

    seeds = draw_seeds(settings.seed, settings.num_draws)
    for draw, draw_seed in enumerate(tqdm(seeds, desc="Generating", unit="model", disable=_hidden(settings.progress))):
        generator = torch.Generator().manual_seed(draw_seed)
        drawn = sample_latents(latents, settings.bandwidth, settings.noise, generator, model.noise_scale)
        tokens = decode_haloed(model, drawn, positions, **windows, progress=settings.progress)
        stored = feature_extractor.decode(tokens, plan.manifest, carried={})
        _check_decoded(stored, target, settings)
        # Every model owns its tensors: changing one of them must not change the anchor or another model.
        stored |= {name: value.to(target.tensors[name].torch_dtype, copy=True) for name, value in inherited.items()}
        if plan.initialised:
            module = target.build(draw_seed)
            fresh = module.state_dict()
            stored |= {name: fresh[name].detach().clone() for name in plan.initialised}
        state = {name: stored[target.tied.get(name, name)] for name in target.tensor_order}
        draw_origins = dict(origins)
        provenance = {"draw": draw, "draw_seed": draw_seed, **facts}
        if settings.batch_norm_images is not None or score is not None:
            module = module if module is not None else target.build()
            module.load_state_dict(state)
            module.to(model.device)
        if settings.batch_norm_images is not None:
            names, provenance["num_batch_norm_images"] = reestimate_batch_norm(module, settings.batch_norm_images)
            for name in names:
                state[name] = module.state_dict()[name].cpu().clone()
                draw_origins[name] = "re-estimated"
        if score is not None:
            provenance |= {"score": _score(score, module), "ranked_by": ranked_by}
        provenance["tensors"] = {name: draw_origins[target.tied.get(name, name)] for name in target.tensor_order}
        provenance["entries"] = entries_by_origin(provenance["tensors"], state)
        yield GeneratedModel(state, provenance, target)


def _score(score: Scorer, module: nn.Module) -> float | None:
    with torch.enable_grad():  # a pipeline runs without gradients, and a score may be that of a trained head
        value = float(score(module.eval()))
    if not math.isfinite(value):  # and JSON knows none of them
        logger.warning(f"rank returned {value} for a candidate; it comes last, its score is None.")
        return None
    return value


def _rank_key(model: GeneratedModel) -> float:
    """Best first; without a score last."""
    score = model.provenance["score"]
    return math.inf if score is None else -score


def _check_decoded(tensors: Mapping[str, Tensor], target: Target, settings: GenerationSettings) -> None:
    for name, value in tensors.items():
        if first_nonfinite(value) is not None:
            raise ValueError(
                f"The backbone decoded NaN or infinite values for tensor {name} of {target.name} ({value.dtype}). "
                "Check the backbone (was its training stable?), or lower the bandwidth."
            )
        if name.endswith("running_var") and settings.batch_norm_images is None and bool((value < 0).any()):
            logger.warning_once(
                f"{name}: sampled variances are negative, so this batch norm gives NaN. Pass batch_norm_images to "
                "re-estimate the statistics, or carry them (feature extractor: batch_norm_statistics='carry')."
            )


def _facts(
    model: PreTrainedModel, feature_extractor: WSLFeatureExtractor, plan: GenerationPlan, windows: dict[str, Any]
) -> dict[str, Any]:
    settings, target = plan.settings, plan.target
    revision = getattr(model.config, "_commit_hash", None)
    dtype = windows["autocast_dtype"]
    return {
        "target": {"name": target.name, "library": target.library, "arguments": target.arguments},
        "anchors": [anchor.facts() for anchor in plan.anchors],
        "backbone": {
            "name": model.name_or_path,
            "revision": revision,
            # a commit of the Hub names the weights; nothing else does
            "sha256": open_checkpoint(model).sha256() if revision is None else None,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
        },
        "feature_extractor": {name: getattr(feature_extractor, name) for name in EXTRACTOR_SETTINGS},
        "seed": settings.seed,
        "num_candidates": settings.num_draws,
        "noise": settings.noise,
        "bandwidth": settings.bandwidth,
        "window_size": windows["window_size"],
        "halo": windows["halo"],
        "batch_size": windows["batch_size"],
        "autocast_dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "versions": package_versions(),
        "tied": dict(target.tied),
    }


def _hidden(progress: bool) -> bool:
    return not progress or not logging.is_progress_bar_enabled()
