"""A folder of small models as one finds them: several formats, owners, licences, a copy, and some that are refused."""

import json
from pathlib import Path

import safetensors.torch
import torch
from torch import nn


class TinyNet(nn.Module):
    """A convolution with batch norm, a linear layer whose tokens pad, a 0-d scale, and a tied output."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.embed = nn.Embedding(37, width)
        self.head = nn.Linear(width, 37)
        self.head.weight = self.embed.weight


def tiny_state(seed: int, width: int = 12) -> dict[str, torch.Tensor]:
    """The state dict of a `TinyNet`; the same seed gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyNet(width).state_dict()


def add_model(folder: Path, name: str, state: dict[str, torch.Tensor], **record) -> Path:
    """A model folder with `model.safetensors` and, if anything is to be said of it, `model.json`."""
    path = folder / name
    path.mkdir(parents=True)
    stored = {key: value.clone() for key, value in state.items() if key != "head.weight"}
    safetensors.torch.save_file(stored, path / "model.safetensors")
    record = {"tensor_order": list(stored), **record}
    (path / "model.json").write_text(json.dumps(record))
    return path


def make_zoo(folder: Path) -> Path:
    """Six models of four owners, two of them bit-identical, and four that are refused."""
    for number, owner in enumerate(("ada", "ada", "bob", "cyd")):
        state = tiny_state(number, width=12 + 4 * number)
        add_model(folder, f"{owner}-{number}", state, owner=owner, licence="MIT", family="tiny", task="none")
    add_model(folder, "dan-copy-of-bob", tiny_state(2, width=20), repo="dan/zoo", license="Apache-2.0")
    half = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in tiny_state(7).items()}
    torch.save({"state_dict": half}, folder / "zed.pth")
    return folder


def add_refused(folder: Path) -> None:
    """A weight beyond float16, a NaN, a NaN among the batch-norm statistics, and a pickle with code."""
    loud, broken, worn = tiny_state(3), tiny_state(4), tiny_state(5)
    loud["head.bias"][3] = -70000.0
    broken["conv.weight"][1, 2, 0, 0] = float("nan")
    worn["norm.running_var"][2] = float("nan")
    add_model(folder, "eve-loud", loud, owner="eve")
    add_model(folder, "eve-nan", broken, owner="eve")
    add_model(folder, "eve-worn", worn, owner="eve")
    (folder / "evil.pkl").write_bytes(b"\x80\x04cos\nsystem\n(X\x04\x00\x00\x00true\x85R.")
