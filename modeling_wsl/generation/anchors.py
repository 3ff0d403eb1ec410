"""Anchors: trained models whose latents seed the sampling, matched to the target by name before any work is done."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..checkpoints.canonical import same_network
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.constants import find_constants
from ..checkpoints.identity.spelling import counterparts
from ..tokens.manifest import TensorSpec, check_choice
from .targets import Target


logger = logging.get_logger(__name__)

AnchorSource = Mapping[str, Tensor] | nn.Module | Checkpoint | str | PathLike
REPORTED_MISMATCHES = 5


@dataclass(frozen=True)
class Anchor:
    """A checkpoint, seen through the names of the target.

    Attributes:
        checkpoint: where the weights are read from.
        names: name of a stored target tensor -> its name in the checkpoint.
        adapted: name of a kernel of the stem -> its inputs and the image's channels in the target, where the
            checkpoint's kernel has other ones (`adapt_input_channels`).
    """

    checkpoint: Checkpoint
    names: Mapping[str, str]
    adapted: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def state_dict(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors under the target's names and in the given order, checked to be finite.

        A plain dict and not a `Checkpoint`: as remote code, the feature extractor's class of that name is another one.

        Raises:
            NonFiniteWeightsError: unless the anchors were opened with `allow_nonfinite`.
        """
        state, stored = {}, set()
        for name in names:
            stored_name = self.checkpoint.tied.get(self.names[name], self.names[name])
            value = self.read(name)
            self.checkpoint.check_finite(stored_name, value)
            # One tensor under two names of the target would be taken for tied, and tokenized once.
            state[name] = value.clone() if stored_name in stored else value
            stored.add(stored_name)
        return state

    def read(self, name: str) -> Tensor:
        """The tensor that the target calls `name`, adapted where `adapted` says so; read-only."""
        value = self.checkpoint.read(self.names[name])
        return adapt_input_channels(value, *self.adapted[name]) if name in self.adapted else value

    def is_constant(self, name: str) -> bool:
        """Whether what the target calls `name` is a constant in the checkpoint."""
        return self.names.get(name) in self.checkpoint.constants

    def facts(self) -> dict[str, Any]:
        """The facts that provenance holds about it."""
        checkpoint = self.checkpoint
        return {
            "source": checkpoint.source,
            "revision": checkpoint.revision,
            "library": checkpoint.library,
            "sha256": checkpoint.sha256(),
            **({"stored_as": sorted(set(checkpoint.stored_as.values()))} if checkpoint.stored_as else {}),
        }


@dataclass(frozen=True)
class Matched:
    """Anchors that fit a target.

    Attributes:
        anchors: in the order given.
        initialized: the stored tensors that the target's library initializes.
        adapted: tensors that an anchor has in another shape -> `anchor_shape` (of the first such anchor; None where it
            has no such tensor), `shape`, `how` ("adapted" or "initialized") and `anchors` (the indices of these).
    """

    anchors: list[Anchor]
    initialized: frozenset[str]
    adapted: dict[str, dict[str, Any]]


def match_anchors(
    target: Target,
    checkpoints: Sequence[Checkpoint],
    tokenized: frozenset[str],
    initialize: Sequence[str] = (),
    stem: str = "adapt",
) -> Matched:
    """Finds every tensor of the target in every anchor; reads headers only (and tensors that may be tied).

    Args:
        target: what is generated.
        checkpoints: the anchors, opened.
        tokenized: the stored tensors of the target that tokens are made of; a missing other one (a batch norm's
            counter) is initialized.
        initialize: modules or tensors of the target (names, or prefixes up to a dot) to initialize, not to sample.
        stem: what becomes of kernels for images of another number of channels: "adapt" (see `adapt_input_channels`),
            or "initialize".

    Returns:
        The anchors. Initialized are tensors that were asked for, those of the head that an anchor has in another
        shape, those of the stem where `stem` says so, and non-weights that an anchor lacks.

    Raises:
        ValueError: a tensor is missing, superfluous, of another shape or of another kind; the message names each.
    """
    check_choice("stem", stem, ("adapt", "initialize"))
    initialized = named_tensors(target, initialize)
    anchors, adapted = [], {}
    for index, checkpoint in enumerate(checkpoints):
        match = _match(target, checkpoint, tokenized, initialized, stem)
        if problems := match.problems:
            more = f"; and {len(problems) - REPORTED_MISMATCHES} more" if len(problems) > REPORTED_MISMATCHES else ""
            raise ValueError(
                f"Anchor {index} ({checkpoint.source}) does not match the target {target.name}: "
                f"{'; '.join(problems[:REPORTED_MISMATCHES])}{more}. An anchor must be of the target's architecture. "
                "If only the classifier or the channels of the images differ, pass num_classes= or in_channels=<those "
                "of the target>, or name what to initialize: initialize=['fc']."
            )
        anchors.append(Anchor(checkpoint, match.names, match.adapted))
        initialized |= match.absent
        for name, shape in match.reshaped.items():
            how = "adapted" if name in match.adapted else "initialized"
            shapes = {"anchor_shape": shape, "shape": list(target.tensors[name].shape)}
            adapted.setdefault(name, {**shapes, "how": how, "anchors": []})["anchors"].append(index)
    return Matched(anchors, frozenset(initialized), adapted)


def named_tensors(target: Target, prefixes: Sequence[str]) -> set[str]:
    """The stored tensors that `initialize` names, itself or by the module that they belong to."""
    names: set[str] = set()
    for prefix in prefixes:
        named = {name for name in target.tensors if name == prefix or name.startswith(prefix.rstrip(".") + ".")}
        if not named:
            tied = [f"{alias} is tied to {name}" for alias, name in target.tied.items() if alias.startswith(prefix)]
            raise ValueError(
                f"initialize={prefix!r} names no stored tensor of {target.name}"
                f"{': ' + ', '.join(tied) if tied else ''}. Give a tensor's name or a module's, such as 'fc'."
            )
        names |= named
    return names


@dataclass
class _Match:
    names: dict[str, str] = field(default_factory=dict)  # of the target -> of the anchor
    adapted: dict[str, tuple[int, int]] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)  # to be initialized
    reshaped: dict[str, list[int] | None] = field(default_factory=dict)  # of head and stem -> shape in the anchor
    problems: list[str] = field(default_factory=list)


def _match(
    target: Target, checkpoint: Checkpoint, tokenized: frozenset[str], initialized: set[str], stem: str
) -> _Match:
    there = {**checkpoint.tensors, **_aliases(checkpoint)}
    aliases: dict[str, list[str]] = {}
    for alias, name in target.tied.items():
        aliases.setdefault(name, []).append(alias)
    match, constants = _Match(), checkpoint.constants | find_constants(target.tensors)
    spelled = counterparts(target.tensor_order or target.tensors, there, constants)
    resizable = target.head if stem == "adapt" else target.head | target.stem  # by initialization
    for name, spec in target.tensors.items():
        candidates = [spelled.get(candidate, candidate) for candidate in (name, *aliases.get(name, ()))]
        candidates = [candidate for candidate in candidates if candidate in there]
        if name in initialized and name not in resizable:
            continue
        if not candidates:
            if name in resizable or name not in tokenized:
                match.absent.add(name)
                if name in resizable:
                    match.reshaped[name] = None
            else:
                match.problems.append(f"tensor {name} {list(spec.shape)} of the target is missing in the anchor")
            continue
        given = there[candidates[0]]
        if given.torch_dtype.is_floating_point != spec.torch_dtype.is_floating_point:
            match.problems.append(f"tensor {name} is {given.dtype} in the anchor and {spec.dtype} in the target")
            continue
        if given.shape != spec.shape:
            if name in resizable:
                match.absent.add(name)
                match.reshaped[name] = list(given.shape)
                continue
            if name not in target.stem or not can_adapt(given.shape, spec.shape, target.in_channels):
                hint = "; it cannot be adapted, pass stem='initialize'" if name in target.stem else ""
                match.problems.append(
                    f"tensor {name} has shape {list(given.shape)} in the anchor and {list(spec.shape)} in the "
                    f"target{hint}"
                )
                continue
            match.reshaped[name] = list(given.shape)
            match.adapted[name] = (spec.shape[1], target.in_channels)
        match.names[name] = candidates[0]
        match.problems += _untied(checkpoint, candidates)
    known = {*target.tensor_order, *target.tensors, *target.head, *target.stem, *match.names.values()}
    known |= set(spelled.values())
    for name, spec in checkpoint.tensors.items():
        aliased = {name, *(alias for alias, stored in checkpoint.tied.items() if stored == name)}
        # Integers (position ids of older files) and constants hold no weights; a target that does not know them does
        # without.
        is_weight = spec.torch_dtype.is_floating_point and name not in checkpoint.constants
        if is_weight and not aliased & known:
            match.problems.append(f"tensor {name} {list(spec.shape)} of the anchor is not in the target")
    return match


def distinct_anchors(checkpoints: Sequence[Checkpoint]) -> list[int]:
    """The indices of the anchors that are not the same network as an earlier one, under whatever wrapper; says so."""
    kept: list[int] = []
    for index, checkpoint in enumerate(checkpoints):
        same = (at for at in kept if checkpoints[at] is checkpoint or same_network(checkpoints[at], checkpoint))
        if (first := next(same, None)) is None:
            kept.append(index)
        else:
            logger.warning(f"Anchor {index} ({checkpoint.source}) is the network of anchor {first}: it counts once.")
    return kept


def _untied(checkpoint: Checkpoint, names: list[str]) -> list[str]:
    """Names that are one tensor in the target must hold the same values in the anchor."""
    first = names[0]
    return [
        f"tensors {first} and {other} are tied in the target and differ in the anchor"
        for other in names[1:]
        if checkpoint.tied.get(other, other) != checkpoint.tied.get(first, first)
        and not torch.equal(checkpoint.read(first), checkpoint.read(other))
    ]


def _aliases(checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    return {alias: checkpoint.tensors[name] for alias, name in checkpoint.tied.items()}


def can_adapt(shape: tuple[int, ...], wanted: tuple[int, ...], in_channels: int) -> bool:
    """Whether `adapt_input_channels` can turn a tensor of one shape into one of another: kernels, no flat matrices.

    A matrix `[out, patch entries]` does not say in which order the entries of a patch lie.
    """
    if len(shape) < 3 or len(shape) != len(wanted) or (shape[0], *shape[2:]) != (wanted[0], *wanted[2:]):
        return False
    return wanted[1] % in_channels == 0 and shape[1] % (wanted[1] // in_channels) == 0


def adapt_input_channels(kernel: Tensor, num_inputs: int, in_channels: int) -> Tensor:
    """A trained stem's kernel for images of another number of channels, before it is encoded.

    For images of one channel, the kernel's channels are added up: an image whose channels are equal then gives what
    it gave before. Otherwise they are repeated in their order as often as needed and divided by how much more input
    there is, so that activations keep their size. This is timm's rule, for any two numbers of channels; a
    space-to-depth stem, whose inputs are several blocks of the image's channels, is adapted block by block.

    Args:
        kernel: `[out, blocks * channels, ...]`, see `can_adapt`.
        num_inputs: blocks * `in_channels`.
        in_channels: of the images that the new kernel is for.

    Returns:
        `[out, num_inputs, ...]`, at least float32.
    """
    blocks = num_inputs // in_channels
    parts = kernel.to(torch.promote_types(kernel.dtype, torch.float32)).unflatten(1, (blocks, -1))
    channels = parts.shape[2]
    if in_channels == 1:
        return parts.sum(2)
    order = torch.arange(in_channels) % channels
    return (parts[:, :, order] * (channels / in_channels)).flatten(1, 2)
