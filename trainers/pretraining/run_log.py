"""Where a run's figures go: metrics.jsonl always, one line in the log, and the trackers that were asked for."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers.utils import logging as hf_logging

from hf_wsl.files import write_text

from .pretrain_config import PretrainConfig


METRICS_FILE = "metrics.jsonl"
logger = logging.getLogger(__name__)


class RunLog:
    """Metrics of a run, written by the main process only (every other one's calls do nothing).

    Args:
        first_step: step that the run starts or resumes at; later lines of metrics.jsonl are dropped, since a resumed
            run writes them again.
        total_steps: length of the progress bar. It obeys `transformers.utils.logging.disable_progress_bar()`.
    """

    def __init__(self, accelerator: Accelerator, config: PretrainConfig, first_step: int, total_steps: int) -> None:
        self.accelerator = accelerator
        self.active = accelerator.is_main_process
        self.path = Path(config.output_dir) / METRICS_FILE
        if self.active:
            _keep_until(self.path, first_step)
        flat = {
            key: value if isinstance(value, int | float | str) else str(value)
            for key, value in config.to_dict().items()
        }
        accelerator.init_trackers(config.run_name, config=flat)
        enabled = self.active and hf_logging.is_progress_bar_enabled()
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", desc="pretrain", disable=not enabled)

    def advance(self) -> None:
        """One optimizer step is done."""
        self.bar.update()

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl and gives the numbers to the trackers."""
        if self.active:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log({key: value for key, value in values.items() if value is not None}, step=step)
        if "loss" in values:
            shown = {"loss": values["loss"], "R2": values["r2"]}
            shown = {name: "not finite" if value is None else f"{value:.4g}" for name, value in shown.items()}
            self.bar.set_postfix(shown, refresh=False)
            if self.bar.disable:
                speed = f"lr {values['lr']:.3g} | {values['tokens_per_s']:.0f} tokens/s"
                self.say(
                    f"step {step}: " + " | ".join(f"{name} {text}" for name, text in shown.items()) + f" | {speed}"
                )

    def say(self, line: str) -> None:
        """One line for people, above the progress bar."""
        if self.active:
            with tqdm.external_write_mode():
                logger.info(line)

    def close(self) -> None:
        self.bar.close()


def comparison_line(step: int, val_r2: float, baselines: dict[str, float]) -> str:
    """`step 200: val R2 0.431 | random projection 0.556 | PCA 0.577`."""
    lines = [f"step {step}: val R2 {val_r2:.3f}"] + [f"{name} {r2:.3f}" for name, r2 in baselines.items()]
    return " | ".join(lines)


def _keep_until(path: Path, step: int) -> None:
    """Creates metrics.jsonl, or drops what an interrupted run wrote after the checkpoint it resumes from."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() and step > 0 else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_text(path, "".join(line + "\n" for line in kept))
