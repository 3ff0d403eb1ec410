"""Downloads through Xet, the Hub's storage of chunks: enough of its protocol for a file of at most one chunk.

The client asks for a token, then how to put a file together, then for the bytes; hash and token are not checked.
"""

from hub_exchange import Exchange, Refusal
from hub_state import HubFile


MAX_CHUNK = 128 * 1024  # bytes; real files are cut at places that their contents choose
FAR_FUTURE = 4_102_444_800  # seconds


def xet_headers(exchange: Exchange, repo_type: str, repo_id: str, commit: str, file: HubFile) -> dict[str, str]:
    """What tells the client to fetch a file through Xet; `HubServer.xet` makes the Hub say so."""
    assert file.size <= MAX_CHUNK
    exchange.hub.xet_files[file.sha256] = file
    route = f"{exchange.hub.url}/api/{repo_type}s/{repo_id}/xet-read-token/{commit}"
    return {"X-Xet-Hash": file.sha256, "Link": f'<{route}>; rel="xet-auth"'}


def give_token(exchange: Exchange, repo_type: str, repo_id: str, revision: str) -> None:
    answer = {"casUrl": exchange.hub.url, "accessToken": "xet", "exp": FAR_FUTURE}
    names = {"casUrl": "X-Xet-Cas-Url", "accessToken": "X-Xet-Access-Token", "exp": "X-Xet-Token-Expiration"}
    exchange.send_json(answer, headers={names[key]: str(value) for key, value in answer.items()})


def reconstruct(exchange: Exchange, xet_hash: str) -> None:
    file = exchange.hub.xet_files.get(xet_hash)
    if file is None:
        raise Refusal(404, "", f"no file {xet_hash}")
    chunks, stored = {"start": 0, "end": 1}, {"start": 0, "end": 8 + file.size - 1}
    place = {"range": chunks, "url": f"{exchange.hub.url}/xorbs/{xet_hash}", "url_range": stored}
    terms = [{"hash": xet_hash, "unpacked_length": file.size, "range": chunks}]
    exchange.send_json({"offset_into_first_range": 0, "terms": terms, "fetch_info": {xet_hash: [place]}})


def send_chunk(exchange: Exchange, xet_hash: str) -> None:
    """The bytes of a file behind the header of a chunk that is not packed: version, size, scheme, unpacked size."""
    data = exchange.hub.xet_files[xet_hash].read()
    size = len(data).to_bytes(3, "little")
    exchange.send_file(HubFile(b"\0" + size + b"\0" + size + data), {})


XET_ROUTES = [
    (
        "GET",
        r"/api/(?P<repo_type>models|datasets|spaces)/(?P<repo_id>[^/]+/[^/]+)/xet-read-token/(?P<revision>[^/]+)",
        give_token,
    ),
    ("GET", r"/v1/reconstructions/(?P<xet_hash>[0-9a-f]{64})", reconstruct),
    ("GET", r"/xorbs/(?P<xet_hash>[0-9a-f]{64})", send_chunk),
]
