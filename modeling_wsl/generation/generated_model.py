"""GeneratedModel: weights that a backbone drew, where each tensor came from, and a model of the target's library."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, create_repo, upload_folder
from torch import Tensor, nn

from .targets import Target


PROVENANCE_FILE = "provenance.json"
REPORTED_PACKAGES = ("hf-wsl", "torch", "transformers", "timm", "safetensors")


@dataclass(frozen=True, repr=False)
class GeneratedModel:
    """A generated model.

    Attributes:
        state_dict: every name of the target, in its order, on the CPU, in the target's dtypes; tied names share one
            tensor.
        provenance: `tensors` says of every name of the state dict "sampled", "inherited: <anchor>", "re-estimated",
            "initialized" or "given: module" (a module's own values); beside it everything that is needed to make
            the same weights again (`num_candidates` are those of one round). JSON-serializable.
        target: what was generated.
    """

    state_dict: dict[str, Tensor]
    provenance: dict[str, Any]
    target: Target

    def __repr__(self) -> str:
        return (
            f"GeneratedModel({self.target.name!r}, {len(self.state_dict)} tensors, draw {self.provenance.get('draw')})"
        )

    def instantiate(self) -> nn.Module:
        """A new module of the target's library with these weights, on the CPU, in eval mode.

        Raises:
            ValueError: the target was given as tensors only (a manifest, a state dict, a file).
        """
        module = self.target.build()
        module.load_state_dict(self.state_dict)
        return module.eval()

    def save_pretrained(self, save_directory: str | os.PathLike) -> Path:
        """Writes a folder that the target's own library loads, and `provenance.json`.

        timm targets: `timm.create_model("local-dir:<folder>", pretrained=True)`. transformers targets:
        `AutoModel*.from_pretrained(folder)`. Others: `model.safetensors`. The files are written beside the folder
        first and then moved, weights before provenance, so that none is ever seen half written.

        Returns:
            The folder.

        Raises:
            FileExistsError: the path is a file.
        """
        folder = Path(save_directory)
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file; give a folder to save the generated model in.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            self.target.save(self.state_dict, temporary)
            (temporary / PROVENANCE_FILE).write_text(json.dumps(self.provenance, indent=2) + "\n")
            folder.mkdir(exist_ok=True)
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == PROVENANCE_FILE):
                path.chmod(0o644)  # transformers leaves weight files readable by their owner only
                os.replace(path, folder / path.name)
        finally:
            shutil.rmtree(temporary)
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload generated model",
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        token: str | bool | None = None,
    ) -> CommitInfo:
        """Uploads what `save_pretrained` writes, to a repository that is made where it does not exist.

        It brings no card; `hf-wsl publish` writes one, from the provenance and the licenses of the anchors.

        Args:
            private: of a new repository; None leaves it to the owner's settings.
            revision: branch, which must exist.

        Returns:
            the commit.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
        """
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            return upload_folder(
                repo_id=repo_id,
                folder_path=self.save_pretrained(Path(folder) / "model"),
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                token=token,
            )


def package_versions() -> dict[str, str | None]:
    """The versions that a generated model depends on; None for what is not installed (hf-wsl as remote code)."""
    return {package: _installed(package) for package in REPORTED_PACKAGES}


@cache  # it parses a file of text for each, and they do not change under a running process
def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def entries_by_origin(origins: Mapping[str, str], state_dict: Mapping[str, Tensor]) -> dict[str, int]:
    """Counts the numbers of the state dict that come from each origin; tied tensors count once."""
    counts: dict[str, int] = {}
    seen: set[int] = set()
    for name, origin in origins.items():
        if id(state_dict[name]) not in seen:
            seen.add(id(state_dict[name]))
            counts[origin] = counts.get(origin, 0) + state_dict[name].numel()
    return counts
