"""The code that a saved folder carries, so that it works where this library is not installed (`trust_remote_code`)."""

import os
import re
from pathlib import Path

from transformers.dynamic_module_utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from .files import replacing


AUTO_MAP = {
    "AutoConfig": "wsl.WSLConfig",
    "AutoModel": "wsl.WSLModel",
    "AutoModelForPreTraining": "wsl.WSLForPreTraining",
    "AutoFeatureExtractor": "wsl.WSLFeatureExtractor",
}
CUSTOM_PIPELINES = {
    "weight-embedding": {"impl": "wsl.WeightEmbeddingPipeline", "pt": ["AutoModel"], "type": "multimodal"},
    "weight-generation": {"impl": "wsl.WeightGenerationPipeline", "pt": ["AutoModel"], "type": "multimodal"},
}
# transformers makes the package file of its module cache itself, and finds remote code by `auto_map`, without
# registration.
NOT_SHIPPED = ("__init__.py", "registration.py")
_RELATIVE_IMPORT = re.compile(r"^(\s*from )(\.+)([\w.]+)(?= import)", re.MULTILINE)


def is_remote_code() -> bool:
    """Whether this very file was loaded by transformers from a model folder, not from the installed library."""
    return __name__.partition(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME


def code_files() -> dict[str, str]:
    """The source files that a saved folder carries: file name -> text, every module of the library in one flat folder.

    transformers follows `from .x import` within one folder only, so `tokens/manifest.py` becomes `tokens_manifest.py`
    and the relative imports are rewritten to match. Of code that is flat already (loaded from a saved folder) nothing
    changes.
    """
    root = Path(__file__).parent
    files = {}
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parent.parts
        if path.name not in NOT_SHIPPED:
            files["_".join([*folders, path.name])] = _flatten_imports(path.read_text(encoding="utf-8"), folders)
    return files


def _flatten_imports(text: str, folders: tuple[str, ...]) -> str:
    def flat(match: re.Match) -> str:
        above = folders[: len(folders) + 1 - len(match[2])]
        return f"{match[1]}.{'_'.join([*above, *match[3].split('.')])}"

    return _RELATIVE_IMPORT.sub(flat, text)


def copy_code_files(folder: str | os.PathLike) -> list[Path]:
    """Writes `code_files()` into `folder`, each under a temporary name first, and returns the paths written.

    All are written, also where the same text is there already: a save with `push_to_hub=True` uploads what is new.
    """
    target_folder = Path(folder)
    target_folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in code_files().items():
        target = target_folder / name
        with replacing(target) as temporary:
            temporary.write_bytes(text.encode())
        written.append(target)
    return written


def without_code_files(timestamps: dict[str, float]) -> dict[str, float]:
    """Of the files that a folder had before a save with `push_to_hub=True`, those that need not be uploaded.

    transformers uploads what is newer than its note of the folder, which it takes when the code is there already.
    """
    shipped = set(code_files())
    return {name: time for name, time in timestamps.items() if name not in shipped}
