"""The arms of a comparison of starting weights from donors of other sizes."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from modeling_wsl.generation.batch_norm import model_inputs
from modeling_wsl.generation.donors.distill import distill
from modeling_wsl.generation.donors.generation import DonorSettings, TransferPlan, plan_transfer
from modeling_wsl.generation.donors.networks import OpenedDonor, example_inputs, inputs_for, open_donor
from modeling_wsl.generation.ranking import logits_of
from modeling_wsl.generation.targets import Target

from ..finetuning.finetune_trainer import finetune
from ..finetuning.tasks import IMAGE_CLASSIFICATION
from .comparison import Comparison


TUNED = (0.3, 1.0, 3.0)  # of the learning rate, for the arm that is tuned on validation
TRANSFERS = {  # arm -> options of `DonorSettings`
    "resize": {"method": "resize"},
    "fit": {"method": "fit"},
    "fit + head": {"method": "fit", "labels": True},
    "weight selection": {"method": "select"},
    "untrained donor": {"method": "fit"},
    "permuted donor": {"method": "fit"},
    "distilled fit": {"method": "fit", "distill": True},
}


@dataclass(frozen=True)
class DonorWeights:
    """The weights that a run starts from: the target's stored tensors, and facts about them."""

    state: dict[str, Tensor]
    facts: dict[str, Any]


@dataclass(kw_only=True)
class DonorComparison(Comparison):
    """The common ground of the arms; see `Comparison`, whose plan and backbone there are not.

    Attributes:
        own_target: what weights are generated for.
        donors: trained networks, each of which gives a model an arm.
        num_images: training images that are fitted on.
        distill_epochs: of the arms that are distilled.
    """

    own_target: Target
    donors: Sequence[OpenedDonor]
    num_images: int = 512
    distill_epochs: int = 5

    @property
    def target(self) -> Target:
        return self.own_target

    @property
    def has_new_head(self) -> bool:
        return True  # nothing is ranked

    @cached_property
    def examples(self) -> tuple[Any, Tensor | None]:
        """(images or blocks of tokens that are fitted on, labels of images)."""
        if self.task.name == IMAGE_CLASSIFICATION.name:
            return self.splits.evenly_spaced(self.num_images)
        blocks = self.splits.train
        count = min(self.num_images, len(blocks))
        chosen = [torch.as_tensor(blocks[index * len(blocks) // count]["input_ids"]) for index in range(count)]
        return {"input_ids": torch.stack(chosen)}, None

    def check(self) -> None:
        """That every donor can be brought to the target, before any work.

        Raises:
            ValueError: it cannot; the message says why.
        """
        for donor in self.donors:
            plan_transfer(self.target, donor, DonorSettings(method="fit", images=self.examples[0], progress=False))

    def skip_reason(self, arm: str) -> str | None:
        """The reason why an arm cannot be run; None where it can."""
        if arm == "fit + head" and self.examples[1] is None:
            return "there are no labels of whole examples"
        if arm.startswith("distilled") and len(shapes := set(self.output_shapes)) > 1:
            return f"the outputs of target and donors differ in shape: {', '.join(map(str, sorted(shapes)))}"
        return None

    @cached_property
    def output_shapes(self) -> list[tuple[int, ...]]:
        """Of the target and of each donor, for two examples."""
        found = []
        for module in (self.target.build(0).eval(), *(donor.module for donor in self.donors)):
            arguments, keywords = model_inputs(example_inputs(module, self.examples[0]), torch.device("cpu"))
            with torch.no_grad():
                found.append(tuple(logits_of(module(*arguments, **keywords)).shape))
        return found

    def weights(self, arm: str, seed: int) -> list[DonorWeights]:
        """The starting weights of an arm: one for every donor, or one alone where no donor plays a part.

        Args:
            arm: of `DONOR_ARMS`.
            seed: of what is drawn and initialized.
        """
        if arm == "scratch":
            return [DonorWeights(self.scratch(seed), {})]
        if arm == "tuned scratch":
            return [DonorWeights(self.scratch(seed), {"learning_rate": self.tuned_learning_rate})]
        return [self.of_donor(arm, index, seed) for index in range(len(self.donors))]

    def of_donor(self, arm: str, index: int, seed: int) -> DonorWeights:
        donor, (images, labels), began = self.donors[index], self.examples, time.process_time()
        if arm == "distilled scratch":
            module = self.target.build(seed)
            mine, theirs = inputs_for(module, images), inputs_for(donor.module, images)
            distill(module, donor.module, mine, theirs, self.distill_epochs, seed)
            state = self.stored(module.state_dict())
        else:
            options = dict(TRANSFERS[arm])
            given = options.pop("labels", False)
            epochs = self.distill_epochs if options.pop("distill", False) else 0
            if arm == "untrained donor":
                donor = replace(donor, module=reinitialized(donor.module, seed))
            if arm == "permuted donor":
                donor = replace(donor, module=shuffled(donor.module, seed))
            settings = DonorSettings(
                **options,
                images=images,
                labels=labels if given else None,
                distill_epochs=epochs,
                seed=seed,
                progress=False,
            )
            plan: TransferPlan = plan_transfer(self.target, donor, settings)
            state = self.stored(plan.model(index).state_dict)
        return DonorWeights(state, {"donor": index, "cpu_seconds": round(time.process_time() - began, 2)})

    @cached_property
    def tuned_learning_rate(self) -> float:
        """The best of a few learning rates by the validation split, at the end of a run from scratch."""
        base = self.protocol.finetune
        scores = {}
        for factor in TUNED:
            config = replace(base, learning_rate=base.learning_rate * factor, seed=0)
            data = self.splits.train, self.validation_examples
            history = finetune(self.module(self.scratch(0)), *data, config, progress=False, task=self.task)
            last = history[-1].metrics
            scores[config.learning_rate] = last.get("accuracy", -last["loss"])
        return max(scores, key=scores.get)

    def donor_scores(self) -> list[dict[str, Any]]:
        """Every donor's name and its own measurement on the test split; None where its outputs do not fit the data."""
        found = []
        for donor in self.donors:
            sees = _Resized(donor.module)
            try:
                test = self.measure_test(sees)
            except (RuntimeError, IndexError, ValueError):  # other classes
                test = None
            found.append({"name": donor.name, "test": test})
        return found


class _Resized(nn.Module):
    """A donor that takes the target's images."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module
        self.config = getattr(module, "config", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*(inputs_for(self.inner, value) for value in args), **kwargs)


def reinitialized(module: nn.Module, seed: int) -> nn.Module:
    """A copy with torch's own initialization of every layer."""
    fresh = copy.deepcopy(module)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for child in fresh.modules():
            if callable(getattr(child, "reset_parameters", None)):
                child.reset_parameters()
    return fresh.eval()


def shuffled(module: nn.Module, seed: int) -> nn.Module:
    """A copy with the entries of each parameter shuffled: its statistics, nothing else."""
    generator = torch.Generator().manual_seed(seed)
    mixed = copy.deepcopy(module)
    with torch.no_grad():
        for value in mixed.parameters():
            order = torch.randperm(value.numel(), generator=generator)
            value.copy_(value.flatten()[order].view_as(value))
    return mixed.eval()


def open_donors(sources: Sequence[str], builders: Sequence[str]) -> list[OpenedDonor]:
    """The donors of a command line.

    Raises:
        ValueError: an architecture is not known.
        CheckpointError: a donor cannot be read safely.
    """
    return [
        open_donor(source, build) for source, build in zip(sources, builders or [None] * len(sources), strict=True)
    ]
