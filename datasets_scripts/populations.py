"""Zoos of other researchers: which models they hold, and what is known of each, as their own files tell it.

modelzoos.cc (a folder a model, by Ray Tune: `params.json`, `result.json`, `checkpoint_0000NN/checkpoints`), the Small
CNN Zoo (`weights.npy`, a row a model, `metrics.csv.gz`, `layout.csv`), the Small Transformer Zoo (`metadata/mnist.csv`
beside `mnist/*.pt`) and Model-J (`train/models--owner--name/...`, or the table of its models on the Hub).
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from modeling_wsl.checkpoints.containers.numpy_files import LAYOUT
from modeling_wsl.checkpoints.containers.safetensors_files import read_header
from modeling_wsl.checkpoints.errors import CheckpointError, read_json


Properties = dict[str, Any]  # name -> number, text or boolean
MATRIX, METRICS = "weights.npy", ("metrics.csv.gz", "metrics.csv")  # of the Small CNN Zoo
CHECKPOINT = re.compile(r"checkpoint_(\d+)$")  # a folder of Ray Tune
# Of what Ray Tune writes, what is of the machine and the hour, not of the model.
NOT_OF_THE_MODEL = re.compile(
    r"time|date|pid|hostname|node_ip|trial_|experiment_|iterations_since|episodes_|done$|should_|hist_stats|cuda$"
    r"|.*(::dump|data_path|checkpoint_dir)$"
)
NOT_MEASURED = -999  # the training loss of a model before its first epoch
HUB_CACHE = "models--"
SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
MODEL_COLUMN = "hf_model_id"  # of Model-J's tables


def is_matrix_zoo(folder: Path) -> bool:
    """Whether a folder is a zoo whose models are the rows of a matrix."""
    return (folder / MATRIX).is_file() and (folder / LAYOUT).is_file()


def matrix_rows(folder: Path) -> Iterator[Properties]:
    """What is known of each model of such a zoo, in the order of its rows.

    Raises:
        CheckpointError: there is no table of them, or it cannot be read.
    """
    path = next((folder / name for name in METRICS if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(folder, f"has a matrix of models and lacks {METRICS[0]}", "Fetch it beside the matrix")
    for row, known in enumerate(_records(path)):
        known = {name.removeprefix("config."): value for name, value in known.items()}
        facts = {"member": str(known.pop("modeldir", row)), "epoch": known.pop("step", None)}
        yield _scalars(facts | known)


def table_models(path: Path) -> Iterator[tuple[str, Properties]] | None:
    """The models on the Hub that a table of Model-J lists, with what is known of each; None: it is no such table.

    A table that is named after a split (`train-00000-of-00001.parquet`) tells the split of its models.
    """
    if path.suffix not in (".csv", ".parquet"):
        return None
    records = _records(path)
    if not records or MODEL_COLUMN not in records[0]:
        return None
    named = SPLITS.get(re.split(r"[-_.]", path.name)[0])
    split = {"split": named} if named else {}
    return ((str(record.pop(MODEL_COLUMN)), _scalars(split | record)) for record in records)


def properties_of(path: Path) -> Properties:
    """What the zoo that a model is of tells of it, in files near it; {} where there is none."""
    match = CHECKPOINT.match(path.parent.name) or CHECKPOINT.match(path.name)
    trial = path.parent.parent if path.name == "checkpoints" else path.parent
    if match and (trial / "params.json").is_file():
        return _trial(trial).get(int(match[1])) or _trial(trial)[None] | {"epoch": int(match[1])}
    table = path.parent.parent / "metadata" / f"{path.parent.name}.csv"
    if table.is_file():
        return _listed(table).get(f"{path.parent.name}/{path.name}", {})
    above = [folder for folder in (path, *path.parents) if folder.name.startswith(HUB_CACHE)]
    if above and above[0].parent.name in SPLITS:
        weights = path / "model.safetensors" if path.is_dir() else path
        told = read_header(weights).metadata if weights.suffix == ".safetensors" and weights.is_file() else {}
        return {"split": SPLITS[above[0].parent.name]} | _scalars({n: _number(v) for n, v in told.items()})
    return {}


@functools.lru_cache(maxsize=4)
def _trial(folder: Path) -> Mapping[int | None, Properties]:
    """What is known of each epoch of a model of Ray Tune; under None what holds of all."""
    settings = read_json(folder / "params.json", "params.json", unique_keys=False)
    always = {"member": folder.name} | _of_model(settings if isinstance(settings, dict) else {})
    known: dict[int | None, Properties] = {None: always}
    results = folder / "result.json"
    for line in results.read_text(encoding="utf-8", errors="replace").splitlines() if results.is_file() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the line that was being written when the run ended
        if isinstance(record, dict) and isinstance(epoch := record.pop("training_iteration", None), int):
            known[epoch] = always | {"epoch": epoch} | _of_model(record)
    return known


def _of_model(record: Mapping[str, Any]) -> Properties:
    return {name: value for name, value in _scalars(record).items() if not NOT_OF_THE_MODEL.match(name)}


@functools.lru_cache(maxsize=4)
def _listed(table: Path) -> dict[str, Properties]:
    """What the metadata of a Small Transformer Zoo tell, by the checkpoint's file."""
    records = {str(record.pop("ckpt_file", "")): record for record in _records(table)}
    known = {}
    for file, record in records.items():
        epoch = str(record.pop("ckpt_epoch", ""))
        member = Path(file).name.split("_")[0]  # the run; its epoch and accuracy follow in the file's name
        facts = {"member": member, "epoch": int(epoch) if epoch.isdecimal() else epoch or None}
        known[file] = _scalars(facts | record)
    return known


def _records(path: Path) -> list[Properties]:
    """The rows of a table, an empty cell left out."""
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except Exception as error:  # of pandas, Arrow and gzip
        raise CheckpointError(
            path, f"is no table that can be read ({type(error).__name__})", "Fetch it again"
        ) from error
    return [{str(n): v for n, v in row.items() if not _is_empty(v)} for row in table.to_dict("records")]


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _scalars(record: Mapping[str, Any]) -> Properties:
    kept = {n: v for n, v in record.items() if isinstance(v, str | int | float | bool) and not _is_empty(v)}
    return {name: value for name, value in kept.items() if value != NOT_MEASURED or isinstance(value, str)}


def _number(text: str) -> Any:
    """A number or truth value that the metadata of a safetensors file keep as text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
