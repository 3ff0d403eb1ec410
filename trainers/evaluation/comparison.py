"""The common ground of the arms of a comparison: architecture, anchors, backbone, data and how they are used."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from datasets_scripts.embedding.linear_projection import LinearBaseline
from modeling_wsl.generation.batch_norm import reestimate_batch_norm
from modeling_wsl.generation.generated_model import GeneratedModel
from modeling_wsl.generation.plan import GenerationPlan
from modeling_wsl.generation.targets import Target
from modeling_wsl.loading import load_pipeline
from modeling_wsl.pipelines import WeightGenerationPipeline

from ..finetuning.finetune_options import FinetuneOptions
from ..finetuning.measure import measure
from ..finetuning.tasks import IMAGE_CLASSIFICATION, Task


State = dict[str, Tensor]
AGREEMENT_EXAMPLES = 512


class Splits(Protocol):
    """Map-style datasets of the task's examples, such as `ImageSplits` and `TextSplits`."""

    train: Dataset
    validation: Dataset
    test: Dataset


@dataclass(frozen=True)
class EvaluationProtocol:
    """The numbers of models that an arm tries and keeps, and what is done with them.

    Attributes:
        num_candidates: draws of an arm that draws, of which the best on the validation split are kept.
        num_kept: models of an arm that are measured.
        finetune: how a kept model is trained; None: it is measured as it is.
        bandwidth, noise: of the draws, see `GenerationSettings`.
        bootstrap_rounds: of the arm "bootstrapped"; 0: there is none.
        interpolation_points: of the arm "interpolated", between the first two anchors; 0: there is none.
        batch_norm_images: training images that batch-norm statistics are estimated on.
    """

    num_candidates: int
    num_kept: int
    finetune: FinetuneOptions | None
    bandwidth: float = 0.2
    noise: str | None = None
    bootstrap_rounds: int = 0
    interpolation_points: int = 0
    batch_norm_images: int = 512


@dataclass
class Comparison:
    """The common ground of all arms. States hold the target's stored tensors, tied ones once.

    Attributes:
        plan: target and anchors, matched; its settings do not count.
        latent_size: the backbone's.
        generate: the pipeline, called with the indices of anchors and the options of a draw.
        task, splits: what is measured, and on what. `splits.test` is touched by `measure_test` alone.
        protocol: see there.
        pca: the directions of the arm "PCA"; None: it cannot be run.
        options: how models are measured: batch size and number of batches, precision, device.
    """

    plan: GenerationPlan
    latent_size: int
    generate: Callable[..., list[GeneratedModel]]
    task: Task
    splits: Splits
    protocol: EvaluationProtocol
    pca: LinearBaseline | None = None
    options: FinetuneOptions = field(default_factory=FinetuneOptions)

    @property
    def target(self) -> Target:
        return self.plan.target

    @cached_property
    def sampled(self) -> list[str]:
        """The stored tensors that generation samples, in the order of their tokens."""
        return [spec.name for layer in self.plan.manifest.layers for spec in layer.tensors]

    @property
    def has_new_head(self) -> bool:
        """The classifier is initialized at random, so that nothing ranks models before they are trained."""
        return bool(self.plan.initialized & self.target.head)

    @cached_property
    def batch_norm_images(self) -> Tensor | None:
        """Training images `[n, C, H, W]`; None where the task has none."""
        if self.task.name != IMAGE_CLASSIFICATION.name:
            return None
        return self.splits.batch_norm_images(self.protocol.batch_norm_images)

    def scratch(self, seed: int) -> State:
        """The library's own initialization."""
        return self.stored(self.target.build(seed).state_dict())

    def anchor(self, index: int, seed: int) -> State:
        """An anchor in the target's names and shapes; what it lacks (a head of other classes) is as in scratch."""
        anchor, fresh = self.plan.anchors[index], self.scratch(seed)
        return {
            name: fresh[name] if name in self.plan.initialized else anchor.read(name).to(spec.torch_dtype, copy=True)
            for name, spec in self.target.tensors.items()
        }

    def stored(self, state: dict[str, Tensor]) -> State:
        """A state dict without aliases, each tensor with a memory of its own."""
        return {name: state[name].detach().cpu().clone() for name in self.target.tensors}

    def module(self, state: State) -> nn.Module:
        """A module with these weights, on the device of the comparison, in eval mode."""
        module = self.target.build()
        tied = self.target.tied
        module.load_state_dict({name: state[tied.get(name, name)] for name in self.target.tensor_order})
        return module.to(self.device).eval()

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() and not self.options.use_cpu else "cpu")

    def conditioned(self, state: State) -> State:
        """The weights with batch-norm statistics of their own: another network's fit no disturbed weights."""
        if self.batch_norm_images is None:
            return state
        module = self.module(state)
        names, _ = reestimate_batch_norm(module, self.batch_norm_images)
        fresh = module.state_dict()
        return {**state, **{name: fresh[name].cpu().clone() for name in names}}

    @property
    def ranked_by(self) -> str | None:
        """The metric that candidates are ranked by, on one half of the validation split; None where they are not."""
        if self.has_new_head:
            return None
        images = self.task.name == IMAGE_CLASSIFICATION.name
        return "accuracy" if images else "negative loss"

    @cached_property
    def ranking_examples(self) -> Dataset:
        """Every second validation example: draws are chosen on these."""
        return Subset(self.splits.validation, range(0, len(self.splits.validation), 2))

    @cached_property
    def validation_examples(self) -> Dataset:
        """The other validation examples: the best of many draws looks better than it is on those it was chosen on."""
        return Subset(self.splits.validation, range(1, len(self.splits.validation), 2))

    def score(self, module: nn.Module) -> float:
        """Of a candidate on the examples for ranking, higher is better."""
        measured = self._measure(module, self.ranking_examples, self.options.eval_batches)
        return measured["accuracy"] if self.task.name == IMAGE_CLASSIFICATION.name else -measured["loss"]

    def measure_validation(self, module: nn.Module) -> dict[str, float]:
        return self._measure(module, self.validation_examples, self.options.eval_batches)

    def measure_test(self, module: nn.Module) -> dict[str, float]:
        return self._measure(module, self.splits.test, None)

    def _measure(self, module: nn.Module, examples: Dataset, max_batches: int | None) -> dict[str, float]:
        options = self.options
        return measure(
            module,
            examples,
            self.task,
            batch_size=options.per_device_eval_batch_size,
            use_cpu=options.use_cpu,
            max_batches=max_batches,
        )

    def draw(self, anchors: Sequence[int], seed: int, **options: Any) -> list[GeneratedModel]:
        """The best draws of the backbone by the protocol, best first; as many as are kept where nothing ranks."""
        protocol = self.protocol
        ranked = {"num_candidates": protocol.num_candidates, "rank": self.score} if self.ranked_by else {}
        return self.generate(
            anchors,
            seed=seed,
            batch_norm_images=self.batch_norm_images,
            **{
                "num_samples": protocol.num_kept,
                "bandwidth": protocol.bandwidth,
                "noise": protocol.noise,
                **ranked,
                **options,
            },
        )


def backbone_generator(
    backbone: str, target: str, anchors: Sequence[str], use_cpu: bool, revision: str | None = None, **options: Any
) -> Callable[..., list[GeneratedModel]]:
    """The pipeline of a backbone, loaded at its first call, that takes its anchors by their indices.

    Args:
        backbone, target, anchors: folders, Hub ids, timm names.
        use_cpu: stay on the CPU where a GPU is present.
        revision: commit of a backbone on the Hub.
        options: of every call.
    """

    @cache
    def loaded() -> WeightGenerationPipeline:
        cpu = use_cpu or not torch.cuda.is_available()
        return load_pipeline("weight-generation", backbone, revision=revision, device="cpu" if cpu else "cuda")

    def generate(anchors_of_draw: Sequence[int], **draw: Any) -> list[GeneratedModel]:
        sources = [anchors[index] for index in anchors_of_draw]
        return loaded()(target, anchors=sources, progress=False, **options, **draw)

    return generate
