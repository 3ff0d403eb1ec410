"""Collecting from a Hub on loopback: outcomes, requests, peak disk, and the speed beside plain downloads.

The claims: sixty mixed models get the outcomes they deserve, with one worker and four; real-sized models are examined,
fetched, checked, tokenized and written at a known share of the speed at which the same files are merely downloaded.

    python benchmarks/collect_hub.py --output results/collect_hub.json
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

from harness import machine, parser_of, publish


TESTS = Path(__file__).resolve().parent.parent / "tests"
HELPERS = (TESTS / "hub", TESTS / "fixtures")
# Real sizes, random weights: 4 to 102 MB each, 0.6 GB in all. Speed does not depend on what the weights are.
ARCHITECTURES = [
    *(
        "resnet18",
        "resnet34",
        "resnet50",
        "convnext_pico",
        "convnext_tiny",
        "efficientnet_b0",
        "mobilenetv3_large_100",
    ),
    *("vit_tiny_patch16_224", "vit_small_patch16_224", "deit_small_patch16_224", "swin_tiny_patch4_window7_224"),
]


@contextmanager
def hub_process(*options: str) -> Iterator[str]:
    """The tests' Hub in a process of its own; gives its url, with HF_ENDPOINT set to it."""
    server = subprocess.Popen(
        [sys.executable, str(TESTS / "hub" / "hub_server.py"), "--port", "0", *options],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        url = server.stdout.readline().split()[-1]
        os.environ |= {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        yield url
    finally:
        server.terminate()
        server.wait()


def control(url: str, route: str, content: dict | None = None, method: str | None = None) -> dict:
    data = None if content is None else json.dumps(content).encode()
    with urlopen(Request(f"{url}/__test__/{route}", data=data, method=method)) as answer:
        return json.load(answer)


class DiskWatch:
    """The largest sum of the sizes of weight files being read, seen every 5 ms."""

    def __init__(self, output: Path):
        self.place = output / ".tokenize"
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, sum(map(allocated, self.place.glob("*/weights-*/*"))))

    def __enter__(self) -> "DiskWatch":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()


def allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def dataset_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def timed_collection(url: str, output: Path, config) -> dict:
    """Collects into a fresh folder; what it took."""
    from datasets_scripts.collect.collect import collect

    shutil.rmtree(output, ignore_errors=True)
    control(url, "log", method="DELETE")
    with DiskWatch(output) as watch:
        began = time.perf_counter()
        report = collect(output, config)
        seconds = time.perf_counter() - began
    totals = control(url, "log")["totals"]
    return {
        "workers": config.num_workers,
        "seconds": round(seconds, 3),
        "outcomes": dict(report.outcomes),
        "requests": totals["requests"],
        "bytes_received": totals["bytes"],
        "peak_weights_on_disk": watch.peak,
        "parameters": report.num_parameters,
        "dataset_sha256": dataset_hash(output),
    }


def mixed_models(folder: Path, repeats: int) -> dict:
    """Part one: sixty models, good and broken."""
    with hub_process("--mixed") as url:
        from collect_fixtures import configured

        runs = [timed_collection(url, folder / f"mixed-{n}", configured(num_workers=n)) for n in (1, 4)]
    return {"runs": runs, "same_bytes": len({run["dataset_sha256"] for run in runs}) == 1}


def real_sizes(folder: Path, repeats: int) -> dict:
    """Part two: models of real size; collected, and merely downloaded, by turns."""
    with hub_process() as url:
        import timm
        import torch
        from huggingface_hub import hf_hub_download
        from timm.models import save_for_hf

        from datasets_scripts.collect.config import CollectConfig

        total = 0
        for seed, architecture in enumerate(ARCHITECTURES):
            torch.manual_seed(seed)
            place = folder / architecture
            save_for_hf(timm.create_model(architecture), place, safe_serialization=True)
            (place / "README.md").write_text("---\nlicense: mit\npipeline_tag: image-classification\n---\n")
            files = {path.name: {"path": str(path)} for path in place.iterdir()}
            control(url, "add", {"repo_id": f"bench/{architecture}", "files": files})
            total += (place / "model.safetensors").stat().st_size

        def download(to: Path) -> float:
            began = time.perf_counter()
            for architecture in ARCHITECTURES:
                for name in ("config.json", "model.safetensors"):
                    hf_hub_download(f"bench/{architecture}", name, cache_dir=to)
            seconds = time.perf_counter() - began
            shutil.rmtree(to)
            return seconds

        runs, downloads = [], []
        for _ in range(repeats):
            downloads.append(round(download(folder / "cache"), 3))
            for workers in (1, 2):
                config = CollectConfig(
                    tasks="image-classification", num_workers=workers, num_train=90, num_validation=10
                )
                runs.append(timed_collection(url, folder / "collected", config))
    fastest = min(downloads)
    best = [min((r for r in runs if r["workers"] == n), key=lambda r: r["seconds"]) for n in (1, 2)]
    return {
        "models": len(ARCHITECTURES),
        "weight_bytes": total,
        "download_seconds": downloads,
        "runs": runs,
        "summary": [
            {
                "workers": run["workers"],
                "models_per_second": round(len(ARCHITECTURES) / run["seconds"], 2),
                "mb_per_second": round(total / run["seconds"] / 1e6, 1),
                "share_of_plain_download": round(fastest / run["seconds"], 3),
            }
            for run in best
        ],
        "plain_download_mb_per_second": round(total / fastest / 1e6, 1),
    }


PARTS = {"mixed": mixed_models, "real_sizes": real_sizes}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path[:0] = map(str, HELPERS)
    os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, HELPERS), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if arguments.part:
            report = PARTS[arguments.part](folder, arguments.repeats)
        else:  # a process for each: the workers of a process keep the Hub that they began with
            report = machine()
            for part in PARTS:
                file = folder / f"{part}.json"
                own = [__file__, "--output", str(file), "--repeats", str(arguments.repeats), "--part", part]
                subprocess.run([sys.executable, *own], check=True)
                report[part] = json.loads(file.read_text())
    publish(report, arguments.output)


if __name__ == "__main__":
    main()
