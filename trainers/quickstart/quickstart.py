"""`hf-wsl quickstart`: the whole way once, small and offline: zoo, tokens, backbone, embeddings, weights, report."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from time import monotonic
from typing import Any

import huggingface_hub.constants

from hf_wsl.run_folder import RunFolder
from hf_wsl.workers import one_thread

from ..pretrain import versions
from .report import write_report
from .stages import STAGES, Place, QuickstartConfig


logger = logging.getLogger(__name__)
RESULTS_FILE = "results.json"


def quickstart(
    output_dir: str | os.PathLike = "quickstart",
    seed: int = 0,
    config: QuickstartConfig | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Runs the whole way from nothing to a report, on the CPU and without a network.

    Every stage calls what a user would call and is skipped when an earlier run finished it. Several processes are
    used, so a script that calls this needs the usual `if __name__ == "__main__":`.

    Args:
        output_dir: gets `zoo/`, `dataset/`, `backbone/`, `generated/`, `arms/`, a record of each stage in `stages/`,
            the pictures, `results.json` and `report.html`.
        seed: of everything that is drawn. The same seed gives the same numbers on the same machine.
        config: the sizes; the seeds of its parts follow from `seed`.
        overwrite: delete the quickstart that is there, finished or not, and begin anew.

    Returns:
        The content of `results.json`: settings, versions, and the result of each stage.

    Raises:
        ValueError: `output_dir` holds a quickstart with other settings.
    """
    config = config or QuickstartConfig()
    config = replace(config, zoo=replace(config.zoo, seed=seed))
    folder = Path(output_dir)
    run = RunFolder(folder, "a quickstart", records="stages", report=RESULTS_FILE)
    place = Place(folder, seed, config)
    with run.open({"seed": seed, **asdict(config)}, overwrite=overwrite) as settings, _offline(), one_thread():
        results: dict[str, Any] = {"settings": settings, "versions": versions()}
        for number, (name, work) in enumerate(STAGES.items(), start=1):
            logger.info("[%d/%d] %s", number, len(STAGES) + 1, name)
            results[name] = _stage(run, name, lambda work=work: work(place))
        logger.info("[%d/%d] report", len(STAGES) + 1, len(STAGES) + 1)
        results["seconds"] = {name: results[name]["seconds"] for name in STAGES}
        run.finish(results)
        write_report(results, folder)
    return results


def _stage(run: RunFolder, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures of a stage: from its record, or by doing it now."""
    if run.is_done(name):
        logger.info("done before: %s", run.record(name))
    else:
        started = monotonic()
        figures = work()
        run.write_record(name, {**figures, "seconds": round(monotonic() - started, 1)})
    # Read back in both cases, so that a resumed run continues with the very same values.
    return run.read_record(name)


@contextmanager
def _offline() -> Iterator[None]:
    """Nothing is fetched, and nothing asks: not here and not in worker processes."""
    before, variable = huggingface_hub.constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE")
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # read once at import, so the variable alone would be too late
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before
        if variable is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = variable
