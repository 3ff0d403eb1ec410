"""Settings of a quantization, as the config files beside the weights give them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, read_json


CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
INNER_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
# Files that hold the settings alone, and the scheme where they do not name it: AutoGPTQ, AutoAWQ, NVIDIA's modelopt.
CONFIG_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
FLOATS = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Settings:
    """The settings of a quantization.

    Attributes:
        method: its name in lower case: "gptq"; None where no file speaks of one.
        values: all other settings.
        dtype: the model's own floating-point type, where its config says it.
    """

    method: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None

    def number(self, *names: str) -> int | None:
        """A whole number from 1 to 65,536 under one of these names."""
        for name in names:
            value = self.values.get(name)
            if type(value) is int and 0 < value <= 1 << 16:
                return value
        return None

    def text(self, name: str) -> str:
        """A word in lower case, empty where there is none."""
        value = self.values.get(name)
        return value.lower() if isinstance(value, str) else ""

    def result(self, scale_dtype: str) -> str:
        """The dtype of a weight made with scales of some dtype: theirs if it has 16 bits, else the model's.

        The scales' own is taken where the model's is not known, and bfloat16 for scales of 8 bits.
        """
        if scale_dtype in ("float16", "bfloat16"):
            return scale_dtype
        return self.dtype or ("float32" if scale_dtype in ("float32", "float64") else "bfloat16")


def read_settings(config: Mapping[str, Any], folder: Path | None) -> Settings:
    """The settings in a parsed config.json, or else in the files of a folder.

    Raises:
        CheckpointError: such a file is not JSON.
    """
    inner = [config, *(config[name] for name in INNER_CONFIGS if isinstance(config.get(name), Mapping))]
    dtypes = [str(c.get(key)).removeprefix("torch.") for c in inner for key in ("dtype", "torch_dtype") if c.get(key)]
    dtype = next((name for name in dtypes if name in FLOATS), None)
    for values in (c[key] for c in inner for key in CONFIG_KEYS if isinstance(c.get(key), Mapping)):
        return Settings(_method(values, "mlx" if "quant_method" not in values else ""), values, dtype)
    if config.get("model_type") == "chatglm" and type(bits := config.get("quantization_bit")) is int and bits:
        return Settings("chatglm", {"bits": bits}, dtype)
    for name, method in CONFIG_FILES.items() if folder else ():
        path = folder / name
        if path.is_file():
            values = read_json(path, name, unique_keys=False)
            if isinstance(values, Mapping):
                values = values["quantization"] if isinstance(values.get("quantization"), Mapping) else values
                return Settings(_method(values, method), values, dtype)
    return Settings(dtype=dtype)


def _method(values: Mapping[str, Any], default: str) -> str:
    named = values.get("quant_method") or values.get("quant_algo") or values.get("format") or default
    return str(named)[:60].lower()


def settings_beside(path: Path | None, config: Mapping[str, Any]) -> Settings:
    """The settings for a weight file: in the model's config, or in files beside it."""
    if path is None:
        return read_settings(config, None)
    if not config and (path.parent / "config.json").is_file():
        try:
            found = read_json(path.parent / "config.json", "the config", unique_keys=False)
        except CheckpointError:  # it may belong to something else
            found = None
        config = found if isinstance(found, dict) else {}
    return read_settings(config, path.parent)
