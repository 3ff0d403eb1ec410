"""What tells that a backbone has changed."""

import hashlib
from os import PathLike
from pathlib import Path

from modeling_wsl.loading import find_backbone


# What decides the embeddings that a backbone gives: weights, settings, and how models become its tokens.
FILES = ("*config.json", "model*.safetensors", "adapter_model*.safetensors", "pytorch_model*.bin")


def backbone_state(backbone: str | PathLike, revision: str | None = None) -> str:
    """The commit of a backbone on the Hub; of a folder, a hash of its weights and settings.

    Raises:
        CheckpointError: it is missing, may not be read, or is no backbone.
    """
    name, commit = find_backbone(backbone, revision=revision)
    if commit:
        return commit
    folder, digest = Path(name).expanduser(), hashlib.sha256()
    for path in sorted({path for pattern in FILES for path in folder.glob(pattern)}):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]
