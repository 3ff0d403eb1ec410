"""What the tests' Hub answers to readers: listings, facts, trees, references, commits and files."""

from urllib.parse import parse_qs, quote, unquote

from hub_exchange import Exchange, Refusal
from hub_facts import INFO_FIELDS, facts_of, siblings_with_blobs, with_fields
from hub_listing import cut_page, in_order, is_wanted, next_link, shown_fields
from hub_state import Commit, Repository
from hub_xet import xet_headers


TYPES = r"/api/(?P<repo_type>models|datasets|spaces)"
REPO = TYPES + r"/(?P<repo_id>[^/]+/[^/]+|[^/]+)"
RESOLVE = (
    r"/(?:(?P<repo_type>datasets|spaces)/)?(?P<repo_id>[^/]+/[^/]+|[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
)


def list_repositories(exchange: Exchange, repo_type: str) -> None:
    account, rows = exchange.account, []
    for repository in exchange.hub.repositories_of(repo_type):
        if repository.private and not (account and account.owns(repository.repo_id)):
            continue
        facts = facts_of_head(exchange, repository)
        if is_wanted(facts, exchange.query):
            rows.append((repository.number, facts))
    sort = exchange.query.get("sort", [None])[-1]
    if sort not in (None, "downloads", "likes", "lastModified", "createdAt", "trendingScore"):
        raise Refusal(400, "", f"Invalid sort: {sort}")
    rows = in_order(rows, sort)
    size = min(exchange.hub.page_size, int(exchange.query.get("limit", ["1000"])[-1]))
    page, cursor = cut_page(rows, lambda row: row[0], exchange.query.get("cursor", [None])[-1], size)
    link = next_link(exchange.hub.url, exchange.raw_path, exchange.query, cursor)
    exchange.send_json([shown_fields(facts, exchange.query, exchange.flag) for _, facts in page], headers=link)


def facts_of_head(exchange: Exchange, repository: Repository) -> dict:
    return exchange.hub.cached_facts(repository, repository.head, facts_of)


def show_repository(exchange: Exchange, repo_type: str, repo_id: str, revision: str | None = None) -> None:
    repository = exchange.find(repo_type, repo_id)
    commit = exchange.commit_of(repository, revision)
    facts = dict(exchange.hub.cached_facts(repository, commit, facts_of))
    if exchange.flag("blobs"):
        facts["siblings"] = siblings_with_blobs(commit)
    fields = exchange.query.get("expand") or [*INFO_FIELDS, *repository.info]
    if exchange.flag("securityStatus"):
        facts.setdefault("securityRepoStatus", {"scansDone": True, "filesWithIssues": []})
        fields = [*fields, "securityRepoStatus"]
    exchange.send_json(with_fields(facts, fields), headers={"X-Repo-Commit": commit.id})


def tree_row(commit: Commit, name: str, expand: bool) -> dict:
    file = commit.files.get(name)
    if file is None:
        row = {"type": "directory", "path": name, "size": 0, "oid": commit.trees[name]}
    else:
        row = {"type": "file", "path": name, "size": file.size, "oid": file.blob_id(name)}
        if file.is_lfs(name):
            row["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
    if expand:
        last = commit.last_change(name)
        row["lastCommit"] = {"id": last.id, "title": last.title, "date": last.date}
    return row


def show_tree(exchange: Exchange, repo_type: str, repo_id: str, revision: str, path: str | None = None) -> None:
    repository = exchange.find(repo_type, repo_id)
    commit, folder = exchange.commit_of(repository, revision), (path or "").strip("/")
    if folder not in commit.trees:
        raise Refusal(404, "EntryNotFound", f"{folder} does not exist on {revision}", {"X-Repo-Commit": commit.id})
    prefix = f"{folder}/" if folder else ""
    names = [name for name in (*commit.trees, *commit.files) if name.startswith(prefix) and name != folder]
    if not exchange.flag("recursive"):
        names = [name for name in names if "/" not in name[len(prefix) :]]
    size = exchange.hub.page_size
    page, cursor = cut_page(sorted(names), str, exchange.query.get("cursor", [None])[-1], size)
    link = next_link(exchange.hub.url, exchange.raw_path, exchange.query, cursor)
    exchange.send_json([tree_row(commit, name, exchange.flag("expand")) for name in page], headers=link)


def show_paths(exchange: Exchange, repo_type: str, repo_id: str, revision: str) -> None:
    form = parse_qs(b"".join(exchange.read_body()).decode())
    commit = exchange.commit_of(exchange.find(repo_type, repo_id), revision)
    names = [name.strip("/") for name in form.get("paths", [])]
    expand = form.get("expand", ["false"])[-1].lower() == "true"
    known = [name for name in names if name in commit.files or name and name in commit.trees]
    exchange.send_json([tree_row(commit, name, expand) for name in known])


def show_references(exchange: Exchange, repo_type: str, repo_id: str) -> None:
    repository = exchange.find(repo_type, repo_id)
    rows = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    for name, commit in sorted(repository.revisions.items()):
        if name.startswith("refs/pr/"):
            rows["pullRequests"].append({"name": name[5:], "ref": name, "targetCommit": commit})
        else:
            kind, ref = ("tags", "refs/tags/") if name in repository.tags else ("branches", "refs/heads/")
            rows[kind].append({"name": name, "ref": ref + name, "targetCommit": commit})
    if not (exchange.flag("include_prs")):
        del rows["pullRequests"]
    exchange.send_json(rows)


def show_commits(exchange: Exchange, repo_type: str, repo_id: str, revision: str) -> None:
    commit, rows = exchange.commit_of(exchange.find(repo_type, repo_id), revision), []
    while commit is not None:
        row = {"id": commit.id, "title": commit.title, "message": "", "date": commit.date}
        rows.append(row | {"authors": [{"user": commit.author}]})
        commit = commit.parent
    cursor = exchange.query.get("cursor", [None])[-1]
    page, cursor = cut_page(rows, lambda row: row["id"], cursor, exchange.hub.page_size)
    exchange.send_json(page, headers=next_link(exchange.hub.url, exchange.raw_path, exchange.query, cursor))


def check_access(exchange: Exchange, repo_type: str, repo_id: str, write: str | None = None) -> None:
    repository = exchange.find(repo_type, repo_id, writes=bool(write))
    exchange.check_gate(repository)
    exchange.send_json({})


def show_account(exchange: Exchange) -> None:
    account = exchange.account
    if account is None:
        raise Refusal(401, "", "Invalid username or password.")
    exchange.send_json(
        {
            "type": "user",
            "id": account.name,
            "name": account.name,
            "fullname": account.name.title(),
            "orgs": [{"type": "org", "name": name, "fullname": name.title()} for name in account.orgs],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": account.role}},
        }
    )


def send_repository_file(exchange: Exchange, repo_type: str, repo_id: str, revision: str, path: str) -> None:
    repository = exchange.find(repo_type, repo_id)
    exchange.check_gate(repository)
    commit = exchange.commit_of(repository, revision)
    file, headers = commit.files.get(path), {"X-Repo-Commit": commit.id}
    if file is None:
        raise Refusal(404, "EntryNotFound", f"{path} does not exist on {revision}", headers)
    if not file.is_lfs(path):
        exchange.send_file(file, headers | {"ETag": f'"{file.blob_id(path)}"'})
        return
    headers |= {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
    if exchange.hub.xet:
        headers |= xet_headers(exchange, repo_type, repo_id, commit.id, file)
    if exchange.hub.cdn_url is None:
        exchange.send_file(file, headers | {"ETag": f'"{file.sha256}"'})
        return
    kind = "" if repo_type == "model" else f"{repo_type}s/"
    place = f"{exchange.hub.cdn_url}/{kind}{quote(repo_id)}/resolve/{commit.id}/{quote(path)}"
    exchange.send(302, b"", headers | {"Location": place})


def send_from_cdn(exchange: Exchange, repo_type: str, repo_id: str, revision: str, path: str) -> None:
    """What the second origin answers: anyone who knows the address may read, and credentials have no place there."""
    repository = exchange.hub.find(repo_id, repo_type)
    commit = repository.at(revision) if repository else None
    file = commit.files.get(path) if commit else None
    if file is None:
        raise Refusal(403, "", "AccessDenied")
    exchange.send_file(file, {"ETag": f'"{file.sha256}"'})


READ_ROUTES = [
    ("GET", TYPES, list_repositories),
    ("GET", REPO + r"(?:/revision/(?P<revision>[^/]+))?", show_repository),
    ("GET", REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", show_tree),
    ("POST", REPO + r"/paths-info/(?P<revision>[^/]+)", show_paths),
    ("GET", REPO + r"/refs", show_references),
    ("GET", REPO + r"/commits/(?P<revision>[^/]+)", show_commits),
    ("GET", REPO + r"/auth-check(?P<write>/write)?", check_access),
    ("GET", "/api/whoami-v2", show_account),
    ("GET", RESOLVE, send_repository_file),
]
CDN_ROUTES = [("GET", RESOLVE, send_from_cdn)]


def unquoted(groups: dict[str, str | None]) -> dict[str, str | None]:
    """The parts of a path, unquoted one by one; the type of the repository in the singular, a model where none is."""
    parts = {name: value and unquote(value) for name, value in groups.items()}
    if "repo_type" in parts:
        parts["repo_type"] = (parts["repo_type"] or "models").removesuffix("s")
    return parts
