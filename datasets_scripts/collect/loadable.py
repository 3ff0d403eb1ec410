"""The paper's check (section 2): does a model load without remote code, with no weight missing and none left over?

The libraries' own loaders answer, and they need no weights for it: a file with the real header and a hole where the
weights would be is loaded onto the meta device. So a model is refused before its weights are downloaded.
"""

import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import transformers
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from transformers import CONFIG_MAPPING

from hf_wsl.errors import one_line
from modeling_wsl.checkpoints.architectures import on_meta, suspicious_entry, transformers_settings, without_loading
from modeling_wsl.checkpoints.errors import shorten

from ..outcomes import RefusedModel


# The loaders' words for tensors that do not fit, in the order in which one of them is named.
TIMM_PROBLEMS = (
    ("missing_weights", re.compile(r"Missing key\(s\) in state_dict: (?P<names>.*?)\.\s*(?:\n|$)", re.S)),
    ("mismatched_weights", re.compile(r"(?P<names>size mismatch for .*)", re.S)),
    ("unexpected_weights", re.compile(r"Unexpected key\(s\) in state_dict: (?P<names>.*?)\.\s*(?:\n|$)", re.S)),
)
MAX_LAYERS = 2000


def write_hollow_file(path: Path, header: bytes, size: int) -> None:
    """Writes a safetensors file of a header (with its eight bytes of length) and a hole, which takes no disk."""
    with path.open("wb") as stream:
        stream.write(header)
        stream.truncate(size)


def check_loadable(
    folder: Path, source: str, library: str | None, config: Mapping[str, Any], tensors: Iterable[str]
) -> None:
    """Loads a folder's files as its library does, onto the meta device.

    Args:
        folder: weights (hollow ones will do) and config files, under the names that the libraries look for; its
            config.json is overwritten without the entries that would fetch code or weights.
        source: the Hub id, for messages.
        library: "timm", "transformers", "peft", as `modeling_wsl.checkpoints.folders.read_config` tells, or None.
        config: the parsed config.json or adapter_config.json.
        tensors: names in the weight files.

    Raises:
        RefusedModel: remote_code, unloadable, missing_weights, mismatched_weights or unexpected_weights.
    """
    if library is None:
        reason = "has no config.json that names an architecture of transformers or timm"
        raise RefusedModel(source, "unloadable", reason, "Collect with check readable to take it in all the same")
    tensors = list(tensors)
    if config.get("model_type") == "timm_wrapper" and any(name.startswith("timm_model.") for name in tensors):
        library = "transformers"  # saved by its wrapper around a timm model, under names that timm does not know
    if problem := suspicious_entry(config, MAX_LAYERS):
        raise RefusedModel(source, "unloadable", f"cannot be built safely: {problem}", "Leave it out")
    with _quietly():
        if library == "peft":
            _check_adapter(folder, source, tensors)
        elif library == "timm":
            _check_timm(folder, source, config)
        else:
            _check_transformers(folder, source, config)


def _check_transformers(folder: Path, source: str, config: Mapping[str, Any]) -> None:
    names = config.get("architectures")
    named = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    unknown = config.get("model_type") not in CONFIG_MAPPING or (named and not hasattr(transformers, named))
    if config.get("auto_map") and unknown:
        reason = f"needs its own code: transformers has no {named or config.get('model_type')}"
        raise RefusedModel(source, "remote_code", reason, "Collect with check readable: its files need no code")
    try:
        known = transformers_settings(config)
        if known is None or unknown:
            reason = (
                f"config.json names {shorten(named or config.get('model_type'))}, which transformers does not have"
            )
            raise RefusedModel(source, "unloadable", reason, "Collect with check readable to take it in all the same")
        settings, model_class = known
        (folder / "config.json").write_text(json.dumps(without_loading(config)), encoding="utf-8")
        _, report = model_class.from_pretrained(
            folder,
            config=settings,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report then
            local_files_only=True,
        )
    except RefusedModel:
        raise
    except Exception as error:  # any class of the library, fed with a config of unknown origin
        raise _unloadable(source, error) from error
    if report["missing_keys"]:
        raise _misfit(source, "missing_weights", "lacks", report["missing_keys"], model_class.__name__)
    if report["mismatched_keys"]:
        misfits = [f"{name} ({list(there)}, not {list(here)})" for name, there, here in report["mismatched_keys"]]
        raise _misfit(source, "mismatched_weights", "has in another shape", misfits, model_class.__name__)
    if report["unexpected_keys"]:
        raise _misfit(source, "unexpected_weights", "has beyond", report["unexpected_keys"], model_class.__name__)


def _check_timm(folder: Path, source: str, config: Mapping[str, Any]) -> None:
    architecture = config["architecture"]
    if not timm.is_model(architecture):
        reason = f"config.json names the architecture {shorten(architecture)}, which timm does not have"
        raise RefusedModel(source, "unloadable", reason, "Collect with check readable to take it in all the same")
    (folder / "config.json").write_text(json.dumps(without_loading(config)), encoding="utf-8")
    try:
        with on_meta():
            timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # as above
        for outcome, pattern in TIMM_PROBLEMS:
            if match := pattern.search(str(error)):
                reason = f"does not fit timm's {architecture}: {outcome.replace('_', ' ')}, {_listed(match['names'])}"
                raise RefusedModel(source, outcome, reason, "Its owner can save it again") from error
        raise _unloadable(source, error) from error


def _check_adapter(folder: Path, source: str, tensors: Sequence[str]) -> None:
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # as above
        raise _unloadable(source, error) from error
    if not config.base_model_name_or_path:
        raise RefusedModel(source, "unloadable", "adapter_config.json names no base model", "Its owner can name it")
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
    saved = [f".{name}." for name in getattr(config, "modules_to_save", None) or ()]
    foreign = [name for name in tensors if prefix not in name and not any(part in f".{name}" for part in saved)]
    if not any(prefix in name for name in tensors):
        raise _misfit(source, "missing_weights", "lacks all of", [f"{prefix}*"], f"{config.peft_type.value} adapter")
    if foreign:
        raise _misfit(source, "unexpected_weights", "has beyond", foreign, f"{config.peft_type.value} adapter")


def _misfit(source: str, outcome: str, verb: str, names: Iterable[str], model: str) -> RefusedModel:
    names = sorted(names)
    reason = f"{verb} {len(names)} tensors of {model}: {_listed(', '.join(names))}"
    return RefusedModel(source, outcome, reason, "Its owner can save it again")


def _unloadable(source: str, error: Exception) -> RefusedModel:
    reason = f"cannot be built ({type(error).__name__}: {shorten(one_line(error))})"
    return RefusedModel(source, "unloadable", reason, "Collect with check readable to take it in all the same")


def _listed(names: str) -> str:
    return shorten(" ".join(names.split()), 160)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the loaders' reports, bars and warnings on every model that does not fit."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    root = logging.getLogger("timm")
    before = root.level
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    root.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(before)
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
