"""What the tests of `collect` share: its settings for the mixed models, and the rows of a dataset."""

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
from hub_models import LARGEST, SMALLEST, TASKS, seed_mixed
from interrupted_runs import hashes

from datasets_scripts.collect import collect
from datasets_scripts.collect_config import CollectConfig


CONFIG = CollectConfig(
    tasks=",".join(TASKS),
    licences="redistributable",
    min_parameters=SMALLEST,
    max_parameters=str(LARGEST),
    num_train=90,
    num_validation=10,
    window_size=64,
    retries=3,
    retry_pause=0.01,
)


def configured(**changes) -> CollectConfig:
    return replace(CONFIG, **changes)


def collect_undisturbed(hub, folder: Path) -> dict[str, str]:
    """Collects the mixed models with one worker and without a fault; returns the hashes of the dataset."""
    hub.reset()
    seed_mixed(hub)
    collect(folder, CONFIG)
    return hashes(folder)


def model_rows(folder: Path) -> dict[str, dict]:
    """The rows of the config `models`, by id."""
    tables = [pq.read_table(path) for path in sorted((folder / "models").glob("*.parquet"))]
    return {row["model_id"]: row for table in tables for row in table.to_pylist()}


def window_rows(folder: Path) -> list[dict]:
    """The rows of the config `windows`."""
    tables = [pq.read_table(path) for path in sorted((folder / "windows").glob("*.parquet"))]
    return [row for table in tables for row in table.to_pylist()]
