"""`hf-wsl zoo`: trains a lab zoo stack by stack, and lists its checkpoints with what they reach."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn
from tqdm.auto import tqdm
from transformers.utils.logging import is_progress_bar_enabled

from datasets_scripts.schema import SPLITS
from datasets_scripts.sources import PROPERTIES_FILE, ZOO_MODELS, ZOO_TABLE
from datasets_scripts.tokenize import tokenize
from hf_wsl.errors import RunError
from hf_wsl.files import move_folder, write_json
from hf_wsl.run_folder import RunFolder
from hf_wsl.workers import one_thread, run_tasks

from ..data.images.image_crops import GRAY_MEAN, GRAY_STD, MEAN, STD
from .members import Member, stacks_of, zoo_members
from .networks import network_args, new_network, save_network
from .stack import Stack
from .stacked_training import train_stack
from .zoo_config import ZooConfig
from .zoo_images import zoo_images


logger = logging.getLogger(__name__)
DIVERGED_FILE, TOKENS_FOLDER, STACKS_FOLDER = "diverged.json", "tokens", "stacks"
PROPERTIES = pa.schema(
    [
        ("model_id", pa.string()),
        ("member", pa.string()),
        ("parent", pa.string()),
        ("epoch", pa.int64()),
        ("seed", pa.int64()),
        ("learning_rate", pa.float64()),
        ("weight_decay", pa.float64()),
        ("optimizer", pa.string()),
        ("activation", pa.string()),
        ("initialization", pa.string()),
        ("dropout", pa.float64()),
        ("architecture", pa.string()),
        ("dataset", pa.string()),
        ("num_parameters", pa.int64()),
        *((f"{split}_{what}", pa.float64()) for split in SPLITS for what in ("accuracy", "loss")),
        ("generalization_gap", pa.float64()),
        ("split", pa.string()),
    ]
)


@dataclass(frozen=True)
class ZooReport:
    """The content of a zoo.

    Attributes:
        output: its folder.
        members, checkpoints: numbers of those in `models/`.
        diverged: member -> why it is not among them.
    """

    output: Path
    members: int
    checkpoints: int
    diverged: dict[str, str]


@dataclass(frozen=True)
class StackTask:
    """Members that are trained at once: all that a worker process needs to know."""

    name: str
    members: tuple[Member, ...]
    config: ZooConfig
    run: RunFolder


def build_zoo(config: ZooConfig, output_dir: str | os.PathLike | None = None) -> ZooReport:
    """Trains all members, or those that an earlier run with the same settings did not come to.

    Args:
        config: see `ZooConfig`.
        output_dir: instead of the config's. Gets `models/<member>/epoch_<NNN>/` with `model.safetensors` and
            `config.json`, as timm reads them, and `properties.json`; `properties.parquet`, a row a checkpoint;
            `settings.json`; a record of each stack in `stacks/`; `diverged.json` where members diverged; and, if
            asked for, the tokenized dataset in `tokens/`.

    Raises:
        ValueError: the folder holds another zoo; settings, images or parents that do not work (a ConfigError or
            PublicDatasetError).
        RunError: every member diverged; a worker process died. What is done is kept.
    """
    output = Path(output_dir or config.output_dir).absolute()
    members = zoo_members(config)
    images = zoo_images(config.data_config)  # decoded once, here; the workers find them in the cache of `datasets`
    stacks = stacks_of(members, config)
    for alike in {(stack[0].activation, stack[0].dropout > 0): stack[0] for stack in stacks}.values():
        new_network(config, alike, images.num_classes)  # what cannot be built is refused before anything is written
    run = RunFolder(output, "a zoo", records=STACKS_FOLDER)
    tasks = [StackTask(f"{index:05d}", stack, config, run) for index, stack in enumerate(stacks)]
    with run.open(config.settings(), overwrite=config.overwrite_output_dir):
        train_missing(run, tasks, train_and_write, config.num_workers)
        records = [run.read_record(task.name) for task in tasks]
        rows = sorted((row for record in records for row in record["properties"]), key=lambda row: row["model_id"])
        diverged = dict(sorted(item for record in records for item in record["diverged"].items()))
        if diverged:
            run.write_json(output / DIVERGED_FILE, diverged)
            logger.warning("%d of %d members diverged; %s tells why", len(diverged), len(members), DIVERGED_FILE)
        if not rows:
            raise RunError(
                f"{output}: no checkpoint was kept, {len(diverged)} of {len(members)} members diverged. Lower the "
                "learning rates, or keep an epoch, in another folder."
            )
        table = pa.Table.from_pylist(rows, PROPERTIES)
        with run.replacing(output / ZOO_TABLE) as temporary:
            pq.write_table(table, temporary, compression="zstd")
        if config.tokenize:
            tokenize(output / ZOO_MODELS, output / TOKENS_FOLDER, config.tokenize_config, properties=table)
    return ZooReport(output, len(members) - len(diverged), len(rows), diverged)


def train_missing(run: RunFolder, tasks: Sequence[StackTask], function: Callable, num_workers: int) -> None:
    """Runs a function of this package, in worker processes, over the tasks that have no record yet."""
    missing = [task for task in tasks if not run.is_done(task.name)]
    total, to_do = (sum(len(task.members) for task in some) for some in (tasks, missing))
    if to_do < total:
        logger.info("%d of %d members were done before", total - to_do, total)
    hidden = not is_progress_bar_enabled()
    with tqdm(total=total, initial=total - to_do, desc="zoo", unit="member", disable=hidden) as bar:
        for trained in run_tasks(function, missing, num_workers, preload=function.__module__):
            bar.update(trained)


def train_and_write(task: StackTask) -> int:
    """Trains a stack on one thread; its members' folders appear, then its record. Returns the number of members."""
    config, run = task.config, task.run
    images = zoo_images(config.data_config)
    rows: list[dict[str, Any]] = []
    diverged: dict[int, str] = {}
    unfinished = run.temporary / task.name
    with one_thread():
        stack = Stack([new_network(config, member, images.num_classes) for member in task.members], task.members)
        for measured in train_stack(stack, images, config):
            diverged = measured.diverged
            for index, member in enumerate(task.members):
                if index in diverged:
                    continue
                network = stack.network_of(index)
                metrics = {name: values[index] for name, values in measured.metrics.items()}
                row = _properties(member, measured.epoch, config, network, metrics)
                folder = unfinished / row["model_id"]
                _, args = network_args(config, member)
                save_network(network, folder, args, _preprocessing(config, images.num_classes))
                write_json(folder / PROPERTIES_FILE, row)
                rows.append(row)
    reasons = {task.members[index].name: reason for index, reason in diverged.items()}
    kept = [row for row in rows if row["member"] not in reasons]
    for member in dict.fromkeys(row["member"] for row in kept):
        move_folder(unfinished / member, run.output / ZOO_MODELS / member)
    run.write_record(task.name, {"properties": kept, "diverged": reasons})
    return len(task.members)


def _properties(member: Member, epoch: int, config: ZooConfig, network: nn.Module, metrics: dict[str, float]) -> dict:
    images = Path(config.data_config.images)
    return {
        "model_id": f"{member.name}/epoch_{epoch:03d}",
        "member": member.name,
        "parent": member.parent,
        "epoch": epoch,
        "seed": member.seed,
        "learning_rate": member.learning_rate,
        "weight_decay": member.weight_decay,
        "optimizer": member.optimizer,
        "activation": member.activation,
        "initialization": member.initialization,
        "dropout": member.dropout,
        "architecture": config.architecture,
        "dataset": images.name if images.is_dir() else str(images),  # no folder of this machine
        "num_parameters": sum(parameter.numel() for parameter in network.parameters()),
        **metrics,
        "generalization_gap": metrics["train_accuracy"] - metrics["test_accuracy"],
        "split": member.split,
    }


def _preprocessing(config: ZooConfig, num_classes: int) -> dict[str, Any]:
    data = config.data_config
    mean, std = (MEAN, STD) if data.channels == 3 else (GRAY_MEAN, GRAY_STD)
    size = (data.channels, data.image_size, data.image_size)
    facts = {"input_size": size, "mean": mean, "std": std, "crop_pct": data.center_crop, "num_classes": num_classes}
    return {**facts, "license": config.license} if config.license else facts  # as timm spells it
