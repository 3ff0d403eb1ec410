"""Parts of every benchmark: its arguments, facts of the machine, timing by turns, memory of a process, JSON out."""

import argparse
import json
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch


# What decides how fast a CPU multiplies matrices, as Linux names it.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def parser_of(docstring: str) -> argparse.ArgumentParser:
    """A parser with `--output`, that says what the script's docstring says."""
    parser = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file of the results.")
    return parser


def publish(report: Mapping[str, Any], output: Path | None) -> None:
    """Prints a report, and writes it where a file is named."""
    from hf_wsl.files import write_json  # here: a script may have to name its Hub before the library is imported

    print(json.dumps(report, indent=1))
    if output:
        write_json(output, report)


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The facts without which a figure means nothing; `hf-wsl reproduce speed` shows them above its rows."""
    cpu = f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    return {
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in _cpu_flags()],
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }


def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return set(text.partition("flags")[2].partition("\n")[0].split())


def in_turn(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    device: torch.device | str = "cpu",
) -> dict[str, list[float]]:
    """Seconds of each function in each round; they run one after the other, so that all meet the same machine.

    A first round is not counted. Work on a GPU is waited for.
    """
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            wait()
            start = clock()
            function()
            wait()
            seconds[name].append(clock() - start)
    return {name: values[1:] for name, values in seconds.items()}


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each function's rounds."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a new process, so that its memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def memory_mb(field: str = "RssAnon") -> float:
    """Memory of this process in MB by a field of Linux' /proc.

    Args:
        field: "RssAnon", anonymous memory, without the pages of mapped files; "VmHWM", the highest of all so far.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{field}:")[1].split()[0]) * 1024 / 1e6


class PeakMemory:
    """Samples anonymous memory every few milliseconds until `stop`, which returns the highest."""

    def __init__(self) -> None:
        self.highest, self.stopped = memory_mb(), threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()

    def _sample(self) -> None:
        while not self.stopped.wait(0.005):
            self.highest = max(self.highest, memory_mb())

    def stop(self) -> float:
        self.stopped.set()
        self.thread.join()
        return self.highest
