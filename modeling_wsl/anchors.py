"""Anchors: trained models whose latents seed the sampling, matched to the target by name before any work is done."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints import Checkpoint, open_checkpoint
from .manifest import TensorSpec
from .targets import Target


AnchorSource = Mapping[str, Tensor] | nn.Module | Checkpoint | str | PathLike
REPORTED_MISMATCHES = 5


@dataclass(frozen=True)
class Anchor:
    """A checkpoint, seen through the names of the target.

    Attributes:
        checkpoint: where the weights are read from.
        names: name of a stored target tensor -> its name in the checkpoint.
    """

    checkpoint: Checkpoint
    names: Mapping[str, str]

    def state_dict(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors under the target's names and in the given order, checked to be finite.

        A plain dict and not a `Checkpoint`: as remote code, the feature extractor's class of that name is another one.

        Raises:
            NonFiniteWeightsError: unless the anchors were opened with `allow_nonfinite`.
        """
        state, stored = {}, set()
        for name in names:
            found = self.checkpoint.tied.get(self.names[name], self.names[name])
            value = self.read(name)
            self.checkpoint.check_finite(found, value)
            # One tensor under two names of the target would be taken for tied, and tokenised once.
            state[name] = value.clone() if found in stored else value
            stored.add(found)
        return state

    def read(self, name: str) -> Tensor:
        """The tensor that the target calls `name`; read-only."""
        return self.checkpoint.read(self.names[name])

    def facts(self) -> dict[str, Any]:
        """What provenance says about it."""
        checkpoint = self.checkpoint
        return {
            "source": checkpoint.source,
            "revision": checkpoint.revision,
            "library": checkpoint.library,
            "sha256": checkpoint.sha256(),
        }


def open_anchors(anchors: AnchorSource | Sequence[AnchorSource], **options: Any) -> list[Checkpoint]:
    """Opens one anchor or several; options as in `open_checkpoint`.

    Raises:
        ValueError: no anchor at all.
        CheckpointError: one cannot be read safely.
    """
    sources = list(anchors) if isinstance(anchors, list | tuple) else [anchors]
    if not sources:
        raise ValueError("anchors is empty: give one trained model of the target's architecture, or more.")
    return [open_checkpoint(source, **options) for source in sources]


def match_anchors(
    target: Target, checkpoints: Sequence[Checkpoint], tokenised: frozenset[str], initialise: Sequence[str] = ()
) -> tuple[list[Anchor], frozenset[str]]:
    """Finds every tensor of the target in every anchor; reads headers only (and tensors that may be tied).

    Args:
        target: what is generated.
        checkpoints: the anchors.
        tokenised: the stored tensors of the target that tokens are made of; a missing other one (a batch norm's
            counter) is initialised.
        initialise: modules or tensors of the target (names, or prefixes up to a dot) to initialise, not to sample.

    Returns:
        The anchors, and the stored tensors that are initialised: those asked for, those of the classifier (only if
        `num_classes` was given) that an anchor has in another shape, and non-weights that an anchor lacks.

    Raises:
        ValueError: a tensor is missing, superfluous, of another shape or of another kind; the message names each.
    """
    initialised = _matching(target, initialise)
    anchors = []
    for index, checkpoint in enumerate(checkpoints):
        names, problems, absent = _match(target, checkpoint, tokenised, initialised)
        if problems:
            more = f"; and {len(problems) - REPORTED_MISMATCHES} more" if len(problems) > REPORTED_MISMATCHES else ""
            raise ValueError(
                f"Anchor {index} ({checkpoint.source}) does not match the target {target.name}: "
                f"{'; '.join(problems[:REPORTED_MISMATCHES])}{more}. An anchor must be of the target's architecture. "
                "If only the classifier differs, pass num_classes=<classes of the target> and it is initialised, or "
                "name what to initialise: initialise=['fc']."
            )
        anchors.append(Anchor(checkpoint, names))
        initialised |= absent
    return anchors, frozenset(initialised)


def _matching(target: Target, prefixes: Sequence[str]) -> set[str]:
    names: set[str] = set()
    for prefix in prefixes:
        found = {name for name in target.tensors if name == prefix or name.startswith(prefix.rstrip(".") + ".")}
        if not found:
            tied = [f"{alias} is tied to {name}" for alias, name in target.tied.items() if alias.startswith(prefix)]
            raise ValueError(
                f"initialise={prefix!r} names no stored tensor of {target.name}"
                f"{': ' + ', '.join(tied) if tied else ''}. Give a tensor's name or a module's, such as 'fc'."
            )
        names |= found
    return names


def _match(
    target: Target, checkpoint: Checkpoint, tokenised: frozenset[str], initialised: set[str]
) -> tuple[dict[str, str], list[str], set[str]]:
    """(target name -> anchor name, what does not match, what is to be initialised)"""
    there = {**checkpoint.tensors, **_aliases(checkpoint)}
    aliases: dict[str, list[str]] = {}
    for alias, name in target.tied.items():
        aliases.setdefault(name, []).append(alias)
    names, problems, absent = {}, [], set()
    for name, spec in target.tensors.items():
        candidates = [candidate for candidate in (name, *aliases.get(name, ())) if candidate in there]
        if name in initialised:
            continue
        if not candidates:
            if name in target.head or name not in tokenised:
                absent.add(name)
            else:
                problems.append(f"tensor {name} {list(spec.shape)} of the target is missing in the anchor")
            continue
        found = there[candidates[0]]
        if found.shape != spec.shape:
            if name in target.head:
                absent.add(name)
            else:
                problems.append(
                    f"tensor {name} has shape {list(found.shape)} in the anchor and {list(spec.shape)} in the target"
                )
        elif found.torch_dtype.is_floating_point != spec.torch_dtype.is_floating_point:
            problems.append(f"tensor {name} is {found.dtype} in the anchor and {spec.dtype} in the target")
        else:
            names[name] = candidates[0]
            problems += _untied(checkpoint, candidates)
    known = {*target.tensor_order, *target.tensors, *target.head}
    for name, spec in checkpoint.tensors.items():
        aliased = {name, *(alias for alias, stored in checkpoint.tied.items() if stored == name)}
        # Integers (position ids of older files) hold no weights; the target that does not know them does without.
        if spec.torch_dtype.is_floating_point and not aliased & known:
            problems.append(f"tensor {name} {list(spec.shape)} of the anchor is not in the target")
    return names, problems, absent


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
