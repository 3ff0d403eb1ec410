"""`hf-wsl reproduce speed`: one table of what the scripts under benchmarks/ have measured of speed and memory.

The scripts measure, this prints: each writes a JSON file into the folder of results. A file `<script>_<machine>.json`
stands beside `<script>.json` with rows of its own, as when a script has run on a GPU too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hf_wsl.options import ConfigError
from hf_wsl.tables import markdown_table


SPEED = "speed"  # what `hf-wsl reproduce` calls it
HEADER = ("claim", "figure", "ratio to its limit", "plain version")
OF_AN_H200 = "times what an H200 takes"
Report = Mapping[str, Any]
Row = tuple[str, str, str, str]

# What a stream has to feed until one was measured: hf-small on an H200 at the share of its rate that is our goal.
H200_TFLOP_PER_S = 989  # bfloat16 without sparsity, NVIDIA's data sheet
H200_SHARE = 0.55
TFLOP_PER_CROP = 2.94  # of hf-small: matmuls and attention, forward and backward, two views of 512 tokens
H200_CROPS_PER_S = H200_TFLOP_PER_S * H200_SHARE / TFLOP_PER_CROP


def speed_table(results_dir: str | Path, shown_as: str | None = None) -> str:
    """The table, and below it what was not measured yet and how to measure it.

    Args:
        results_dir: folder of the scripts' JSON.
        shown_as: the folder's name in the text; None: as given.

    Returns:
        Markdown, without a line break at its end. Above the rows of a file stands its name and machine.

    Raises:
        ConfigError: a file that is no JSON, or that lacks what its script writes now.
    """
    folder, shown_as = Path(results_dir), shown_as or str(results_dir)
    h200_crops, h200_note = _crops_of_an_h200(_read(folder, "training_step"))
    rows_of: dict[str, Callable[[Report], list[Row]]] = {
        "training_step": _training_rows,
        "data_loading": partial(_loading_rows, h200_crops=h200_crops),
        "generation_speed": _generation_rows,
        "embedding": _embedding_rows,
        "tokenization_speed": _tokenization_rows,
        "stream_memory": _memory_rows,
    }
    rows: list[Row] = []
    missing = []
    for script, function in rows_of.items():
        files = _read(folder, script)
        for path, report in files.items():
            try:
                rows += [(f"*{path.name}: {_machine(report)}*", "", "", ""), *function(report)]
            except KeyError as error:
                message = f"{path} has no {error}: another version of benchmarks/{script}.py wrote it. Run that again"
                raise ConfigError(message) from None
        if not files:
            command = f"python benchmarks/{script}.py --output {shown_as}/{script}.json"
            missing.append(f"No {script}.json in {shown_as}: `{command}` measures it.")
    notes = [h200_note] if any(OF_AN_H200 in row[2] for row in rows) else []
    return "\n\n".join([markdown_table(HEADER, rows, text_columns=len(HEADER)), *notes, *missing])


def _read(folder: Path, script: str) -> dict[Path, Report]:
    """The reports of one script, that of no named machine first."""
    reports = {}
    for path in [folder / f"{script}.json", *sorted(folder.glob(f"{script}_*.json"))]:
        if path.is_file():
            try:
                report = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{path} is not JSON ({error}). Run benchmarks/{script}.py again") from None
            if not isinstance(report, dict):
                raise ConfigError(f"{path} is not a report of benchmarks/{script}.py. Run that again")
            reports[path] = report
    return reports


def _machine(report: Report) -> str:
    """Device, threads and torch, as far as the file has them; all scripts run on a CPU where they name no device."""
    facts = [report.get("device", "cpu")]
    if "threads" in report:
        facts.append(_count(report["threads"], "thread"))
    elif "cpus" in report:
        facts.append(_count(report["cpus"], "core"))
    if "torch" in report:
        facts.append(f"torch {report['torch']}")
    if report.get("clock") == "processor time":
        facts.append("by processor time")
    if "load_average" in report:
        facts.append(f"load average {report['load_average']:.1f} before")
    return ", ".join(facts)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f} M weights"


def _each(values: Sequence[float], pattern: str) -> str:
    return " / ".join(pattern.format(value) for value in values)


def _training_rows(report: Report) -> list[Row]:
    extras = [
        *([report["optimizer"]] if not report["optimizer"].startswith("adamw") else []),
        *(["compiled"] if report["compiled"] else []),
        *(["activations computed twice"] if report["activation_checkpointing"] else []),
    ]
    rows = []
    for row in report["results"]:
        layers = row["layers_a_side"]
        shape = [f"{layers} + {layers} layers", f"{row['batch']} x {row['window']} tokens"]
        if row["short_windows"]:
            shape.append(f"{row['short_windows']:.0%} of the windows half empty")
        memory, plain = row["peak_gpu_memory_gb"], row["plain_over_step"]
        share = f"{row['share_of_matmul_limit']:.2f} of the bf16 matmul rate"
        rows.append(
            (
                f"training step, {row['size']} ({', '.join([*shape, *extras])})",
                f"{row['tokens_per_s']:,.0f} tokens/s" + (f", {memory:.1f} GB of GPU memory" if memory else ""),
                f"{share}; its matmuls alone take {row['own_matmuls_share_of_step']:.2f} of its time",
                f"{plain:.1f} times as fast as plain float32" if plain else "",
            )
        )
        for run in row.get("paper_runs", ()):
            claim = f"the paper's run of {row['size']}, {run['epochs']} epochs, at this speed"
            paper = f"the paper: {run['paper_hours_h100']} hours on an H100"
            rows.append((claim, f"{run['projected_hours']:,.0f} hours", "", paper))
    return rows


def _loading_rows(report: Report, h200_crops: float) -> list[Row]:
    rows = []
    kinds = {"stored": "from the disk", "stream_from_folder": "streamed from a folder"}
    for key, where in {**kinds, "stream_from_hub": "streamed from a Hub on loopback"}.items():
        if key not in report:
            continue  # the script can measure a part alone
        runs = report[key]
        workers = " / ".join(str(row["workers"]) for row in runs)
        plural = "s" * (workers != "1")
        claim = f"crops of {report['window_size']} tokens {where}, {workers} worker{plural}"
        if key == "stored":
            crops = [row["loader_crops_per_s"] for row in runs]
            ratio = f"{_each([row['ratio'] for row in runs], '{:.2f}')} of a raw memmap"
        else:
            crops = [row["crops_per_s"] for row in runs]
            ratio = f"{_each([value / h200_crops for value in crops], '{:.1f}')} {OF_AN_H200}"
        plain = ""
        if key == "stream_from_folder":  # which reads a window for a crop
            times = _each([value / report["pyarrow_windows_per_s"] for value in crops], "{:.1f}")
            plain = f"{times} times as fast as pyarrow alone on one thread"
        rows.append((claim, f"{_each(crops, '{:,.0f}')} crops/s", ratio, plain))
    return rows


def _crops_of_an_h200(training: Mapping[Path, Report]) -> tuple[float, str]:
    """Crops a second that training hf-small takes, and how the number comes about."""
    for path, report in training.items():
        for row in report.get("results", ()):
            if "H200" in report.get("device", "") and row.get("size") == "hf-small":
                crops = row["crops_per_s"]
                return crops, f"An H200 takes {crops:,.0f} crops a second in training hf-small ({path.name})."
    return H200_CROPS_PER_S, (
        f"An H200 would take {H200_CROPS_PER_S:.0f} crops a second in training hf-small: a crop is {TFLOP_PER_CROP} "
        "TFLOP (matmuls and attention, forward and backward, two views), and "
        f"{H200_SHARE} of the bf16 rate of its data sheet is {H200_SHARE} x {H200_TFLOP_PER_S} TFLOP/s."
    )


def _generation_rows(report: Report) -> list[Row]:
    rows = []
    for row in report["results"]:
        backbone = f"{row['layers_a_side']} + {row['layers_a_side']} layers {row['hidden_size']} wide"
        ours = [f"with {' and '.join(row['options']).replace('_', ' ')}"] if row["options"] else []
        facts = [_millions(row["parameters"]), backbone, f"{row['heads']} heads", *ours]
        about = f"{row['model']} ({', '.join(facts)})"
        for task, verb in {"generation": "generating", "embedding": "embedding"}.items():
            limit, alone = (row[key][task] for key in ("ratio_to_limit", "ratio_to_matmuls_alone"))
            figure, plain = f"{row['seconds'][task]['wall']:.2f} s", ""
            if task == "generation":
                figure += f"; each further draw {row['seconds_of_each_further_draw']['wall']:.2f} s"
                if "times_faster_than_plain" in row:  # the script can leave it out
                    times = row["times_faster_than_plain"]["wall"]
                    plain = f"{times:.1f} times as fast as float32, a window a pass"
            ratio = f"{limit['wall']:.2f} times the matmul-limited time"
            if report["threads"] == 1:  # of several, one may wait for the others, and a limit is the best of many runs
                ratio += f" ({limit['processor']:.2f} by processor time)"
            rows.append((f"{verb} {about}", figure, f"{ratio}; {alone['wall']:.2f} times its matmuls alone", plain))
    return rows


def _embedding_rows(report: Report) -> list[Row]:
    precision = "bf16" if report["mixed_precision"] == "bf16" else "float32"
    rows = []
    for row in report["models"]:
        is_backbone = row["method"] in ("backbone", Path(report["backbone"]).name)
        by = f"a backbone ({report['backbone']}, {precision})" if is_backbone else row["method"]
        speed = f"{row['seconds']:,.1f} s, {row['tokens_per_second']:,} tokens/s"
        memory = f"{row['anonymous_mb_above']:.0f} MB above a small model's, {row['peak_rss_mb']:,.0f} MB in all"
        reading = f"{row['times_reading_alone']:,.0f} times reading the file alone"
        rows.append(
            (f"embedding {row['model']} ({_millions(row['parameters'])}) by {by}", f"{speed}; {memory}", reading, "")
        )
    if "small_models" in report:
        small = report["small_models"]
        plain = f"{small['ratio']:.1f} times as fast as a call each"
        rows.append((f"embedding {small['models']:,} tiny networks", f"{small['seconds_together']:.1f} s", "", plain))
    return rows


CHECKED, UNCHECKED, ALONE = "tokens, mask, positions, finite check", "tokens, mask, positions", "tokens alone"
STREAMED, DECODED, LOOP = "streamed from safetensors", "decoded", "plain loop over tokens (tokens alone)"


def _tokenization_rows(report: Report) -> list[Row]:
    rows = []
    for row in report["results"]:
        share, copy = row["share_of_memcpy"], row["memcpy_gb_per_s"]
        about = f"{row['model']}, {row['tokenization']}"
        facts = f"{row['tokens']:,} tokens, {row['padding']:.2%} padding"
        parts = {"without NaN check": UNCHECKED, "tokens alone": ALONE, "streamed": STREAMED}
        ratio = "; ".join(f"{name} {share[key]:.2f}" for name, key in parts.items())
        loop = f"{share[ALONE] / share[LOOP]:.0f} times as fast as a loop over tokens (tokens alone)"
        rate = f"{share[CHECKED] * copy:.1f} GB/s"
        rows.append((f"tokenizing {about} ({facts})", rate, f"{share[CHECKED]:.2f} of memcpy; {ratio}", loop))
        decoded = f"{share[DECODED]:.2f} of memcpy"
        rows.append((f"detokenizing {about}", f"{share[DECODED] * copy:.1f} GB/s", decoded, ""))
    return rows


def _memory_rows(report: Report) -> list[Row]:
    above, size = report["anonymous_mb_above"], report["file_gb"]
    claim = f"streaming a model of {report['parameters'] / 1e9:.2f} billion parameters ({size:.1f} GB)"
    figure = f"{above:.0f} MB of memory above the interpreter's own"
    return [(claim, figure, f"{above / size / 1000:.3f} of the file", "")]
