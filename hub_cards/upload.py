"""Carries out a plan: large files in batches, the card last, so that a killed upload goes on where it was.

What has been committed is unchanged the next time; what was sent and not committed yet, the Hub knows by its hash.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from .hub_errors import hub_errors
from .publish_plan import OUTDATED, FileChange, PublishPlan, readable_size


logger = logging.getLogger(__name__)
# The Hub's own advice is under 100 files a commit; bytes bound what a kill can lose.
BATCH_FILES, BATCH_BYTES = 50, 10 * 10**9
Batches = Sequence[list[FileChange]]


@dataclass(frozen=True)
class PublishResult:
    """What became of a plan.

    Attributes:
        commit_url: of the last commit, or of the one that was there where nothing had changed.
        pull_request_url: None unless one was asked for.
        sent: paths in the repository that were new or changed.
    """

    plan: PublishPlan
    commit_url: str
    pull_request_url: str | None
    sent: tuple[str, ...]


def carry_out(plan: PublishPlan, *, message: str | None = None, token: str | None = None) -> PublishResult:
    """Makes the repository and the branch where they do not exist, and sends what the plan names.

    A repository that nobody reads yet (it has no card) gets a commit a batch. One that has a card gets all in a
    single commit after the large files were sent, so that no reader ever sees half of a new version.

    Args:
        message: of the last commit.

    Raises:
        UploadError: the Hub refuses, fails, or has changed since the plan was made.
    """
    publication, there, api = plan.publication, plan.there, HfApi(token=token)
    target = {"repo_id": there.repo_id, "repo_type": there.repo_type}
    message = message or f"Publish {publication.kind} with hf-wsl"
    publication.write_card()
    if plan.does_nothing:
        publication.remove_staging()
        return PublishResult(plan, f"{there.url}/commit/{there.head}", None, ())
    with hub_errors(there.repo_id):
        if not there.exists:
            api.create_repo(**target, private=there.private, exist_ok=True)
        if there.revision is not None and not there.branch_exists:
            api.create_branch(**target, branch=there.revision, exist_ok=True)
        batches = list(cut(plan.to_send))
        if there.card is not None or plan.create_pr:
            info = commit_at_once(plan, api, target, batches, message)
        else:
            info = commit_by_batches(plan, api, target, batches, message)
    publication.remove_staging()
    return PublishResult(plan, info.commit_url, info.pr_url, tuple(change.path for change in plan.to_send))


def commit_by_batches(plan: PublishPlan, api: HfApi, target: dict, batches: Batches, message: str) -> CommitInfo:
    """A commit a batch; the last one has the card, and removes what is outdated."""
    parent, info = plan.there.head, None
    for number, batch in enumerate(batches or [[]], start=1):
        last = number >= len(batches)
        operations = [*additions(plan, batch), *(deletions(plan) if last else ())]
        part = "" if last else f" ({number} of {len(batches)})"
        log_batch(number, batches, batch)
        info = api.create_commit(
            **target,
            operations=operations,
            commit_message=f"{message}{part}",
            revision=plan.there.revision,
            parent_commit=parent,
        )
        parent = info.oid
    return info


def commit_at_once(plan: PublishPlan, api: HfApi, target: dict, batches: Batches, message: str) -> CommitInfo:
    """Sends the large files batch by batch, then makes one commit of everything."""
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for number, batch in enumerate(batches, start=1):
        added = additions(plan, batch)
        log_batch(number, batches, batch)
        if len(batches) > 1:
            api.preupload_lfs_files(
                **target, additions=added, revision=plan.there.revision, create_pr=plan.create_pr, free_memory=False
            )
        operations += added
    return api.create_commit(
        **target,
        operations=[*operations, *deletions(plan)],
        commit_message=message,
        revision=plan.there.revision,
        create_pr=plan.create_pr,
        parent_commit=plan.there.head,
    )


def additions(plan: PublishPlan, batch: Sequence[FileChange]) -> list[CommitOperationAdd]:
    """Hashes the files of a batch."""
    files = plan.publication.files
    return [CommitOperationAdd(path_in_repo=c.path, path_or_fileobj=str(files[c.path])) for c in batch]


def deletions(plan: PublishPlan) -> list[CommitOperationDelete]:
    return [CommitOperationDelete(path_in_repo=c.path, is_folder=False) for c in plan.of_state(OUTDATED)]


def cut(changes: Sequence[FileChange]) -> Iterator[list[FileChange]]:
    """Batches of at most `BATCH_FILES` files and, where they hold more than one, `BATCH_BYTES` bytes."""
    batch: list[FileChange] = []
    held = 0
    for change in changes:
        if batch and (len(batch) == BATCH_FILES or held + change.size > BATCH_BYTES):
            yield batch
            batch, held = [], 0
        batch.append(change)
        held += change.size
    if batch:
        yield batch


def log_batch(number: int, batches: Batches, batch: Sequence[FileChange]) -> None:
    size = readable_size(sum(change.size for change in batch))
    logger.info("sending batch %d of %d: %d files, %s", number, max(1, len(batches)), len(batch), size)
