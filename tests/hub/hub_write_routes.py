"""What the tests' Hub answers to those who create, change and delete repositories, branches and tags."""

from hub_exchange import Exchange, Refusal
from hub_read_routes import REPO
from hub_state import HubFile, Repository


ATTRIBUTES = HubFile("".join(f"*.{name} filter=lfs diff=lfs merge=lfs -text\n" for name in ("bin", "safetensors")))


def address(exchange: Exchange, repo_id: str, repo_type: str) -> str:
    return f"{exchange.hub.url}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"


def named_repository(exchange: Exchange) -> tuple[str, str, dict]:
    """The id, type and whole body of a request that names its repository in the body."""
    body = exchange.read_json()
    account = exchange.account
    if account is None:
        raise Refusal(401, "", "Invalid username or password.")
    owner = body.get("organization") or account.name
    return f"{owner}/{body['name']}", body.get("type") or "model", body


def create_repository(exchange: Exchange) -> None:
    repo_id, repo_type, body = named_repository(exchange)
    account, url = exchange.check_right_to_write(repo_id), address(exchange, repo_id, repo_type)
    with exchange.hub.state_lock:
        if exchange.hub.find(repo_id, repo_type) is not None:
            message = "You already created this repo"
            exchange.send_json({"error": message, "url": url}, 409, {"X-Error-Message": message})
            return
        private = body.get("visibility") == "private" or bool(body.get("private"))
        files = {".gitattributes": ATTRIBUTES}
        exchange.hub.add(repo_id, files, repo_type=repo_type, title="initial commit", private=private)
    exchange.send_json({"url": url, "name": repo_id, "id": f"{account.name}-{repo_id}"})


def delete_repository(exchange: Exchange) -> None:
    repo_id, repo_type, _ = named_repository(exchange)
    exchange.find(repo_type, repo_id, writes=True)
    exchange.hub.remove(repo_id, repo_type)
    exchange.send_json({})


def change_settings(exchange: Exchange, repo_type: str, repo_id: str) -> None:
    repository, body = exchange.find(repo_type, repo_id, writes=True), exchange.read_json()
    if "gated" in body:
        repository.gated = body["gated"]
    if "visibility" in body or "private" in body:
        repository.private = body.get("visibility") == "private" or bool(body.get("private"))
    exchange.send_json({"private": repository.private, "gated": repository.gated})


def add_reference(exchange: Exchange, repository: Repository, name: str, starting_point: str | None) -> None:
    if name in repository.revisions:
        raise Refusal(409, "", f"Reference already exists: {name}")
    repository.revisions[name] = exchange.commit_of(repository, starting_point).id


def create_branch(exchange: Exchange, repo_type: str, repo_id: str, name: str) -> None:
    repository, body = exchange.find(repo_type, repo_id, writes=True), exchange.read_json()
    with exchange.hub.state_lock:
        add_reference(exchange, repository, name, body.get("startingPoint"))
    exchange.send_json({})


def create_tag(exchange: Exchange, repo_type: str, repo_id: str, name: str) -> None:
    repository, body = exchange.find(repo_type, repo_id, writes=True), exchange.read_json()
    with exchange.hub.state_lock:
        add_reference(exchange, repository, body["tag"], name)
        repository.tags.add(body["tag"])
    exchange.send_json({})


def delete_reference(exchange: Exchange, repo_type: str, repo_id: str, kind: str, name: str) -> None:
    repository = exchange.find(repo_type, repo_id, writes=True)
    is_tag = kind == "tag"
    if name not in repository.revisions or (name in repository.tags) != is_tag:
        raise Refusal(404, "RevisionNotFound", f"There is no {kind} {name}")
    if name == "main":
        raise Refusal(403, "", "Cannot delete the main branch")
    del repository.revisions[name]
    repository.tags.discard(name)
    exchange.send_json({})


WRITE_ROUTES = [
    ("POST", "/api/repos/create", create_repository),
    ("DELETE", "/api/repos/delete", delete_repository),
    ("PUT", REPO + "/settings", change_settings),
    ("POST", REPO + "/branch/(?P<name>[^/]+)", create_branch),
    ("POST", REPO + "/tag/(?P<name>[^/]+)", create_tag),
    ("DELETE", REPO + "/(?P<kind>branch|tag)/(?P<name>[^/]+)", delete_reference),
]
