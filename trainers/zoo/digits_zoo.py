"""A small heterogeneous model zoo: classifiers of five timm families, trained on scikit-learn's handwritten digits."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import timm
import torch

from datasets_scripts.sources import PROPERTIES_FILE
from hf_wsl.files import write_json
from hf_wsl.run_folder import RunFolder
from hf_wsl.workers import one_thread

from ..data.images.digits import MEAN, NUM_CLASSES, STD, digits_splits
from ..finetuning.finetune_options import FinetuneOptions
from ..finetuning.finetune_trainer import finetune, measure
from .build_zoo import train_missing
from .networks import save_network


@dataclass(frozen=True)
class Architecture:
    """A timm architecture, narrowed until one member trains in seconds on one core."""

    name: str
    image_size: int
    model_args: Mapping[str, object]


# family -> architecture. The sizes lie between 0.1 and 0.3 million parameters, so that no family fills the data alone.
ARCHITECTURES = {
    "resnet": Architecture("resnet10t", 16, {"stem_width": 8, "channels": [16, 32, 64, 96]}),
    "convnext": Architecture("convnext_atto", 32, {"dims": [16, 32, 64, 96], "depths": [1, 1, 2, 1]}),
    "vit": Architecture(
        "vit_tiny_patch16_224",
        16,
        {
            "img_size": 16,
            "patch_size": 4,
            "embed_dim": 64,
            "depth": 3,
            "num_heads": 2,
            "global_pool": "avg",
            "class_token": False,
            "init_values": 0.1,
        },
    ),
    "efficientnet": Architecture("test_efficientnet", 16, {}),
    "swin": Architecture(
        "swin_tiny_patch4_window7_224",
        16,
        {
            "img_size": 16,
            "patch_size": 4,
            "window_size": 2,
            "embed_dim": 48,
            "depths": [1, 2],
            "num_heads": [2, 4],
        },
    ),
}


@dataclass(frozen=True)
class DigitsZooConfig:
    """The members of a zoo on digits and how they are trained."""

    families: tuple[str, ...] = field(default=tuple(ARCHITECTURES), metadata={"help": "Keys of ARCHITECTURES."})
    members_per_family: int = field(default=4, metadata={"help": "Each with a seed and an initialization of its own."})
    learning_rates: tuple[float, ...] = field(
        default=(4e-3, 2e-3), metadata={"help": "Taken in turn by the members of a family."}
    )
    epochs: int = field(default=8, metadata={"help": "Passes over the 1077 training digits."})
    batch_size: int = field(default=32, metadata={"help": "Images a step."})
    # The noise that weights are drawn from shrinks by exp(-sum of learning rate x weight decay); what is left of it
    # cannot be compressed. Usual recipes take a hundred thousand steps for what must happen in a few hundred here.
    weight_decay: float = field(default=3.0, metadata={"help": "Of AdamW, on matrices and kernels."})
    seed: int = field(
        default=0, metadata={"help": "Member i of family f is trained with a seed that follows from it."}
    )

    def __post_init__(self):
        unknown = [family for family in self.families if family not in ARCHITECTURES]
        if unknown or not self.families:
            raise ValueError(f"families={self.families}: choose among {', '.join(ARCHITECTURES)}.")
        if self.members_per_family < 1 or not self.learning_rates:
            raise ValueError("A zoo needs at least one member per family and one learning rate.")


@dataclass(frozen=True)
class FamilyMember:
    """One model of a zoo before it is trained."""

    name: str
    family: str
    seed: int
    learning_rate: float


def digits_members(config: DigitsZooConfig) -> list[FamilyMember]:
    """The members of a zoo, family by family; no two share a seed."""
    return [
        FamilyMember(
            name=f"{family}_{index:02d}",
            family=family,
            seed=config.seed * 10_000 + list(ARCHITECTURES).index(family) * 1_000 + index,
            learning_rate=config.learning_rates[index % len(config.learning_rates)],
        )
        for family in config.families
        for index in range(config.members_per_family)
    ]


def new_model(family: str, seed: int) -> torch.nn.Module:
    """A model of the family's architecture with the random initial weights that follow from the seed."""
    architecture = ARCHITECTURES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(
            architecture.name, num_classes=NUM_CLASSES, in_chans=1, **dict(architecture.model_args)
        )


@dataclass(frozen=True)
class FamilyTask:
    """A member and all that a worker process needs to know to train it; its record lies in its own folder."""

    member: FamilyMember
    config: DigitsZooConfig
    run: RunFolder

    @property
    def members(self) -> tuple[FamilyMember]:
        return (self.member,)

    @property
    def name(self) -> str:
        return f"{self.member.name}/{Path(PROPERTIES_FILE).stem}"


def build_digits_zoo(
    output_dir: str | os.PathLike, config: DigitsZooConfig | None = None, num_workers: int = 2
) -> list[Path]:
    """Trains the zoo; members that are there already are left alone, so that a stopped run goes on where it stopped.

    Every member is trained on one thread in a process of its own: the weights do not depend on `num_workers`.

    Args:
        output_dir: gets `settings.json` and a folder a member, written whole or not at all: `config.json` and
            `model.safetensors` as timm reads them (`timm.create_model("local-dir:<folder>", pretrained=True)`), and
            `properties.json` (family, seed, learning rate, accuracies, loss per epoch).
        config: see `DigitsZooConfig`.
        num_workers: processes; 1 trains in this one.

    Returns:
        The members' folders, in the order of `digits_members`.

    Raises:
        ValueError: `output_dir` holds a zoo made with other settings, or other files.
    """
    config = config or DigitsZooConfig()
    run = RunFolder(Path(output_dir), "a zoo", records=".")
    tasks = [FamilyTask(member, config, run) for member in digits_members(config)]
    with run.open(asdict(config)):
        train_missing(run, tasks, train_member, num_workers)
    return [run.output / task.member.name for task in tasks]


def read_properties(folder: str | os.PathLike) -> dict:
    """The `properties.json` of a member."""
    return json.loads((Path(folder) / PROPERTIES_FILE).read_text(encoding="utf-8"))


def train_member(task: FamilyTask) -> int:
    """Trains one member on one thread and writes its folder. Returns 1, the number of members."""
    member, config = task.member, task.config
    architecture = ARCHITECTURES[member.family]
    with one_thread():
        images = digits_splits(architecture.image_size)
        model = new_model(member.family, member.seed)
        training = FinetuneOptions(
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size,
            learning_rate=member.learning_rate,
            weight_decay=config.weight_decay,
            lr_scheduler_type="onecycle",
            seed=member.seed,
            use_cpu=True,  # the same weights everywhere, and no GPU is faster on models of this size
        )
        history = finetune(model, images["train"], images["validation"], training, progress=False)
        test = measure(model, images["test"], use_cpu=True)
    properties = {
        **asdict(member),
        "architecture": architecture.name,
        "model_args": dict(architecture.model_args),
        "image_size": architecture.image_size,
        "dataset": "scikit-learn digits",
        "training": asdict(training),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "validation_accuracy": history[-1].metrics["accuracy"],
        "test_accuracy": test["accuracy"],
        "test_loss": test["loss"],
        "history": [asdict(metrics) for metrics in history],
    }
    size = (1, architecture.image_size, architecture.image_size)
    facts = {"input_size": size, "mean": (MEAN,), "std": (STD,), "interpolation": "bilinear"}
    facts |= {"num_classes": NUM_CLASSES, "license": "apache-2.0"}
    with task.run.replacing_folder(task.run.output / member.name) as folder:
        save_network(model.cpu().eval(), folder, dict(architecture.model_args), facts)
        write_json(folder / PROPERTIES_FILE, properties)
    return 1
