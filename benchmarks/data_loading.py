"""Crops per second that training batches come at: from the disk beside a raw memmap, and as a stream.

    python benchmarks/data_loading.py --output results/data_loading.json

The claims: batches from a tokenized dataset on the disk come at about 0.8 of the speed at which numpy copies the same
crops out of one raw file; a stream gives several times what an H200 would take at 0.55 of its rate. Without DATASET,
720 windows of random weights (1.3 GB) are tokenized in the temporary folder. All of it lies in the page cache: the
loader is measured, not the disk. The stream is read from the folder, and from the tests' Hub on loopback.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import timm
import torch
from collect_hub import control, hub_process
from harness import machine, parser_of, publish
from safetensors.torch import save_file
from torch.utils.data import Dataset

from datasets_scripts.tokenize import tokenize
from datasets_scripts.tokenize_config import TokenizeConfig
from trainers.data.windows.crops import Crop, TrainingOrder
from trainers.data.windows.dataset_source import DatasetSource
from trainers.data.windows.training_batches import BatchPlan, StoredBatches, StreamedBatches
from trainers.data.windows.window_data import WindowDataset, make_loader
from trainers.reproduction.speed import H200_CROPS_PER_S


WINDOW_SIZE, BATCH_SIZE = 512, 64
ROUNDS, BATCHES_A_ROUND = 41, 10  # of each side, in turn: 640 crops, 0.15 GB
STREAM_ROUNDS, STREAM_BATCHES = 7, 15
ARCHITECTURES, COPIES = ("vit_base_patch16_224", "resnet50"), 6
PARTS = ("stored", "folder", "hub")


class RawCrops(Dataset):
    """The reference: the payload of all windows in one file, mapped by numpy; crops are copied into a batch."""

    def __init__(self, file: Path, windows: WindowDataset) -> None:
        dtype, token_size = windows.window(0)[0].dtype, windows.token_size
        self.first = np.cumsum([0, *windows.num_tokens]).tolist()
        with file.open("wb") as out:
            for row in range(len(windows)):
                windows.window(row)[0].tofile(out)
        # A plain array: the class memmap costs a microsecond a slice.
        self.payload = np.asarray(np.memmap(file, dtype, "r")).reshape(-1, token_size)

    def __getitems__(self, crops: list[Crop]) -> dict[str, torch.Tensor]:
        batch = np.empty((len(crops), WINDOW_SIZE, self.payload.shape[1]), self.payload.dtype)
        for i, crop in enumerate(crops):
            first = self.first[crop.window] + crop.start
            batch[i, : crop.length] = self.payload[first : first + crop.length]
            batch[i, crop.length :] = 0
        return {"tokens": torch.from_numpy(batch)}


def plan_of(workers: int) -> BatchPlan:
    return BatchPlan(WINDOW_SIZE, BATCH_SIZE, accumulation=1, rank=0, world_size=1, seed=0, num_workers=workers)


def rate(batches: Iterator[dict[str, torch.Tensor]], workers: int, count: int) -> float:
    """Crops a second of `count` batches, each let go of as by a training step, after those that lay ready."""
    for _ in islice(batches, 2 * workers + 1):
        pass
    began = time.perf_counter()
    for _ in islice(batches, count):
        pass
    return count * BATCH_SIZE / (time.perf_counter() - began)


def measure_stored(dataset: Path, workers: int, scratch: Path) -> dict[str, Any]:
    """Both sides go on from round to round, by turns: starting workers and mapping the files is left out.

    The raw file is always read in the process itself.
    """
    windows = WindowDataset(DatasetSource(str(dataset)).load()["train"], pad_to=WINDOW_SIZE)
    raw = RawCrops(scratch / "payload.bin", windows)
    steps = (ROUNDS + 1) * (BATCHES_A_ROUND + 2 * workers + 1)
    order = TrainingOrder(windows.num_tokens, WINDOW_SIZE, seed=0, batch_size=BATCH_SIZE, last_step=steps)
    loader = StoredBatches(windows).batches(plan_of(workers), 0, steps)
    memmap = iter(make_loader(raw, list(order), 0))
    pairs = [[rate(side, workers, BATCHES_A_ROUND) for side in (loader, memmap)] for _ in range(ROUNDS + 1)][1:]
    return {
        "workers": workers,
        "loader_crops_per_s": round(statistics.median(ours for ours, _ in pairs)),
        "raw_memmap_crops_per_s": round(statistics.median(raw for _, raw in pairs)),
        "ratio": round(statistics.median(ours / raw for ours, raw in pairs), 3),
    }


def measure_stream(name: str, workers: int) -> dict[str, Any]:
    """A stream in its steady state: for every crop that is given out, one window is read."""
    source = DatasetSource(name)
    began = time.perf_counter()
    batches = StreamedBatches(source.stream(), source.sizes()["train"]).batches(plan_of(workers), 0, 10**6)
    next(batches)
    first = time.perf_counter() - began
    rates = [rate(batches, workers, STREAM_BATCHES) for _ in range(STREAM_ROUNDS)]
    return {
        "workers": workers,
        "crops_per_s": round(statistics.median(rates)),
        "times_what_an_h200_takes": round(statistics.median(rates) / H200_CROPS_PER_S, 2),
        "seconds_to_first_batch": round(first, 2),
    }


def windows_by_pyarrow(dataset: Path) -> int:
    """Windows a second that pyarrow reads from the same files, one thread: the rate of a plain stream."""
    count, seconds = 0, 0.0
    for path in sorted(dataset.glob("windows/train-*.parquet")):
        with pq.ParquetFile(path) as file:
            for group in range(min(file.num_row_groups, 8)):
                began = time.perf_counter()
                count += file.read_row_group(group, use_threads=False).num_rows
                seconds += time.perf_counter() - began
    return round(count / seconds)


def measure_hub(dataset: Path, workers: list[int]) -> list[dict[str, Any]]:
    """The stream from the tests' Hub, in a process of its own: the client reads its address when it is imported."""
    with hub_process() as url:
        files = {
            path.relative_to(dataset).as_posix(): {"path": str(path)}
            for path in sorted(dataset.rglob("*"))
            if path.is_file()
        }
        control(url, "add", {"repo_id": "bench/tokens", "repo_type": "dataset", "files": files})
        own = [sys.executable, __file__, "bench/tokens", "--stream-only", "--workers", *map(str, workers)]
        return json.loads(subprocess.run(own, check=True, stdout=subprocess.PIPE, text=True).stdout)


def write_dataset(folder: Path) -> Path:
    for seed in range(COPIES):
        for name in ARCHITECTURES:
            torch.manual_seed(seed)
            path = folder / "models" / f"{name}-{seed}" / "model.safetensors"
            path.parent.mkdir(parents=True)
            save_file({k: v.contiguous().half() for k, v in timm.create_model(name).state_dict().items()}, path)
    tokenize(folder / "models", folder / "tokens", TokenizeConfig(split_by="model"))
    return folder / "tokens"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("dataset", nargs="?", help="Folder written by `hf-wsl tokenize`.")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--stream-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stream_only:
        print(json.dumps([measure_stream(arguments.dataset, workers) for workers in arguments.workers]))
        return
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        dataset = Path(arguments.dataset) if arguments.dataset else write_dataset(scratch)
        report: dict[str, Any] = {
            **machine(),
            "pyarrow": pyarrow.__version__,
            "dataset": dataset.name if arguments.dataset else "random weights",
            "window_size": WINDOW_SIZE,
            "batch_size": BATCH_SIZE,
        }
        if "stored" in arguments.parts:
            report["stored"] = [measure_stored(dataset, workers, scratch) for workers in arguments.workers]
        if "folder" in arguments.parts:
            report["pyarrow_windows_per_s"] = windows_by_pyarrow(dataset)
            report["stream_from_folder"] = [measure_stream(str(dataset), workers) for workers in arguments.workers]
        if "hub" in arguments.parts:
            report["stream_from_hub"] = measure_hub(dataset, arguments.workers)
    publish(report, arguments.output)


if __name__ == "__main__":
    main()
