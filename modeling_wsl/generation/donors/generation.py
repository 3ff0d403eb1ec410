"""Models for an architecture that nobody has trained, from trained models ("donors") of other sizes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ...tokens.manifest import check_choice
from ..anchors import AnchorSource, adapt_input_channels, named_tensors
from ..batch_norm import model_inputs, reestimate_batch_norm, tracked_norms
from ..generated_model import GeneratedModel, entries_by_origin, package_versions
from ..ranking import Scorer, logits_of, scorer
from ..targets import Target, resolve_target
from .distill import distill
from .fit import fit_network, num_examples
from .head import classifier_of, fit_head
from .networks import OpenedDonor, built, example_inputs, inputs_for, is_builder, open_donor, traced
from .neurons import find_neurons
from .pairing import pair_tensors
from .resize import Network, Transfer, resized


logger = logging.get_logger(__name__)

DONOR_METHODS = ("fit", "resize", "select")
FEW_IMAGES = 64
NAMED = 4  # tensors that a message names
SAME = 1e-5  # relative error of a function that is left as it was


@dataclass(frozen=True)
class DonorSettings:
    """How weights are taken from donors.

    Attributes:
        method: "resize" (no images needed), "fit" (resized, then every map fitted on images in closed form), or
            "select" (the published weight selection: evenly spaced entries of the first blocks). None: "fit" with
            images, else "resize".
        images: unlabeled, of the donors' domain: `[N, C, H, W]` as the target takes them, or keyword arguments of
            token batches.
        labels: int64 `[N]` of the images: a classifier is fitted to them, whatever the donor's classes are.
        initialize: modules or tensors of the target that keep their library's initialization.
        distill_epochs: passes over the images in which the target then learns the donor's outputs.
        seed: of the initialization, the rows of regressions and the order of distillation.
        rank: a function module -> score, or a loader of validation data; the best model comes first.
        num_samples: models to return; None: one of every donor.
        progress: show a progress bar.

    Raises:
        ValueError: an impossible combination, saying which.
    """

    method: str | None = None
    images: Any = None
    labels: Tensor | Sequence[int] | None = None
    initialize: Sequence[str] = ()
    distill_epochs: int = 0
    seed: int = 0
    rank: Scorer | Any | None = None
    num_samples: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.method is not None:
            check_choice("method", self.method, DONOR_METHODS)
        if self.images is None:
            for option in ("labels", "distill_epochs"):
                value = getattr(self, option)
                if value is not None and not (isinstance(value, int) and value == 0):
                    raise ValueError(f"{option} needs images=: the images that they are of.")
            if self.method == "fit":
                raise ValueError("method='fit' needs images= of the donors' domain; without any take method='resize'.")
        elif isinstance(self.images, Tensor) and (self.images.dim() != 4 or len(self.images) == 0):
            raise ValueError(f"images has shape {list(self.images.shape)}; give images [N, C, H, W], one or more.")
        elif not isinstance(self.images, Tensor | Mapping):
            raise ValueError(
                f"images is a {type(self.images).__name__}; give a tensor [N, C, H, W], or keyword arguments."
            )
        if self.labels is not None and len(self.labels) != num_examples(self.images):
            raise ValueError(f"labels has {len(self.labels)} entries for {num_examples(self.images)} images.")

    @property
    def how(self) -> str:
        return self.method or ("resize" if self.images is None else "fit")


def generate_from_donors(
    target: Any,
    donors: AnchorSource | Sequence[AnchorSource],
    settings: DonorSettings | None = None,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    target_kwargs: Mapping[str, Any] | None = None,
    target_revision: str | None = None,
    anchor_modules: Sequence[str | Callable[[], nn.Module]] = (),
    **options: Any,
) -> list[GeneratedModel]:
    """One model of every donor, for an architecture of any width and depth; see `DonorSettings`.

    Everything is checked before any work: that target and donors can be run, that their tensors pair, that images and
    labels fit.

    Args:
        target, num_classes, in_channels, target_kwargs, target_revision: see `resolve_target`.
        donors: trained models, see `open_donor`.
        settings: how weights are taken.
        anchor_modules: for each donor the function, or FILE.py:FUNCTION, that builds its module, where its own files
            do not name its architecture. A target may be FILE.py:FUNCTION too.
        options: for `open_checkpoint`, of the donors.

    Returns:
        The best first where they are ranked, else in the order of the donors.

    Raises:
        ValueError: target, donors and settings do not fit each other; the message says how.
        CheckpointError: a donor cannot be read safely.
    """
    settings = settings or DonorSettings()
    sources = list(donors) if isinstance(donors, list | tuple) else [donors]
    if not sources:
        raise ValueError("anchors is empty: give one trained model or more to take weights from.")
    if anchor_modules and len(anchor_modules) != len(sources):
        raise ValueError(
            f"anchor_modules names {len(anchor_modules)} modules for {len(sources)} anchors; give one for each."
        )
    hub_options = {"revision": target_revision, "token": options.get("token")}
    target = built(target) if is_builder(target) else target
    resolved = resolve_target(target, num_classes, target_kwargs, in_channels=in_channels, **hub_options)
    builders = list(anchor_modules) or [None] * len(sources)
    plans = [
        plan_transfer(resolved, open_donor(source, build, **options), settings)
        for source, build in zip(sources, builders, strict=True)
    ]
    score, ranked_by = (None, None) if settings.rank is None else scorer(settings.rank)
    models = []
    for index, plan in enumerate(plans):
        model = plan.model(index)
        if score is not None:
            with torch.enable_grad():
                value = float(score(model.instantiate()))
            model.provenance.update(score=value if math.isfinite(value) else None, ranked_by=ranked_by)
        models.append(model)
    if score is not None:
        models.sort(
            key=lambda model: -math.inf if model.provenance["score"] is None else model.provenance["score"],
            reverse=True,
        )
    return models[: settings.num_samples]


def plan_transfer(target: Target, donor: OpenedDonor, settings: DonorSettings) -> TransferPlan:
    """Traces target and donor, pairs their tensors and checks that all is there.

    Raises:
        ValueError: nothing pairs, a tensor has no partner, or one of the networks cannot be run.
    """
    module = target.build(settings.seed).eval()
    _check_images(settings.images, module, target)
    inputs = example_inputs(module, settings.images)
    theirs = example_inputs(donor.module, None if settings.images is None else settings.images)
    networks = []
    for network, examples, name in ((module, inputs, target.name), (donor.module, theirs, donor.name)):
        trace = traced(network, examples, name)
        networks.append(Network(trace, find_neurons(trace)))
    pairing = pair_tensors(target.tensors, donor.target.tensors, first=settings.how == "select")
    if not pairing.tensors:
        raise ValueError(
            f"Donor {donor.name} has nothing to pair with the target {target.name}: none of its tensors has a name "
            f"like {next(iter(target.tensors))}. Give a donor of the same family."
        )
    transfer = Transfer(networks[0], networks[1], pairing)
    plan = TransferPlan(target, donor, settings, module, transfer)
    plan.check()
    return plan


def _check_images(images: Any, module: nn.Module, target: Target) -> None:
    if images is not None and 0 < num_examples(images) < FEW_IMAGES:
        logger.warning(
            f"{num_examples(images)} images are few for a fit: below {FEW_IMAGES} it can be worse than 'resize'."
        )
    if isinstance(images, Tensor):
        stem = next((child for child in module.modules() if isinstance(child, nn.Conv2d)), None)
        if stem is not None and stem.groups == 1 and stem.in_channels != images.shape[1]:
            raise ValueError(
                f"images have {images.shape[1]} channels, the target {target.name} takes {stem.in_channels}. Pass "
                "in_channels= for the target, or other images."
            )


@dataclass
class TransferPlan:
    """A transfer that has been checked and not begun; see `plan_transfer`."""

    target: Target
    donor: OpenedDonor
    settings: DonorSettings
    module: nn.Module
    transfer: Transfer

    def check(self) -> None:
        """That every tensor of the target has a partner, or may be initialized.

        Raises:
            ValueError: naming the tensors.
        """
        self.kept = named_tensors(self.target, self.settings.initialize)
        state = self.module.state_dict()
        stored = {name: state[name] for name in self.target.tensors}
        donor_state = self.donor.module.state_dict()
        for name, partner in self.transfer.pairing.tensors.items():
            value, wanted = donor_state[partner], stored[name]
            if value.dim() > 2 and value.shape[1] != wanted.shape[1] and self.transfer.reads_inputs(name):
                donor_state[partner] = adapt_input_channels(value, wanted.shape[1], self.in_channels(wanted))
        values, left = resized(self.transfer, donor_state, stored, divide=self.settings.how != "select")
        trace = self.transfer.target.trace
        head = set(self.target.head)
        if (classifier := classifier_of(trace)) is not None:
            head |= {classifier.weight, *([classifier.bias] if classifier.bias else [])}
        self.initialized = {name for name in left if name in head or name in self.kept} | self.kept
        missing = [name for name in left if name not in self.initialized]
        if missing:
            more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
            reasons = "; ".join(f"{name} ({left[name]})" for name in missing[:NAMED])
            raise ValueError(
                f"Donor {self.donor.name} does not give all of {self.target.name}: {reasons}{more}. Name in "
                "initialize= the modules that may keep their initialization, or give another donor."
            )
        self.values = {name: value for name, value in values.items() if name not in self.initialized}

    def in_channels(self, stem: Tensor) -> int:
        """Of the images, where they or the target say it; else the stem's own (it is no space-to-depth one)."""
        if isinstance(self.settings.images, Tensor):
            return self.settings.images.shape[1]
        return self.target.in_channels or stem.shape[1]

    def model(self, index: int) -> GeneratedModel:
        """Carries the plan out."""
        began, settings, module = time.process_time(), self.settings, self.module
        state = module.state_dict()
        with torch.no_grad():
            for name, value in self.values.items():
                state[name].copy_(value)
        facts: dict[str, Any] = {"output_error": self.output_error()}
        pairing = self.transfer.pairing
        origins = dict.fromkeys(self.values, f"resized: {self.donor.name}")
        origins |= dict.fromkeys(self.initialized, self.target.initialization)
        fitted: dict[str, Any] = {}
        images = settings.images
        if images is not None:
            theirs = inputs_for(self.donor.module, images)
            if settings.how == "fit":
                mine = inputs_for(module, images)
                fitted = fit_network(
                    module, self.donor.module, self.transfer, mine, theirs, settings.seed, settings.progress
                )
                origins |= dict.fromkeys(fitted, f"fitted: {self.donor.name}")
            self.condition(origins)
            if settings.labels is not None:
                labels = torch.as_tensor(settings.labels, dtype=torch.long)
                facts["head"] = fit_head(module, self.transfer.target.trace, inputs_for(module, images), labels)
                one = classifier_of(self.transfer.target.trace)
                origins |= dict.fromkeys([one.weight, *([one.bias] if one.bias else [])], "fitted: labels")
            if settings.distill_epochs:
                facts["distillation"] = distill(
                    module,
                    self.donor.module,
                    inputs_for(module, images),
                    theirs,
                    settings.distill_epochs,
                    settings.seed,
                )
                self.condition(origins)
        state = module.state_dict()
        state = {name: state[self.target.tied.get(name, name)].detach().clone() for name in self.target.tensor_order}
        provenance = {
            "target": {"name": self.target.name, "library": self.target.library, "arguments": self.target.arguments},
            "anchors": [self.donor.facts],
            "donor": index,
            "method": settings.how,
            "seed": settings.seed,
            "num_images": 0 if images is None else num_examples(images),
            **facts,
            "cpu_seconds": None,
            "tensors": {name: origins[self.target.tied.get(name, name)] for name in self.target.tensor_order},
            "donor_tensors": {
                name: self.origin(name, fitted.get(name)) for name in self.values if name in pairing.tensors
            },
            "initialized": sorted(self.initialized),
            "unused": len(pairing.unused),
            "versions": package_versions(),
            "tied": dict(self.target.tied),
        }
        provenance["entries"] = entries_by_origin(provenance["tensors"], state)
        logger.info(f"{self.target.name} from {self.donor.name}: {time.process_time() - began:.1f} CPU seconds")
        del provenance["cpu_seconds"]  # provenance is the same for the same seed
        return GeneratedModel(state, provenance, self.target)

    def condition(self, origins: dict[str, str]) -> None:
        """Batch norms see the images' own statistics."""
        if tracked_norms(self.module):
            names, _ = reestimate_batch_norm(self.module, inputs_for(self.module, self.settings.images))
            origins |= dict.fromkeys(names, "re-estimated")

    def origin(self, name: str, fitted: Mapping[str, float] | None) -> dict[str, Any]:
        """Of one tensor: the donor's tensor and its shape, the blocks that it stands for, what it was fitted on."""
        pairing = self.transfer.pairing
        partner = pairing.tensors[name]
        facts: dict[str, Any] = {"tensor": partner, "shape": list(self.donor.target.tensors[partner].shape)}
        block = pairing.block_of(name)
        if block is not None and pairing.blocks[block] != pairing.ends[block]:
            facts["blocks"] = [pairing.blocks[block].rstrip("."), pairing.ends[block].rstrip(".")]
        if name in pairing.extra:
            facts["extra"] = True
        return facts | ({"fitted": dict(fitted)} if fitted else {})

    def output_error(self) -> float | None:
        """How far the resized network's outputs are from the donor's, relative to them, where both can be compared."""
        outputs = []
        for network in (self.donor.module, self.module):
            arguments, keywords = model_inputs(example_inputs(network, self.settings.images), torch.device("cpu"))
            with torch.no_grad():
                outputs.append(logits_of(network(*arguments, **keywords)))
        if not all(isinstance(one, Tensor) for one in outputs) or outputs[0].shape != outputs[1].shape:
            return None
        error = float((outputs[0] - outputs[1]).norm() / outputs[0].norm().clamp_min(1e-12))
        if self.transfer.growing and not self.initialized and error > SAME and self.settings.how == "resize":
            logger.warning(
                f"{self.target.name} is nowhere smaller than {self.donor.name}, and yet its outputs differ by "
                f"{error:.1e}: layer norms keep them where sizes are multiples of the donor's only."
            )
        return error
