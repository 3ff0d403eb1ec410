"""The Hub's side of publishing: what a repository has, the plan that follows, and carrying it out.

All changes are one commit, so no reader ever sees half of a version, and the card appears with the files that it
describes. Before it, the client sends the large files and asks the Hub for each whether it has the bytes already: what
arrived before a kill is not sent again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from datasets_scripts.schema import CARD_FILE
from modeling_wsl.checkpoints.downloads import fetch

from .errors import PublishError, hub_errors
from .publication import CHANGED, NEW, OUTDATED, UNCHANGED, FileChange, Publication, readable_size


@dataclass(frozen=True)
class HubRepository:
    """A repository as it is, or as it is to be made.

    Attributes:
        repo_id, repo_type: which.
        private: as it is, or will be made.
        revision: branch to commit to; None is the main one.
        exists, branch_exists: of repository and branch. A branch that does not exist begins as a copy of main.
        head: commit that the branch is at, or will begin at; None for a new repository.
        files: of that commit, by path.
        card: its README.md; None where it has none.
    """

    repo_id: str
    repo_type: str
    private: bool
    revision: str | None
    exists: bool
    branch_exists: bool
    head: str | None = None
    files: Mapping[str, RepoFile] = field(default_factory=dict)
    card: str | None = None

    @property
    def url(self) -> str:
        return f"{HfApi().endpoint}/{'datasets/' * (self.repo_type == 'dataset')}{self.repo_id}"


@dataclass(frozen=True)
class PublishPlan:
    """All that publishing will do.

    Attributes:
        publication: what is published.
        there: where, and what is there.
        create_pr: propose it as a pull request.
        changes: the state of each file.
    """

    publication: Publication
    there: HubRepository
    create_pr: bool
    changes: tuple[FileChange, ...]

    @property
    def to_send(self) -> list[FileChange]:
        return self.of_state(NEW, CHANGED)

    @property
    def does_nothing(self) -> bool:
        """Whether the Hub has exactly this already."""
        return self.there.exists and self.there.branch_exists and not self.of_state(NEW, CHANGED, OUTDATED)

    def of_state(self, *states: str) -> list[FileChange]:
        return [change for change in self.changes if change.state in states]

    def lines(self) -> list[str]:
        """The plan for people to read."""
        publication, there = self.publication, self.there
        branch = f", branch {there.revision}{'' if there.branch_exists else ' (new)'}" if there.revision else ""
        proposed = ", as a pull request" if self.create_pr else ""
        visibility, known = "private" if there.private else "public", "exists" if there.exists else "will be made"
        width = max((len(change.path) for change in self.changes), default=0)
        lines = [
            f"{publication.kind} {publication.folder}",
            f"to {there.url} ({publication.repo_type}, {visibility}, {known}{branch}{proposed})",
            f"license: {publication.license}",
            *(f"  {c.state:<9} {c.path:<{width}}  {readable_size(c.size):>9}" for c in self.changes),
            f"{len(self.to_send)} files to send, {readable_size(sum(change.size for change in self.to_send))}; "
            f"{len(self.of_state(UNCHANGED))} unchanged; {len(self.of_state(OUTDATED))} outdated ones to delete",
        ]
        lines += [f"withheld: {name}: {reason}" for name, reason in publication.withheld.items()]
        if publication.left:
            lines.append(f"stays here: {', '.join(publication.left)}")
        return [*lines, *(f"note: {note}" for note in publication.notes)]


@dataclass(frozen=True)
class PublishResult:
    """The result of a plan that was carried out.

    Attributes:
        commit_url: of the commit, or of the one that was there where nothing had changed.
        pull_request_url: None unless one was asked for.
        sent: paths in the repository that were new or changed.
    """

    plan: PublishPlan
    commit_url: str
    pull_request_url: str | None
    sent: tuple[str, ...]


def look_up(
    repo_id: str, repo_type: str, *, private: bool, revision: str | None, create_pr: bool, token: str | None
) -> HubRepository:
    """Asks the Hub, and refuses what could only fail later.

    Args:
        private: make the repository private, if it is to be made.

    Raises:
        PublishError: nobody is logged in, the namespace is somebody else's, the repository is public and was asked to
            be private, or a pull request to a repository that does not exist.
        UploadError: the Hub does not answer or refuses.
    """
    api = HfApi(token=token)
    with hub_errors(repo_id):
        check_account(api, repo_id, create_pr)
        try:
            info = api.repo_info(repo_id, repo_type=repo_type)
        except RepositoryNotFoundError:
            if create_pr:
                raise PublishError(f"{repo_id} does not exist, so no pull request can be made to it.") from None
            return HubRepository(repo_id, repo_type, private, revision, False, revision is None)
        if private and not info.private:
            raise PublishError(
                f"{repo_id} exists and is public, so nothing in it can be private. Change its visibility on the Hub "
                "first, or publish without private."
            )
        head, branch_exists = info.sha, True
        if revision is not None:
            try:
                head = api.repo_info(repo_id, repo_type=repo_type, revision=revision).sha
            except RevisionNotFoundError:
                branch_exists = False
        tree = api.list_repo_tree(repo_id, recursive=True, revision=head, repo_type=repo_type)
        files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        card = None
        if CARD_FILE in files:
            path = fetch(repo_id, CARD_FILE, repo_type=repo_type, revision=head, token=api.token)
            card = path.read_bytes().decode("utf-8", errors="replace")
    return HubRepository(repo_id, repo_type, info.private, revision, True, branch_exists, head, files, card)


def check_account(api: HfApi, repo_id: str, create_pr: bool) -> None:
    """Refuses early what the Hub would refuse after hours of hashing.

    Raises:
        PublishError: nobody is logged in, or the namespace is somebody else's.
    """
    if not api.token and not get_token():
        raise PublishError("Nobody is logged in to the Hub. Run `hf auth login`, or set HF_TOKEN.")
    account = api.whoami()
    namespaces = [account["name"], *(organization["name"] for organization in account.get("orgs", ()))]
    if repo_id.split("/")[0] not in namespaces and not create_pr:
        raise PublishError(
            f"{repo_id}: you are logged in as {account['name']}, who may write to {', '.join(namespaces)}. Name a "
            "repository there, or offer a pull request to an existing one."
        )


def carry_out(plan: PublishPlan, *, message: str | None = None, token: str | None = None) -> PublishResult:
    """Makes the repository and the branch where they do not exist, and sends what the plan names in one commit.

    Args:
        message: of the commit.

    Raises:
        UploadError: the Hub refuses, fails, or has changed since the plan was made.
    """
    publication, there, api = plan.publication, plan.there, HfApi(token=token)
    target = {"repo_id": there.repo_id, "repo_type": there.repo_type}
    publication.write_card()
    if plan.does_nothing:
        publication.remove_staging()
        return PublishResult(plan, f"{there.url}/commit/{there.head}", None, ())
    with hub_errors(there.repo_id):
        if not there.exists:
            api.create_repo(**target, private=there.private, exist_ok=True)
        if there.revision is not None and not there.branch_exists:
            api.create_branch(**target, branch=there.revision, exist_ok=True)
        info = api.create_commit(
            **target,
            operations=[
                *(CommitOperationAdd(c.path, str(publication.files[c.path])) for c in plan.to_send),
                *(CommitOperationDelete(c.path, is_folder=False) for c in plan.of_state(OUTDATED)),
            ],
            commit_message=message or f"Publish {publication.kind} with hf-wsl",
            revision=there.revision,
            create_pr=plan.create_pr,
            parent_commit=there.head,
        )
    publication.remove_staging()
    return PublishResult(plan, info.commit_url, info.pr_url, tuple(change.path for change in plan.to_send))
