"""Reading models on the Hub: paced over all workers, retried, and checked against the hashes that the Hub gives.

The Hub's client caches whole files, gives up on a reset connection and takes wrong bytes of the right size for the
file. A collection needs headers alone, no cache, all transient faults survived and all bytes checked.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, ModelInfo, constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, parse_ratelimit_headers
from tqdm.auto import tqdm
from transformers.utils.logging import is_progress_bar_enabled

from hf_wsl.errors import RunError, one_line
from modeling_wsl.checkpoints.downloads import HubFile
from modeling_wsl.checkpoints.errors import shorten

from ..outcomes import RefusedModel, final_outcome


logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")

# The client's errors of the transport have no common class that both of its generations share by name: the first base
# of its own error is that class (httpx.HTTPError or httpx2.HTTPError).
TRANSPORT_ERROR = HfHubHTTPError.__mro__[1]
TEMPORARY_STATUS = {408, 425, 429, 500, 502, 503, 504}
LONGEST_PAUSE = 60.0  # seconds, between the retries of one request
MISMATCH_TRIALS = 3


class MismatchError(RuntimeError):
    """A file came with another size or hash than the Hub says it has."""


class Pace:
    """Keeps the workers of a run, wherever they are, from asking before the Hub wants to be asked again.

    The moment is the modification time of a file that all workers see.
    """

    def __init__(self, path: Path):
        self._path = path

    def wait(self) -> None:
        """Returns when the Hub may be asked."""
        while (pause := self._until() - time.time()) > 0:
            time.sleep(min(pause, LONGEST_PAUSE))

    def hold(self, seconds: float) -> None:
        """Nobody asks for so long from now on; a longer hold that is on stays."""
        until = max(time.time() + seconds, self._until())
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch()
        os.utime(self._path, (until, until))

    def _until(self) -> float:
        try:
            return self._path.stat().st_mtime
        except FileNotFoundError:
            return 0.0


class HubReader:
    """Asks one Hub (`HF_ENDPOINT`) with the token of the environment or of `hf auth login`.

    Args:
        pace: shared by all workers of the run.
        retries: of a request that failed for a reason that may pass; progress within a file starts the count anew.
        pause: seconds before the first retry, doubled for each further one.
        token: instead of the environment's.

    Attributes:
        bytes_read: of bodies, since this object was made.
    """

    def __init__(self, pace: Pace, *, retries: int = 6, pause: float = 1.0, token: str | bool | None = None):
        self.pace = pace
        self.retries = retries
        self.pause = pause
        self.token = token
        self.bytes_read = 0
        self._api = HfApi(token=token)

    def info(self, repo_id: str, revision: str | None) -> ModelInfo:
        """The Hub's description of a model at a revision, the sizes and hashes of its files included.

        Raises:
            RefusedModel: gated, disabled, vanished, or "network".
        """
        return self._ask(repo_id, lambda: self._api.model_info(repo_id, revision=revision, files_metadata=True))

    def list_models(self, name: str, **query: Any) -> list[ModelInfo]:
        """All models of a query of `HfApi.list_models`; after a fault it is asked again from the first page.

        Args:
            name: for the progress bar and messages.

        Raises:
            RunError: the Hub does not list them, after all retries.
        """

        def request() -> list[ModelInfo]:
            hidden = not is_progress_bar_enabled()
            return list(tqdm(self._api.list_models(**query), desc=f"Listing {name}", unit="model", disable=hidden))

        try:
            return self._ask(f"the listing of {name}", request)
        except RefusedModel as error:
            raise RunError(f"The Hub at {self._api.endpoint} does not list {name}: {error.reason}.") from error

    def is_answering(self) -> bool:
        """Whether the Hub answers at all, asked once: anything but silence and the errors of a server that is down."""
        try:
            url, headers = f"{self._api.endpoint}/api/models?limit=1", build_hf_headers(token=self.token)
            status = get_session().get(url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT).status_code
        except (TRANSPORT_ERROR, OSError) as error:
            logger.warning("the Hub does not answer: %s", one_line(error))
            return False
        return status < 500

    def read(self, repo_id: str, commit: str, file: HubFile, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes `[start, stop)` of a file; a whole file is checked against its hash, a part cannot be.

        Raises:
            RefusedModel: as `info`, or "damaged": its size or hash is not what the Hub says.
        """
        stop = file.size if stop is None else min(stop, file.size)
        if (start, stop) == (0, file.size):
            parts: list[bytes] = []
            self._checked(repo_id, commit, file, lambda: parts.clear() or parts.append)
            return b"".join(parts)
        return b"".join(self._pieces(repo_id, commit, file, start, stop))

    def download(self, repo_id: str, commit: str, file: HubFile, target: Path) -> None:
        """Writes a whole file, checked against its hash, to `target`, whose folder is nobody else's.

        Raises:
            RefusedModel: as `read`.
            OSError: it cannot be written.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as stream:

            def begin() -> Callable[[bytes], Any]:
                stream.seek(0)
                stream.truncate()
                return stream.write

            self._checked(repo_id, commit, file, begin)

    def _checked(self, repo_id: str, commit: str, file: HubFile, begin: Callable[[], Callable[[bytes], Any]]) -> None:
        """Passes a file on, from the beginning again (`begin` gives the taker) where its hash was wrong."""
        problem: MismatchError | None = None
        for _ in range(MISMATCH_TRIALS):
            take, digest = begin(), file.new_digest()
            try:
                for piece in self._pieces(repo_id, commit, file, 0, file.size):
                    digest.update(piece)
                    take(piece)
                if file.digest and digest.hexdigest() != file.digest:
                    raise MismatchError(f"has the hash {digest.hexdigest()}, not {file.digest}")
            except MismatchError as error:
                problem = error
                logger.warning("%s: %s %s; it is fetched again", repo_id, file.path, error)
                continue
            return
        reason = f"{file.path} {problem}, as the Hub says, in {MISMATCH_TRIALS} trials"
        raise RefusedModel(repo_id, "damaged", reason, "Ask its owner to upload it again")

    def _pieces(self, repo_id: str, commit: str, file: HubFile, start: int, stop: int) -> Iterator[bytes]:
        """The bytes `[start, stop)` in pieces, gone on with after every fault that may pass."""
        failures = 0
        while start < stop:
            self.pace.wait()
            try:
                for piece in self._stream(repo_id, commit, file, start, stop):
                    start += len(piece)
                    failures = 0
                    yield piece
            except MismatchError:
                raise
            except (TRANSPORT_ERROR, OSError, RuntimeError) as error:  # of the network alone: takers run outside
                failures += 1
                self._after(repo_id, error, failures)

    def _stream(self, repo_id: str, commit: str, file: HubFile, start: int, stop: int) -> Iterator[bytes]:
        headers = {
            **build_hf_headers(token=self.token),
            "Range": f"bytes={start}-{stop - 1}",
            "Accept-Encoding": "identity",
        }
        request = get_session().stream(
            "GET",
            hf_hub_url(repo_id, file.path, revision=commit),
            headers=headers,
            follow_redirects=True,  # to a store on another host, which gets no token
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        )
        with request as response:
            if response.status_code >= 400:
                response.read()
                hf_raise_for_status(response)
            self._heed(response.headers)
            skip = self._check_range(response, file, start)
            for piece in response.iter_raw():  # as they come: what a fault cuts off loses nothing
                self.bytes_read += len(piece)
                if skip:  # the server does not know ranges and began at the beginning
                    skip, piece = max(0, skip - len(piece)), piece[skip:]
                piece = piece[: stop - start]
                start += len(piece)
                if piece:
                    yield piece
                if start == stop:
                    return
        raise OSError(f"the answer ended {stop - start:,} bytes early")

    @staticmethod
    def _check_range(response: Any, file: HubFile, start: int) -> int:
        """The number of bytes that come before those that were asked for; refuses a file of another size."""
        headers = response.headers
        if response.status_code == 206:
            span, _, total = headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
            first = span.partition("-")[0]
            if first != str(start):
                raise OSError(f"the answer is bytes {shorten(span)}, not those from {start} on")
            if total not in ("*", str(file.size)):
                raise MismatchError(f"is {shorten(total)} bytes long, not {file.size}")
            return 0
        length = headers.get("Content-Length")
        if length is not None and length != str(file.size):
            raise MismatchError(f"is {shorten(length)} bytes long, not {file.size}")
        return start

    def _ask(self, repo_id: str, request: Callable[[], Answer]) -> Answer:
        failures = 0
        while True:
            self.pace.wait()
            try:
                return request()
            except (TRANSPORT_ERROR, OSError, RuntimeError) as error:
                failures += 1
                self._after(repo_id, error, failures)

    def _after(self, repo_id: str, error: Exception, failures: int) -> None:
        """Returns after a pause if the request may be tried again, and refuses the model otherwise."""
        if outcome := final_outcome(error):
            reason = f"cannot be read any more: the Hub answers {type(error).__name__}"
            advice = "Ask for access, or log in with a token that has it" if outcome == "gated" else "Leave it out"
            raise RefusedModel(repo_id, outcome, reason, advice) from error
        response = getattr(error, "response", None)
        status = None if response is None else response.status_code
        if failures > self.retries or (status is not None and status not in TEMPORARY_STATUS):
            # Without the number of trials: it is no setting of the dataset, and so must not show in it.
            reason = f"could not be fetched: {type(error).__name__}, {shorten(one_line(error))}"
            raise RefusedModel(repo_id, "network", reason, "Collect again later") from error
        pause = min(self.pause * 2 ** (failures - 1), LONGEST_PAUSE)
        logger.info("%s: %s; again in %.1f s", repo_id, one_line(error)[:200], pause)
        if status == 429:  # all workers wait
            self.pace.hold(asked_pause(response.headers) or pause)
        else:
            time.sleep(pause)

    def _heed(self, headers: Any) -> None:
        """Holds all workers where the answer says that nothing is left of this window's requests."""
        limit = parse_ratelimit_headers(headers)
        if limit is not None and limit.remaining <= 0:
            self.pace.hold(limit.reset_in_seconds + 1)


def asked_pause(headers: Any) -> float | None:
    """Seconds that the headers of a 429 answer ask to wait; None if they do not say."""
    limit = parse_ratelimit_headers(headers)
    if limit is not None:
        return limit.reset_in_seconds + 1.0
    seconds = headers.get("Retry-After", "")
    return int(seconds) + 1.0 if seconds.isdecimal() else None
