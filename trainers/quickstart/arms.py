"""The quickstart's comparison: the held-out model as anchor, the digits as data."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import TensorDataset

from hf_wsl.run_folder import RunFolder
from modeling_wsl.configuration_wsl import WSLConfig
from modeling_wsl.feature_extraction_wsl import WSLFeatureExtractor
from modeling_wsl.generation.plan import plan_generation
from modeling_wsl.generation.settings import GenerationSettings

from ..data.images.digits import NUM_CLASSES, digits_splits
from ..data.windows.dataset_source import DatasetSource
from ..evaluation.arm_runs import run_arms
from ..evaluation.comparison import Comparison, EvaluationProtocol, backbone_generator
from ..evaluation.controls import cached_pca
from ..evaluation.evaluate_config import ARMS, ON_REQUEST
from ..evaluation.initial_weights import skip_reason
from ..finetuning.finetune_options import FinetuneOptions
from ..finetuning.tasks import IMAGE_CLASSIFICATION
from ..zoo.digits_zoo import ARCHITECTURES, read_properties


@dataclass(frozen=True)
class DigitsSplits:
    """The digits, see `digits_splits`."""

    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset

    def batch_norm_images(self, count: int) -> Tensor:
        """The first training images: float32 `[count or fewer, 1, size, size]`."""
        return self.train.tensors[0][:count]


@dataclass(frozen=True)
class QuickstartOpener:
    """Opens the comparison of a quickstart.

    Args:
        folder: of the quickstart: its `backbone/` and `dataset/`.
        held_out: the anchor's folder.
        finetune: of every run.
        num_candidates: draws of a seed.
        bandwidth: of the draws.
    """

    folder: Path
    held_out: Path
    finetune: FinetuneOptions
    num_candidates: int
    bandwidth: float

    def open(self) -> Comparison:
        backbone, anchor = str(self.folder / "backbone"), str(self.held_out)
        feature_extractor = WSLFeatureExtractor.from_pretrained(backbone)
        rank = WSLConfig.from_pretrained(backbone).latent_size
        return Comparison(
            plan=plan_generation(feature_extractor, anchor, [anchor], GenerationSettings()),
            latent_size=rank,
            generate=backbone_generator(backbone, anchor, [anchor], use_cpu=True),
            task=IMAGE_CLASSIFICATION,
            splits=DigitsSplits(**digits_splits(ARCHITECTURES[read_properties(self.held_out)["family"]].image_size)),
            protocol=EvaluationProtocol(
                num_candidates=self.num_candidates, num_kept=1, finetune=self.finetune, bandwidth=self.bandwidth
            ),
            pca=cached_pca(DatasetSource(str(self.folder / "dataset")), rank, 500_000, self.folder / "cache"),
            options=self.finetune,
        )


def finetune_arms(opener: QuickstartOpener, seeds: Sequence[int], num_workers: int) -> dict[str, Any]:
    """Runs every arm, see `run_arms`; its records lie in `arms/` of the quickstart's folder.

    Returns:
        `arms`, `skipped` and `weights` of `run_arms`, `metric`, `guess`, `seeds`, and the `config` of the runs.
    """
    comparison = opener.open()
    wanted = [arm for arm in ARMS if arm not in ON_REQUEST]
    skipped = {arm: reason for arm in wanted if (reason := skip_reason(comparison, arm))}
    arms = [arm for arm in wanted if arm not in skipped]
    run = RunFolder(opener.folder / "arms", "the arms of a quickstart", records="runs")
    with run.open({"held_out": opener.held_out.name, "finetune": asdict(opener.finetune)}):
        outcomes = run_arms(opener, run, arms, seeds, "accuracy", num_workers)
    return {
        **outcomes,
        "skipped": {**skipped, **outcomes["skipped"]},
        "metric": "accuracy",
        "guess": 1 / NUM_CLASSES,
        "seeds": list(seeds),
        "config": asdict(opener.finetune),
    }
