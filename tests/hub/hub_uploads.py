"""Uploads to the tests' Hub: what a client asks before, the LFS protocol (basic and in parts), and the commit."""

import base64
import hashlib
import json
import math
import secrets
from pathlib import Path

import yaml
from hub_exchange import Exchange, Refusal
from hub_facts import FRONT_MATTER
from hub_read_routes import REPO
from hub_state import LFS_NAMES, LFS_SIZE, HubFile, Repository
from hub_write_routes import address


GIT = r"/(?:(?P<repo_type>datasets|spaces)/)?(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/"
OBJECT = r"/lfs-store/(?P<oid>[0-9a-f]{64})"


def check_card(exchange: Exchange) -> None:
    """The front matter must be an object of YAML, as production wants it before it takes a README."""
    match = FRONT_MATTER.match(exchange.read_json()["content"].encode())
    errors, warnings = [], []
    try:
        card = yaml.safe_load(match[1]) if match else None
        if card is None:
            warnings.append({"message": "empty or missing yaml metadata in repo card"})
        elif not isinstance(card, dict):
            errors.append({"message": "the metadata of a card is an object"})
    except yaml.YAMLError as error:
        errors.append({"message": f"invalid YAML: {error}"})
    exchange.send_json({"errors": errors, "warnings": warnings}, 400 if errors else 200)


def prepare_upload(exchange: Exchange, repo_type: str, repo_id: str, revision: str) -> None:
    """Says of each file whether it goes to LFS, and which contents the Hub has for it now."""
    repository, body = exchange.find(repo_type, repo_id, writes=True), exchange.read_json()
    commit, rows = exchange.commit_of(repository, revision), []
    for file in body["files"]:
        name = file["path"]
        # production looks at the sample: what holds a zero byte is binary
        binary = b"\0" in base64.b64decode(file["sample"])
        is_lfs = bool(LFS_NAMES.fullmatch(name.lower())) or file["size"] > LFS_SIZE or binary
        row = {"path": name, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
        if present := commit.files.get(name):
            row["oid"] = present.sha256 if present.is_lfs(name) else present.blob_id(name)
        rows.append(row)
    exchange.send_json({"files": rows, "commitOid": commit.id})


def stored_file(exchange: Exchange, repository: Repository | None, oid: str) -> HubFile | None:
    """The LFS file of a checksum that was uploaded, or that a commit of the repository holds."""
    if oid in exchange.hub.stored:
        return exchange.hub.stored[oid]
    for commit in repository.commits.values() if repository else ():
        for name, file in commit.files.items():
            if file.is_lfs(name) and file.sha256 == oid:
                return file
    return None


def offer_uploads(exchange: Exchange, repo_type: str, repo_id: str) -> None:
    repository, rows = exchange.find(repo_type, repo_id, writes=True), []
    for wanted in exchange.read_json()["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        row = {"oid": oid, "size": size}
        if stored_file(exchange, repository, oid) is None:
            url, part_size = f"{exchange.hub.url}/lfs-store/{oid}", exchange.hub.multipart
            upload = {"href": url}
            if part_size and size > part_size:
                upload["header"] = {"chunk_size": str(part_size)}
                for number in range(1, math.ceil(size / part_size) + 1):
                    upload["header"][str(number)] = f"{url}/part/{number}"
            verify = f"{address(exchange, repo_id, repo_type)}.git/info/lfs/verify"
            row["actions"] = {"upload": upload, "verify": {"href": verify}}
        rows.append(row)
    headers = {"Content-Type": "application/vnd.git-lfs+json"}
    exchange.send_json({"transfer": "basic", "objects": rows}, headers=headers)


def take_body(exchange: Exchange, path: Path) -> str:
    """Writes the body of the request to disk; returns its sha256."""
    digest, unfinished = hashlib.sha256(), path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    with unfinished.open("wb") as stream:
        for piece in exchange.read_body():
            stream.write(piece)
            digest.update(piece)
    unfinished.replace(path)
    return digest.hexdigest()


def take_object(exchange: Exchange, oid: str) -> None:
    path = Path(exchange.hub.uploads.name) / oid
    if take_body(exchange, path) != oid:
        raise Refusal(400, "", f"The bytes that were sent do not have the sha256 {oid}")
    exchange.hub.stored[oid] = HubFile(path, sha256=oid)
    exchange.send(200)


def part_of(exchange: Exchange, oid: str, number: int) -> Path:
    return Path(exchange.hub.uploads.name) / f"{oid}.part{number}"


def take_part(exchange: Exchange, oid: str, number: str) -> None:
    checksum = take_body(exchange, part_of(exchange, oid, int(number)))
    exchange.send(200, headers={"ETag": f'"{checksum}"'})


def join_parts(exchange: Exchange, oid: str) -> None:
    path, digest = Path(exchange.hub.uploads.name) / oid, hashlib.sha256()
    with path.open("wb") as whole:
        for part in exchange.read_json()["parts"]:
            for piece in HubFile(part_of(exchange, oid, part["partNumber"])).pieces():
                whole.write(piece)
                digest.update(piece)
    if digest.hexdigest() != oid:
        raise Refusal(400, "", f"The parts together do not have the sha256 {oid}")
    exchange.hub.stored[oid] = HubFile(path, sha256=oid)
    exchange.send_json({})


def verify_object(exchange: Exchange, repo_type: str, repo_id: str) -> None:
    repository, body = exchange.find(repo_type, repo_id, writes=True), exchange.read_json()
    file = stored_file(exchange, repository, body["oid"])
    if file is None or file.size != body["size"]:
        raise Refusal(422, "", f"LFS object {body['oid']} of {body['size']} bytes is not here")
    exchange.send_json({})


def changed_files(
    exchange: Exchange, repository: Repository, files: dict[str, HubFile], lines: list[dict]
) -> dict[str, HubFile]:
    """The files after the operations of a commit."""
    files = dict(files)
    for line in lines:
        value = line["value"]
        path = value["path"]
        if line["key"] == "file":
            files[path] = HubFile(base64.b64decode(value["content"]), lfs=False)
        elif line["key"] == "lfsFile":
            stored = stored_file(exchange, repository, value["oid"])
            if stored is None:
                raise Refusal(400, "", f"LFS object {value['oid']} of {path} was not uploaded")
            files[path] = HubFile(stored.path or stored.data, sha256=value["oid"], lfs=True)
        elif line["key"] == "deletedFile":
            if files.pop(path, None) is None:
                raise Refusal(404, "EntryNotFound", f"{path} cannot be deleted: it is not there")
        elif line["key"] == "deletedFolder":
            prefix = path.rstrip("/") + "/"
            files = {name: file for name, file in files.items() if not name.startswith(prefix)}
        else:
            raise Refusal(400, "", f"{line['key']} is no operation of a commit")
    return files


def take_commit(exchange: Exchange, repo_type: str, repo_id: str, revision: str) -> None:
    repository = exchange.find(repo_type, repo_id, writes=True)
    lines = [json.loads(line) for line in b"".join(exchange.read_body()).splitlines() if line.strip()]
    header, account = lines[0]["value"], exchange.account
    with exchange.hub.state_lock:
        parent = exchange.commit_of(repository, revision)
        if header.get("parentCommit") not in (None, parent.id):
            raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
        files = changed_files(exchange, repository, parent.files, lines[1:])
        answer = {"success": True}
        if exchange.flag("create_pr"):
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.revisions)
            repository.revisions[f"refs/pr/{number}"] = parent.id
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{address(exchange, repo_id, repo_type)}/discussions/{number}"
        elif revision not in repository.revisions:
            raise Refusal(400, "", f"{revision} is no branch: a commit needs one to go to")
        commit = exchange.hub.commit_to(repository, files, header["summary"], account.name, revision)
    answer |= {"commitOid": commit.id, "commitUrl": f"{address(exchange, repo_id, repo_type)}/commit/{commit.id}"}
    exchange.send_json(answer)


UPLOAD_ROUTES = [
    ("POST", "/api/validate-yaml", check_card),
    ("POST", REPO + "/preupload/(?P<revision>[^/]+)", prepare_upload),
    ("POST", GIT + "objects/batch", offer_uploads),
    ("POST", GIT + "verify", verify_object),
    ("PUT", OBJECT, take_object),
    ("PUT", OBJECT + r"/part/(?P<number>\d+)", take_part),
    ("POST", OBJECT, join_parts),
    ("POST", REPO + "/commit/(?P<revision>[^/]+)", take_commit),
]
