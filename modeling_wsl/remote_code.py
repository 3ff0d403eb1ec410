"""What makes a saved folder work in a process where this library is not installed (`trust_remote_code=True`)."""

import os
import shutil
from pathlib import Path

from transformers.dynamic_module_utils import TRANSFORMERS_DYNAMIC_MODULE_NAME


AUTO_MAP = {
    "AutoConfig": "configuration_wsl.WSLConfig",
    "AutoModel": "modeling_wsl.WSLModel",
    "AutoModelForPreTraining": "modeling_wsl.WSLForPreTraining",
    "AutoFeatureExtractor": "feature_extraction_wsl.WSLFeatureExtractor",
}
CUSTOM_PIPELINES = {
    "weight-embedding": {"impl": "pipelines.WeightEmbeddingPipeline", "pt": ["AutoModel"], "type": "multimodal"},
    "weight-generation": {"impl": "pipelines.WeightGenerationPipeline", "pt": ["AutoModel"], "type": "multimodal"},
}
# The command line is for the installed library, and transformers makes the package file of its module cache itself.
NOT_SHIPPED = ("__init__.py", "cli.py")


def is_remote_code() -> bool:
    """Whether this very file was loaded by transformers from a model folder, not from the installed library."""
    return __name__.partition(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME


def code_files() -> list[Path]:
    """The source files that a saved folder carries: every module beside this one but the command line, by name."""
    return sorted(path for path in Path(__file__).parent.glob("*.py") if path.name not in NOT_SHIPPED)


def copy_code_files(folder: str | os.PathLike) -> list[Path]:
    """Copies `code_files()` into `folder`, each under a temporary name first, and returns the paths written.

    A file that already is the source (a model saved onto the folder that it was loaded from) is left alone.
    """
    target_folder = Path(folder)
    target_folder.mkdir(parents=True, exist_ok=True)
    written = []
    for source in code_files():
        target = target_folder / source.name
        if target.exists() and target.samefile(source):
            continue
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)
        written.append(target)
    return written


def without_code_files(timestamps: dict[str, float]) -> dict[str, float]:
    """Of the files that a folder had before a save with `push_to_hub=True`, those that need not be uploaded.

    transformers uploads what is newer than its note of the folder, which it takes when the code is there already.
    """
    shipped = {path.name for path in code_files()}
    return {name: time for name, time in timestamps.items() if name not in shipped}


def entry_points() -> dict[str, type]:
    """The classes that `AUTO_MAP` and `CUSTOM_PIPELINES` name, by Auto class and by task.

    The imports stand here, and not at the top, for two reasons: the configuration imports this module, and
    transformers copies into its cache only what it reaches by relative imports. Through this function it reaches every
    file, the pipelines too, so that a model loaded as remote code can be saved again without losing any.
    """
    from .configuration_wsl import WSLConfig
    from .feature_extraction_wsl import WSLFeatureExtractor
    from .modeling_wsl import WSLForPreTraining, WSLModel
    from .pipelines import WeightEmbeddingPipeline, WeightGenerationPipeline

    return {
        "AutoConfig": WSLConfig,
        "AutoModel": WSLModel,
        "AutoModelForPreTraining": WSLForPreTraining,
        "AutoFeatureExtractor": WSLFeatureExtractor,
        "weight-embedding": WeightEmbeddingPipeline,
        "weight-generation": WeightGenerationPipeline,
    }
