"""Draws become models: latents -> tokens -> weights -> a model of the target's library.

`plan_generation` checks everything that can be checked from names and shapes; `generate` then does the work. Beside
the models that are kept, one candidate is in memory at a time.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..backbone.encoding import decode_haloed
from ..backbone.inference import inference_backbone
from ..checkpoints.checkpoint import first_nonfinite, open_checkpoint
from .batch_norm import reestimate_batch_norm
from .draws import draw_seeds, latent_source
from .generated_model import GeneratedModel, entries_by_origin, package_versions
from .plan import GenerationPlan
from .ranking import Scorer, scorer
from .settings import GenerationSettings
from .targets import Target


logger = logging.get_logger(__name__)

EXTRACTOR_SETTINGS = ("tokenization", "token_size", "position_unit", "batch_norm_statistics", "layer_normalization")


def generate(model: PreTrainedModel, plan: GenerationPlan) -> list[GeneratedModel]:
    """Carries out a plan.

    Args:
        model: the backbone, in eval mode.
        plan: see `plan_generation`.

    Returns:
        `num_samples` models: the best of all rounds first where they are ranked, else in the order drawn.

    Raises:
        ValueError: the backbone decodes numbers that are not finite.
    """
    settings = plan.settings
    windows = {
        "window_size": settings.window_size or model.config.window_size,
        "halo": settings.halo,
        "batch_size": settings.batch_size,
        "autocast_dtype": settings.autocast_dtype,
    }
    source = latent_source(plan, model, windows)
    builder = CandidateBuilder(model, plan, windows, source.facts())
    seeds = draw_seeds(settings.seed, settings.total_draws)
    kept: list[GeneratedModel] = []
    best: list[tuple[float, Tensor]] = []  # of the round: (key, latents)
    for draw, seed in enumerate(tqdm(seeds, desc="Generating", unit="model", disable=_hidden(settings.progress))):
        generator = torch.Generator().manual_seed(seed)
        round_number, index = divmod(draw, settings.num_draws)
        if round_number and index == 0:
            if not best:
                raise ValueError(
                    f"No candidate of round {round_number - 1} has a finite score to begin the next with."
                )
            source, best = replace(source, latents=torch.stack([latents for _, latents in best])), []
        latents, facts = source.draw(index, generator)
        facts = {"draw": draw, "draw_seed": seed, "round": round_number, **facts}
        candidate = builder.build(latents, seed, facts)
        kept.append(candidate)
        if settings.rank is not None:
            kept.sort(key=_rank_key)  # stable: the earlier draw wins a tie
            del kept[settings.num_samples :]
        if round_number < settings.bootstrap_rounds and _rank_key(candidate) < math.inf:
            best.append((_rank_key(candidate), latents))
            best.sort(key=lambda entry: entry[0])
            del best[settings.num_samples :]
        del candidate  # or it would stay while the next one is made
    return kept


class CandidateBuilder:
    """Turns latents into a model: decoded, completed by what is not sampled, conditioned and scored.

    Args:
        model: the backbone.
        plan: what is generated.
        windows: options of `decode_haloed`.
        facts: what provenance says about where the latents come from.
    """

    def __init__(
        self, model: PreTrainedModel, plan: GenerationPlan, windows: dict[str, Any], facts: Mapping[str, Any]
    ) -> None:
        self.model, self.plan = model, plan
        # Once for all candidates.
        self.fast, dtype = inference_backbone(model, windows["autocast_dtype"], plan.settings.precision)
        self.windows = {**windows, "autocast_dtype": dtype}
        self.positions = plan.manifest.positions()
        carried = [spec.name for spec in plan.manifest.carried if spec.name not in plan.initialized]
        self.inherited = {name: plan.anchors[0].read(name) for name in carried}
        self.origins = {spec.name: "sampled" for layer in plan.manifest.layers for spec in layer.tensors}
        if carried:
            self.origins |= dict.fromkeys(carried, f"inherited: {plan.anchors[0].checkpoint.source}")
        self.origins |= dict.fromkeys(plan.initialized, plan.target.initialization)
        computed_in = str(self.fast.dtype if dtype is None else dtype).removeprefix("torch.")
        self.facts = {**_facts(model, plan, windows), "computed_in": computed_in, **facts}
        rank = plan.settings.rank
        self.score, self.ranked_by = scorer(rank) if rank is not None else (None, None)

    def build(self, latents: Tensor, seed: int, facts: Mapping[str, Any]) -> GeneratedModel:
        """The model of latents `[T, latent_size]`; the seed is that of what its library initializes."""
        target, settings, module = self.plan.target, self.plan.settings, None
        tokens = decode_haloed(self.fast, latents, self.positions, **self.windows, progress=settings.progress)
        stored = self.plan.feature_extractor.decode(tokens, self.plan.manifest, carried={})
        _check_decoded(stored, target, settings)
        # Every model owns its tensors: changing one of them must not change the anchor or another model.
        own = {name: value.to(target.tensors[name].torch_dtype, copy=True) for name, value in self.inherited.items()}
        stored |= own
        if self.plan.initialized:
            module = target.build(seed)
            fresh = module.state_dict()
            stored |= {name: fresh[name].detach().clone() for name in self.plan.initialized}
        state = {name: stored[target.tied.get(name, name)] for name in target.tensor_order}
        origins = dict(self.origins)
        provenance = copy.deepcopy({**facts, **self.facts})  # each model has its own
        if settings.batch_norm_images is not None or self.score is not None:
            module = module if module is not None else target.build()
            module.load_state_dict(state)
            module.to(self.model.device)
        if settings.batch_norm_images is not None:
            names, provenance["num_batch_norm_images"] = reestimate_batch_norm(module, settings.batch_norm_images)
            for name in names:
                state[name] = module.state_dict()[name].cpu().clone()
                origins[name] = "re-estimated"
        if self.score is not None:
            provenance |= {"score": _score(self.score, module), "ranked_by": self.ranked_by}
        provenance["tensors"] = {name: origins[target.tied.get(name, name)] for name in target.tensor_order}
        provenance["entries"] = entries_by_origin(provenance["tensors"], state)
        return GeneratedModel(state, provenance, target)


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


def _facts(model: PreTrainedModel, plan: GenerationPlan, windows: Mapping[str, Any]) -> dict[str, Any]:
    settings, target = plan.settings, plan.target
    revision = getattr(model.config, "_commit_hash", None)
    dtype = windows["autocast_dtype"]
    return {
        "target": {"name": target.name, "library": target.library, "arguments": target.arguments},
        "anchors": [anchor.facts() for anchor in plan.anchors],
        "adapted": plan.adapted,
        "backbone": {
            "name": model.name_or_path,
            "revision": revision,
            # a commit of the Hub names the weights; nothing else does
            "sha256": open_checkpoint(model).sha256() if revision is None else None,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
        },
        "feature_extractor": {name: getattr(plan.feature_extractor, name) for name in EXTRACTOR_SETTINGS},
        "seed": settings.seed,
        "num_samples": settings.num_samples,
        "num_candidates": settings.num_draws,
        "total_draws": settings.total_draws,
        "bootstrap_rounds": settings.bootstrap_rounds,
        "window_size": windows["window_size"],
        "halo": windows["halo"],
        "batch_size": windows["batch_size"],
        "autocast_dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "versions": package_versions(),
        "tied": dict(target.tied),
    }


def _hidden(progress: bool) -> bool:
    return not progress or not logging.is_progress_bar_enabled()
