"""The arms of a comparison and the weights that each of them starts from."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from datasets_scripts.embedding.linear_projection import LinearBaseline, random_projection
from modeling_wsl.generation.draws import draw_seeds
from modeling_wsl.generation.generated_model import GeneratedModel

from .comparison import Comparison, State
from .controls import inherited_only, permuted, projected, rotated, with_noise
from .donor_arms import DonorComparison
from .evaluate_config import ON_REQUEST
from .weight_comparison import relative_error


# Arms that need the generated models of their seed; they are made one after the other.
DISTURBED = {"anchor + noise": with_noise, "anchor rotated": rotated}
FROM_GENERATED = ("generated", *DISTURBED, "inherited only")


@dataclass(frozen=True)
class InitialWeights:
    """The weights that a run starts from.

    Attributes:
        state: the target's stored tensors.
        anchor: the anchor that they are compared with; None where there is none.
        facts: JSON: `score` on the validation split and so on.
        model: the generated model, where it is one.
    """

    state: State
    anchor: int | None
    facts: dict[str, Any]
    model: GeneratedModel | None = None


@dataclass(frozen=True)
class Reference:
    """Facts of the generated models of a seed that its other arms need.

    Attributes:
        state: stored tensors of the best one.
        anchor: the anchor next to it.
        origins: stored tensor -> where it came from.
    """

    state: State
    anchor: int
    origins: dict[str, str]


def skip_reason(comparison: Comparison, arm: str) -> str | None:
    """The reason why an arm cannot be run at all; None where it can."""
    if isinstance(comparison, DonorComparison):
        return comparison.skip_reason(arm)
    protocol, anchors = comparison.protocol, len(comparison.plan.anchors)
    if arm == "PCA" and comparison.pca is None:
        return "no tokenized dataset was given to fit PCA on (option 'tokens')"
    if arm in ON_REQUEST and (protocol.finetune is not None or not getattr(protocol, ON_REQUEST[arm])):
        return f"of the few-shot protocol, and not asked for (option '{ON_REQUEST[arm]}')"
    if arm == "interpolated" and anchors < 2:
        return "there is one anchor only"
    return None


def initial_weights(
    comparison: Comparison, arm: str, seed: int, reference: Callable[[], Reference]
) -> list[InitialWeights]:
    """The weights that an arm's runs of one seed start from; one, or as many as the protocol keeps.

    Args:
        comparison: see there.
        arm: of `ARMS`, and not skipped.
        seed: of everything that the arm draws.
        reference: gives the generated models' best one where the arm asks for it.
    """
    if isinstance(comparison, DonorComparison):
        return [InitialWeights(one.state, None, one.facts) for one in comparison.weights(arm, seed)]
    if arm == "scratch":
        return [InitialWeights(comparison.scratch(seed), None, {})]
    if arm == "inherited only":
        generated = reference()
        state = inherited_only(generated.state, generated.origins, comparison.scratch(seed))
        return [] if state is None else [InitialWeights(state, None, {})]
    if arm in DISTURBED:
        return _best_disturbed(comparison, arm, seed, reference())
    anchors = range(len(comparison.plan.anchors))
    if arm == "generated":
        models = comparison.draw(anchors, seed)
    elif arm == "bootstrapped":
        models = comparison.draw(anchors, seed, bootstrap_rounds=comparison.protocol.bootstrap_rounds)
    elif arm == "interpolated":
        options = {"num_samples": comparison.protocol.interpolation_points, "num_candidates": None, "rank": None}
        models = comparison.draw(anchors[:2], seed, method="interpolation", **options)
    elif arm == "reconstructed":
        options = {"num_samples": 1, "num_candidates": None, "rank": None, "bandwidth": 0.0}
        models = [model for index in anchors for model in comparison.draw([index], seed, **options)]
        return [_from_model(comparison, model, seed, index) for index, model in zip(anchors, models, strict=True)]
    else:
        return [_control(comparison, arm, index, seed) for index in anchors]
    return [_from_model(comparison, model, seed, -1) for model in models]


def reference_of(comparison: Comparison, generated: InitialWeights) -> Reference:
    """Takes from a generated model what other arms need."""
    origins = generated.model.provenance["tensors"]
    return Reference(generated.state, generated.anchor, {name: origins[name] for name in generated.state})


def _from_model(comparison: Comparison, model: GeneratedModel, seed: int, anchor: int | None) -> InitialWeights:
    """With `anchor` -1: the anchor next to the model, which a draw from several began at."""
    state = comparison.stored(model.state_dict)
    if anchor == -1:
        distances = [
            relative_error(state, comparison.anchor(index, seed), comparison.sampled)
            for index in range(len(comparison.plan.anchors))
        ]
        anchor = distances.index(min(distances))
    known = ("draw_seed", "score", "weight_of_second_anchor")
    facts = {name: model.provenance[name] for name in known if name in model.provenance}
    return InitialWeights(state, anchor, facts, model)


def _control(comparison: Comparison, arm: str, index: int, seed: int) -> InitialWeights:
    anchor = comparison.anchor(index, seed)
    if arm == "anchor":
        return InitialWeights(anchor, index, {})
    if arm == "anchor permuted":
        state = permuted(anchor, comparison.sampled, seed)
    else:
        directions = comparison.pca if arm == "PCA" else _random_directions(comparison, seed)
        state = projected(comparison.plan.feature_extractor, directions, anchor, comparison.sampled)
    return InitialWeights(comparison.conditioned(state), index, {})


def _random_directions(comparison: Comparison, seed: int) -> LinearBaseline:
    return random_projection(comparison.latent_size, comparison.plan.feature_extractor.token_size, seed)


def _best_disturbed(comparison: Comparison, arm: str, seed: int, reference: Reference) -> list[InitialWeights]:
    """The best disturbed anchors, tried as often and chosen as the generated models are: without this, the selection
    alone would set the generated arm apart."""
    kept: list[InitialWeights] = []
    for candidate in _disturbed(comparison, arm, seed, reference):
        kept.append(candidate)
        if comparison.ranked_by:
            kept.sort(key=_rank_key)  # stable: the earlier draw wins a tie
            del kept[comparison.protocol.num_kept :]
    return kept


def _disturbed(comparison: Comparison, arm: str, seed: int, reference: Reference) -> Iterator[InitialWeights]:
    protocol, anchors = comparison.protocol, len(comparison.plan.anchors)
    near = comparison.anchor(reference.anchor, seed)
    draws = protocol.num_candidates if comparison.ranked_by else protocol.num_kept
    for number, draw_seed in enumerate(draw_seeds(seed, draws)):
        index = (reference.anchor + number) % anchors  # each anchor in turn, as draws come from all of them
        anchor = comparison.anchor(index, seed)
        state = DISTURBED[arm](anchor, near, reference.state, comparison.sampled, draw_seed)
        state = comparison.conditioned(state)
        score = comparison.score(comparison.module(state)) if comparison.ranked_by else None
        score = score if score is not None and math.isfinite(score) else None
        yield InitialWeights(state, index, {"draw_seed": draw_seed, "score": score})


def _rank_key(weights: InitialWeights) -> float:
    """Best first; without a finite score last."""
    score = weights.facts["score"]
    return math.inf if score is None else -score
