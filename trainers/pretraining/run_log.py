"""Where a run's figures go beside Trainer's trackers: metrics.jsonl, and a line in the log."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from hf_wsl.files import write_text


METRICS_FILE = "metrics.jsonl"
logger = logging.getLogger(__name__)


class RunLog(TrainerCallback):
    """Writes the lines of metrics.jsonl, and says them where no progress bar does; on the main process only."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **options: Any) -> None:
        logs = logs or {}
        if not state.is_world_process_zero or not {"loss", "eval_r2"} & logs.keys():
            return  # Trainer's summary of a sitting
        with (Path(args.output_dir) / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        if "loss" in logs and args.disable_tqdm:
            r2 = "not finite" if logs["r2"] is None else f"{logs['r2']:.4g}"
            figures = f"loss {logs['loss']:.4g} | R2 {r2} | lr {logs['learning_rate']:.3g}"
            say(f"step {state.global_step}: {figures} | {logs['tokens_per_s']:.0f} tokens/s")


def say(line: str) -> None:
    """One line for people, above the progress bar."""
    with tqdm.external_write_mode():
        logger.info(line)


def comparison_line(step: int, r2: float, baselines: dict[str, float]) -> str:
    """`step 200: val R2 0.431 | random projection 0.556 | PCA 0.577`."""
    return " | ".join([f"step {step}: val R2 {r2:.3f}"] + [f"{name} {value:.3f}" for name, value in baselines.items()])


def keep_until(path: Path, step: int) -> None:
    """Creates metrics.jsonl, or drops what an interrupted run wrote after the checkpoint it resumes from."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() and step > 0 else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_text(path, "".join(line + "\n" for line in kept))
