"""`hf-wsl collect --dry_run`: an estimate of a collection; headers are read, weights are not."""

import random
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from datasets.utils import tqdm

from hf_wsl.workers import one_thread
from modeling_wsl.checkpoints.errors import CheckpointError

from ..model_task import refusing
from ..outcomes import outcome_of
from ..schema import ACCEPTED
from ..sources import expand_sources
from .config import CollectConfig
from .hub_listing import Candidate, list_candidates, named_candidates
from .hub_reader import HubReader, Pace
from .task import Examined, empty_folder, examine


SPEED_SAMPLE_BYTES = 32_000_000


@dataclass(frozen=True)
class CollectPlan:
    """The expected size of a collection. Figures without "listed" and "sampled" are estimates from the sample.

    Attributes:
        listed: models that the Hub lists.
        sampled: models whose metadata and headers were read, drawn evenly from those that would be looked at.
        outcomes: what became of these; "accepted" means that their weights would be downloaded.
        examined: models to look at until there are enough, or all.
        downloaded: models whose weights are read.
        download_bytes: of weights.
        bytes_per_second: of one connection, measured on a part of one model; None where there is no model to measure.
        hours: with the workers asked for, at that speed each, and the time that the metadata takes.
    """

    listed: int
    sampled: int
    outcomes: Mapping[str, int]
    examined: int
    downloaded: int
    download_bytes: int
    bytes_per_second: float | None
    hours: float | None

    def lines(self) -> list[str]:
        """The plan in words."""
        table = ", ".join(f"{number} {outcome}" for outcome, number in self.outcomes.items())
        speed = "unknown" if self.bytes_per_second is None else f"{self.bytes_per_second / 1e6:,.1f} MB/s a connection"
        hours = "unknown" if self.hours is None else f"{self.hours:,.2f}"
        about = "" if self.sampled == self.listed else "about "
        return [
            f"models listed: {self.listed:,}",
            f"examined now, without weights: {self.sampled:,} ({table})",
            f"to examine: {about}{self.examined:,}",
            f"to download: {about}{self.downloaded:,} models, {self.download_bytes / 1e9:,.3f} GB",
            f"speed: {speed}",
            f"hours: {hours}",
        ]


def plan_collection(
    config: CollectConfig, models: Iterable[str | PathLike] = (), sample_size: int = 100
) -> CollectPlan:
    """Lists the models, reads the metadata and headers of a sample of them, and reckons up all of it.

    Args:
        config, models: as for `collect.collect`.
        sample_size: models to examine; with as many or fewer listed, all are and the figures are exact.

    Raises:
        TokenizeError, RunError, RefusedModel: as `collect.collect`.
    """
    with tempfile.TemporaryDirectory(prefix="hf-wsl-plan-") as scratch, one_thread():
        folder = Path(scratch)
        hub = HubReader(Pace(folder / "pace"), retries=config.retries, pause=config.retry_pause)
        named = [str(model) for model in models]
        listing = named_candidates(expand_sources(named), hub) if named else list_candidates(config, hub)
        drawn = sorted(
            random.Random(config.seed).sample(
                range(len(listing.candidates)), min(sample_size, len(listing.candidates))
            )
        )
        outcomes: dict[str, int] = {}
        passed: list[tuple[Candidate, Examined]] = []
        began = time.perf_counter()
        for index in tqdm(drawn, desc="Examining", unit="model"):
            candidate = listing.candidates[index]
            try:
                with empty_folder(folder / "model") as place, refusing(candidate.source):
                    passed.append((candidate, examine(candidate, hub, config, place)))
                outcome = ACCEPTED
            except CheckpointError as error:
                outcome = outcome_of(error)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
        seconds_each = (time.perf_counter() - began) / max(1, len(drawn))
        speed = _measure_speed(hub, passed)
    rate = len(passed) / max(1, len(drawn))
    downloaded = min(config.num_models, round(rate * len(listing.candidates)))
    examined = min(len(listing.candidates), round(downloaded / rate)) if rate else len(listing.candidates)
    mean_bytes = sum(e.download_bytes for _, e in passed) / max(1, len(passed))
    hours = None
    if speed is not None:
        seconds = examined * seconds_each + downloaded * mean_bytes / speed
        hours = seconds / config.num_workers / 3600
    return CollectPlan(
        listed=len(listing.candidates),
        sampled=len(drawn),
        outcomes=outcomes,
        examined=examined,
        downloaded=downloaded,
        download_bytes=round(downloaded * mean_bytes),
        bytes_per_second=speed,
        hours=hours,
    )


def _measure_speed(hub: HubReader, passed: list[tuple[Candidate, Examined]]) -> float | None:
    """Bytes a second of reading the beginning of the largest weight file of the sample."""
    files = [(file.size, candidate, file) for candidate, examined in passed for file in examined.weights]
    if not files:
        return None
    size, candidate, file = max(files, key=lambda entry: entry[0])
    began = time.perf_counter()
    hub.read(candidate.repo_id, candidate.commit, file, 0, min(size, SPEED_SAMPLE_BYTES) - 1)  # a part: not checked
    return min(size, SPEED_SAMPLE_BYTES) / (time.perf_counter() - began)
