"""Checks before any work is done: that target, anchors and settings fit each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..checkpoints.checkpoint import open_checkpoint
from ..checkpoints.constants import find_constants
from ..feature_extraction_wsl import WSLFeatureExtractor
from ..tokens.layer_normalization import check_layers
from ..tokens.manifest import WeightManifest
from .anchors import Anchor, AnchorSource, distinct_anchors, match_anchors
from .settings import GenerationSettings
from .targets import Target, resolve_target


@dataclass(frozen=True)
class GenerationPlan:
    """A generation that has been checked and not begun.

    Attributes:
        feature_extractor: the backbone's.
        target: what is generated.
        method: "density" or "interpolation".
        anchors: in the order given, each network once.
        manifest: the tokens of the tensors that are sampled.
        initialized: stored tensors that the target's library initializes.
        adapted: see `Matched`.
        settings: how to draw.
        given: which of the anchors that were given these are.
    """

    feature_extractor: WSLFeatureExtractor
    target: Target
    method: str
    anchors: list[Anchor]
    manifest: WeightManifest
    initialized: frozenset[str]
    adapted: dict[str, dict[str, Any]]
    settings: GenerationSettings
    given: tuple[int, ...] = ()


def list_anchors(anchors: AnchorSource | Sequence[AnchorSource] | None) -> list[AnchorSource]:
    """One anchor, several or none as a list."""
    if anchors is None:
        return []
    return list(anchors) if isinstance(anchors, list | tuple) else [anchors]


def plan_generation(
    feature_extractor: WSLFeatureExtractor,
    target: Any,
    anchors: AnchorSource | Sequence[AnchorSource],
    settings: GenerationSettings,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    target_kwargs: Mapping[str, Any] | None = None,
    target_revision: str | None = None,
    initialize: Sequence[str] = (),
    stem: str = "adapt",
    **options: Any,
) -> GenerationPlan:
    """Resolves target and anchors and checks that they fit; of several anchors reads as much as tells them apart.

    Args:
        feature_extractor: the backbone's.
        target, num_classes, in_channels, target_kwargs: see `resolve_target`.
        target_revision: branch, tag or commit, where the target is a Hub id.
        anchors: trained models of the target's architecture: paths, Hub ids, modules, state dicts, checkpoints.
        settings: how to draw.
        initialize: modules or tensors of the target to initialize anew instead of sampling them.
        stem: where an anchor is for images of another number of channels, see `match_anchors`.
        options: for `open_checkpoint` (`revision`, `token`, `allow_nonfinite`, ...), applied to every anchor.

    Raises:
        ValueError: target, anchors and settings do not fit, or a ranking by accuracy is asked for a head that is
            initialized.
        CheckpointError: an anchor cannot be read safely.
    """
    sources, given = list_anchors(anchors), []
    method = settings.method_for(len(sources))  # before anything is read
    # A revision is that of an anchor; a token may open both.
    hub_options = {"revision": target_revision, "token": options.get("token")}
    resolved = resolve_target(target, num_classes, target_kwargs, in_channels=in_channels, **hub_options)
    constants = find_constants(resolved.tensors)
    layout = feature_extractor.layout(resolved.tensors, constants=constants)
    tokenized = frozenset(spec.name for layer in layout.layers for spec in layer.tensors)
    opened = [open_checkpoint(source, **options) for source in sources]
    given = distinct_anchors(opened)
    opened = [opened[index] for index in given]
    method = settings.method_for(len(opened))
    matched = match_anchors(resolved, opened, tokenized, initialize, stem)
    # A table of sines is told by its values, which the target does not have yet.
    constants |= {name for name in resolved.tensors if all(a.is_constant(name) for a in matched.anchors)}
    layout = feature_extractor.layout(resolved.tensors, constants=constants)
    initialized = matched.initialized
    random = sorted(initialized & {spec.name for layer in layout.layers for spec in layer.tensors})
    if settings.rank is not None and not callable(settings.rank) and random:
        raise ValueError(
            f"rank: {', '.join(random[:5])} of {resolved.name} {'is' if len(random) == 1 else 'are'} initialized at "
            "random, so accuracy on a validation loader would rank noise. Pass a function that trains the model "
            "first, or no rank."
        )
    _check_images(settings.batch_norm_images, resolved)
    needs_module = initialized or settings.rank is not None or settings.batch_norm_images is not None
    if needs_module and resolved.library == "plain":
        resolved.build()  # says that it cannot, and why
    sampled = {spec.name for layer in layout.layers for spec in layer.tensors} - initialized
    kept = sampled | {spec.name for spec in layout.carried}
    manifest = feature_extractor.layout(
        {name: spec for name, spec in resolved.tensors.items() if name in kept}, constants=constants
    )
    if not manifest.layers:
        raise ValueError(f"Nothing is left to sample of {resolved.name}: all its tensors are initialized or carried.")
    if feature_extractor.layer_normalization is not None:
        check_layers(manifest, feature_extractor.layer_normalization, resolved.name)
    return GenerationPlan(
        feature_extractor,
        resolved,
        method,
        matched.anchors,
        manifest,
        initialized,
        matched.adapted,
        settings,
        tuple(given),
    )


def _check_images(images: Any, target: Target) -> None:
    if isinstance(images, Tensor) and target.in_channels and images.dim() == 4:
        channels = images.shape[1]
        if channels != target.in_channels:
            raise ValueError(
                f"batch_norm_images have {channels} channels, the target {target.name} takes {target.in_channels}. "
                "Pass in_channels= for the target, or other images."
            )
