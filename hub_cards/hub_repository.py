"""What the Hub has before anything is sent: the repository, the branch, its files and its card."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from .card_text import CARD_FILE
from .errors import PublishError
from .hub_errors import hub_errors


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
            path = api.hf_hub_download(repo_id, CARD_FILE, repo_type=repo_type, revision=head)
            card = Path(path).read_bytes().decode("utf-8", errors="replace")
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
