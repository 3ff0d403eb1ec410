"""`hf-wsl reproduce donors`: starting weights for other sizes from trained donors.

First public donors, untrained: akamaster's CIFAR-10 ResNet-20 and -56 (He et al. 2015, padded shortcuts). Then eight
small architectures: three donors of each are trained here, and an evaluation compares what a target of two thirds of
their width starts from. What is done is not done again.
"""

import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import nn
from torch.nn import functional

from hf_wsl.files import write_json
from hf_wsl.options import ConfigError
from hf_wsl.workers import one_thread
from modeling_wsl.generation.donors.generation import DonorSettings, generate_from_donors
from modeling_wsl.generation.donors.networks import open_donor
from modeling_wsl.generation.generated_model import package_versions
from modeling_wsl.generation.targets import resolve_target

from ..data.data_config import ImageDataConfig
from ..data.images.image_data import ImageSplits, load_images
from ..evaluation.evaluate import evaluate
from ..evaluation.evaluate_config import EvaluateConfig
from ..finetuning.finetune_options import FinetuneOptions
from ..finetuning.finetune_trainer import finetune
from .donors_page import ARMS, RECORD


# (target's depth and width, donor's depth, unlabeled images)
PUBLIC = ((14, 12, 20, 128), (14, 12, 20, 512), (20, 14, 20, 512), (32, 16, 56, 512), (26, 20, 20, 0))
PUBLIC_WIDTH = 16
DONORS = 3
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4}
SMALL: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    # name: donor's architecture and options, target's architecture and options
    "ResNet": (
        "resnet18",
        {"channels": [24, 36, 48, 72], "layers": [2, 2, 2, 2]},
        "resnet18",
        {"channels": [16, 24, 32, 48], "layers": [1, 2, 1, 1]},
    ),
    "ResNeXt": (
        "resnext50_32x4d",
        {"channels": [12, 18, 24, 36], "layers": [1, 2, 2, 1], "cardinality": 6, "base_width": 36},
        "resnext50_32x4d",
        {"channels": [8, 12, 16, 24], "layers": [1, 1, 1, 1], "cardinality": 4, "base_width": 36},
    ),
    "ConvNeXt": (
        "convnext_atto",
        {"patch_size": 2, "dims": [24, 36, 48, 72], "depths": [1, 1, 3, 1]},
        "convnext_atto",
        {"patch_size": 2, "dims": [16, 24, 32, 48], "depths": [1, 1, 2, 1]},
    ),
    "ViT": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 6},
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4},
    ),
    "DenseNet": (
        "densenet121",
        {"growth_rate": 12, "block_config": [3, 3, 3]},
        "densenet121",
        {"growth_rate": 8, "block_config": [3, 3, 3]},
    ),
    "MobileNetV2": ("mobilenetv2_050", {}, "mobilenetv2_035", {}),
    "MobileNetV3": ("mobilenetv3_small_075", {}, "mobilenetv3_small_050", {}),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {**SWIN, "embed_dim": 36, "depths": [2, 2, 2], "num_heads": [3, 6, 12]},
        "swin_tiny_patch4_window7_224",
        {**SWIN, "embed_dim": 24, "depths": [2, 2, 2], "num_heads": [2, 4, 8]},
    ),
}


class Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.stride, self.before = stride, (out - width) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.before:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, y.shape[1] - x.shape[1] - self.before))
        return functional.relu(y + x)


class CifarResNet(nn.Module):
    """The ResNet for CIFAR-10 of He et al. 2015 with padded shortcuts, in the names of the public checkpoints."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        before = width
        for stage in range(3):
            out, blocks = width << stage, []
            for block in range((depth - 2) // 6):
                blocks.append(Block(before, out, 2 if stage and not block else 1))
                before = out
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(before, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(functional.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def reproduce_donors(images: Path, models: Path | None, work_dir: Path, results_dir: Path) -> Path:
    """Runs the comparison on one thread; the record is written after every architecture.

    Args:
        images: folder of CIFAR-10 as Parquet files.
        models: folder of public models; None: the public donors are left out.
        work_dir: gets the donors and their evaluations.
        results_dir: gets `donors_small.json`.

    Returns:
        The record's path.

    Raises:
        ConfigError: there are no such files.
    """
    if not list(images.glob("train-*.parquet")):
        raise ConfigError(f"{images} holds no train-*.parquet; give CIFAR-10: --images cifar10=FOLDER")
    path = results_dir / RECORD
    report: dict[str, Any] = {"versions": package_versions(), "small": {}}
    results_dir.mkdir(parents=True, exist_ok=True)
    with one_thread():
        if models is not None:
            report["public"] = public(models, images)
            write_json(path, report)
        for name in SMALL:
            report["small"][name] = small(name, images, work_dir / "donors")
            write_json(path, report)
    return path


def public(models: Path, images: Path) -> list[dict[str, Any]]:
    """Accuracy on 10,000 test images before any training, and CPU seconds, of each method."""
    rows = []
    data = splits_of(images, max_train=max(row[3] for row in PUBLIC), max_validation=1)
    test, labels = pixels(data.test)
    for depth, width, of, count in PUBLIC:
        [folder] = models.glob(f"akamaster--*resnet{of}-*")
        donor = open_donor(folder, lambda of=of: CifarResNet(of, PUBLIC_WIDTH)).module
        row: dict[str, Any] = {"target": f"ResNet-{depth}, {width} wide", "donor": f"ResNet-{of}", "images": count}
        row["donor accuracy"] = accuracy(donor, test, labels)
        for method in ("select", "resize", "fit") if count else ("resize",):
            settings = DonorSettings(method, data.batch_norm_images(count) if count else None, progress=False)
            began = time.process_time()
            (model,) = generate_from_donors(CifarResNet(depth, width), donor, settings)
            row[method] = {
                "cpu_seconds": round(time.process_time() - began, 2),
                "accuracy": accuracy(model.instantiate(), test, labels),
                "output_error": model.provenance["output_error"],
            }
        rows.append(row)
    return rows


def small(name: str, images: Path, work_dir: Path) -> dict[str, Any]:
    """Three donors of an architecture and the evaluation of what a smaller target starts from."""
    donor, donor_options, target, target_options = SMALL[name]
    folders = [
        train_donor(work_dir / f"{name}-donor-{seed}", donor, donor_options, images, seed) for seed in range(DONORS)
    ]
    config = EvaluateConfig(
        target=target,
        target_kwargs=target_options,
        donors=[str(folder) for folder in folders],
        data=data_options(images, work_dir, "targets", max_train=3000, max_validation=1000, max_test=2000),
        finetune={"num_train_epochs": 5, "batch_size": 64, "learning_rate": 1e-3, "use_cpu": True},
        arms=ARMS,
        seeds=1,
        output_dir=str(work_dir / f"{name}-evaluation"),
    )
    results = evaluate(config)
    arms = {
        arm: {
            "curve": [point["mean"] for point in outcome["summary"]["by_epoch"]],
            "test": [run["test"]["accuracy"] for run in outcome["runs"]],
            "cpu_seconds": [run["cpu_seconds"] for run in outcome["runs"] if "cpu_seconds" in run],
            "epochs_to_scratch": outcome["epochs_to_scratch"],
        }
        for arm, outcome in results["arms"].items()
    }
    return {"donors": [donor["test"]["accuracy"] for donor in results["donors"]], "arms": arms}


def train_donor(folder: Path, architecture: str, options: dict[str, Any], images: Path, seed: int) -> Path:
    """A donor, trained on other images than any target sees."""
    if not folder.is_dir():
        data = load_images(
            ImageDataConfig(**data_options(images, folder.parent, "donors", max_train=8000, max_test=1))
        )
        target = resolve_target(architecture, 10, options)
        model = target.build(seed)
        config = FinetuneOptions(
            num_train_epochs=6,
            learning_rate=2e-3,
            lr_scheduler_type="onecycle",
            seed=seed,
            use_cpu=True,
        )
        finetune(model, data.train, data.validation, config, progress=False)
        partial = folder.with_name(f".{folder.name}")
        partial.mkdir(parents=True, exist_ok=True)
        target.save(model.state_dict(), partial)
        partial.rename(folder)
    return folder


def data_options(images: Path, work_dir: Path, part: str, **limits: int) -> dict[str, Any]:
    """Options of one half of the training images: donors and targets share none."""
    folder = work_dir / f"images-{part}"
    if not folder.is_dir():
        table = pq.read_table(next(images.glob("train-*.parquet")))
        half = len(table) // 2
        folder.mkdir(parents=True)
        pq.write_table(table.slice(half if part == "targets" else 0, half), folder / "train-00000-of-00001.parquet")
        pq.write_table(pq.read_table(next(images.glob("test-*.parquet"))), folder / "test-00000-of-00001.parquet")
    sizes = {"max_train": 0, "max_validation": 200, "max_test": 0, **limits}
    return {"images": str(folder), "image_size": 32, "center_crop": 1.0, "crop_scale_min": 0.6, **sizes}


def splits_of(images: Path, **limits: int) -> ImageSplits:
    return load_images(ImageDataConfig(images=str(images), image_size=32, center_crop=1.0, **limits))


def pixels(examples: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(images `[N, 3, 32, 32]`, labels `[N]`) of a split."""
    batches = [
        examples.__getitems__(range(start, min(start + 500, len(examples)))) for start in range(0, len(examples), 500)
    ]
    images, labels = zip(*(pair for batch in batches for pair in batch), strict=True)
    return torch.stack(images), torch.tensor(labels)


@torch.no_grad()
def accuracy(module: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    module.eval()
    guesses = torch.cat([module(batch).argmax(1) for batch in images.split(500)])
    return float((guesses == labels).float().mean())
