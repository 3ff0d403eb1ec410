"""How another process steers the tests' Hub: JSON at /__test__/..., which is neither logged nor met by faults."""

import base64
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hub_exchange import Exchange
from hub_state import HubFile


def file_of(value: str | dict[str, Any]) -> HubFile:
    """A text, or one of {"text": ...}, {"base64": ...}, {"path": ...}, with `sha256` and `lfs` if wanted."""
    if isinstance(value, str):
        return HubFile(value)
    options = {name: value[name] for name in ("sha256", "lfs") if name in value}
    if "path" in value:
        return HubFile(Path(value["path"]), **options)
    return HubFile(base64.b64decode(value["base64"]) if "base64" in value else value["text"], **options)


def add(exchange: Exchange) -> None:
    options = exchange.read_json()
    files = {name: file_of(value) for name, value in options.pop("files").items()}
    exchange.send_json({"commit": exchange.hub.add(files=files, **options)})


def remove(exchange: Exchange) -> None:
    exchange.hub.remove(**exchange.read_json())
    exchange.send_json({})


def move(exchange: Exchange) -> None:
    exchange.send_json({"commit": exchange.hub.move(**exchange.read_json())})


def reset(exchange: Exchange) -> None:
    exchange.hub.reset()
    exchange.send_json({})


def set_page_size(exchange: Exchange) -> None:
    exchange.hub.page_size = exchange.read_json()["rows"]
    exchange.send_json({})


def add_account(exchange: Exchange) -> None:
    exchange.hub.add_account(**exchange.read_json())
    exchange.send_json({})


def order_fault(exchange: Exchange) -> None:
    fault = exchange.hub.fault(**exchange.read_json())
    exchange.send_json(fault.summary())


def show_faults(exchange: Exchange) -> None:
    exchange.send_json([fault.summary() for fault in exchange.hub.faults])


def clear_faults(exchange: Exchange) -> None:
    exchange.hub.faults.clear()
    exchange.send_json({})


def show_log(exchange: Exchange) -> None:
    hub = exchange.hub
    with hub.lock:
        log = [asdict(entry) for entry in hub.log]
    exchange.send_json({"log": log, "totals": hub.totals(), "crashes": hub.crashes})


def clear_log(exchange: Exchange) -> None:
    exchange.hub.clear_log()
    exchange.send_json({})


CONTROL_ROUTES = [
    ("POST", "/__test__/add", add),
    ("POST", "/__test__/remove", remove),
    ("POST", "/__test__/move", move),
    ("POST", "/__test__/reset", reset),
    ("POST", "/__test__/page_size", set_page_size),
    ("POST", "/__test__/accounts", add_account),
    ("POST", "/__test__/faults", order_fault),
    ("GET", "/__test__/faults", show_faults),
    ("DELETE", "/__test__/faults", clear_faults),
    ("GET", "/__test__/log", show_log),
    ("DELETE", "/__test__/log", clear_log),
]
