"""Adapters as the update of each base matrix: two factorizations of one update are one."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ...tokens.manifest import TensorSpec
from .part import Held, Part


UPDATE, MAGNITUDE = "weight_update", "weight_magnitude"
# (pattern, name as PEFT writes it): diffusers' older names, and those of torchtune and kohya.
SPELLINGS = (
    (re.compile(r"(?:\.processor)?\.(to_\w+?)_lora\.(down|up)\.weight$"), r".\1.lora_\2.weight"),
    (re.compile(r"\.lora(?:_linear_layer)?\.(down|up)\.weight$"), r".lora_\1.weight"),
    (re.compile(r"\.dora_scale$"), ".lora_magnitude_vector"),
)
KINDS = {
    "lora_A": "down",
    "lora_a": "down",
    "lora_down": "down",
    "lora_B": "up",
    "lora_b": "up",
    "lora_up": "up",
    "lora_embedding_A": "embedding down",
    "lora_embedding_B": "embedding up",
    "lora_magnitude_vector": "magnitude",
    "alpha": "alpha",
}
# module, kind, name of the adapter where the model was saved from memory
FACTOR = re.compile(rf"^(?:(.*)\.)?({'|'.join(KINDS)})(?:\.(?!weight$)([^.]+))?(?:\.weight)?$")
SCALING_VECTOR = re.compile(r"\.(ia3_l)\.[^.]+$")
# Of files of kohya's scripts, which join the parts of a module's name by underscores; diffusers has dots.
KOHYA = re.compile(r"^lora_(unet|te\d?|transformer)_|^(unet|text_encoder(?:_\d)?|transformer)\.")
KOHYA_PARTS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}


@dataclass
class Adapter:
    """The tensors that change one module."""

    module: str
    factors: dict[str, Part] = field(default_factory=dict)

    @property
    def is_low_rank(self) -> bool:
        """Whether both factors are there and fit each other."""
        down, up = self.down, self.up
        if down is None or up is None or min(len(down.spec.shape), len(up.spec.shape)) < 2:
            return False
        return up.spec.numel == up.spec.shape[0] * down.spec.shape[0] > 0  # no kernel but [1, 1] on the way up

    @property
    def down(self) -> Part | None:
        return self.factors.get("down") or self.factors.get("embedding down")

    @property
    def up(self) -> Part | None:
        return self.factors.get("up") or self.factors.get("embedding up")


def merge_adapters(
    parts: dict[str, Part], config: Mapping[str, Any], held: Held, balanced: bool = False
) -> dict[str, Part]:
    """Parts with the factors of low-rank adapters replaced by what they add to a matrix.

    Args:
        parts: by plain name.
        config: a parsed adapter_config.json, or nothing.
        held: for tensors that are computed.
        balanced: give two factors of the stored shapes, those that share the update's singular values evenly, and not
            their product: the same for every factorization but for rounding, and no larger than the file.

    Returns:
        `MODULE.weight_update` float32, of the base matrix's shape (or `MODULE.lora_A.weight`, `MODULE.lora_B.weight`);
        DoRA's magnitudes beside it as `MODULE.weight_magnitude`; IA3's vectors without their adapter's name.
    """
    adapters: dict[tuple[str, str], Adapter] = {}
    others: dict[str, Part] = {}
    for name, part in parts.items():
        spelled = name
        for pattern, new in SPELLINGS:
            spelled = pattern.sub(new, spelled)
        if match := FACTOR.match(spelled):
            module = match[1] or ""
            adapter = adapters.setdefault((module, match[3] or ""), Adapter(module))
            adapter.factors[KINDS[match[2]]] = part
        else:
            others[SCALING_VECTOR.sub(r".\1", name)] = part
    merged: dict[str, Part] = {}
    for adapter in adapters.values():
        if adapter.is_low_rank:
            merged |= _merged(adapter, config, held, balanced)
        else:  # an alpha alone, or half of an adapter: as it is stored
            others |= {part.spec.name: part for part in adapter.factors.values()}
    return others | merged if merged.keys().isdisjoint(others) else parts


def _merged(adapter: Adapter, config: Mapping[str, Any], held: Held, balanced: bool) -> dict[str, Part]:
    down, up, alpha = adapter.down, adapter.up, adapter.factors.get("alpha")
    name = plain_module(adapter.module)
    start = f"{name}." if name else ""
    embedding = "embedding down" in adapter.factors
    place = min(part.place for part in adapter.factors.values())
    factors = partial(_factors, down, up, alpha, adapter.module, config)
    merged = {}

    def add(leaf: str, shape: tuple[int, ...], dtype: str, read: Callable[[], torch.Tensor]) -> None:
        merged[start + leaf] = Part(TensorSpec(start + leaf, shape, dtype), read, place)

    if balanced:
        pair = partial(held.get, ("balanced", start, place), partial(_balanced, factors))
        add("lora_A.weight", down.spec.shape, "float32", lambda: pair()[0].reshape(down.spec.shape))
        add("lora_B.weight", up.spec.shape, "float32", lambda: pair()[1].reshape(up.spec.shape))
    else:
        inputs, outputs = down.spec.numel // down.spec.shape[0], up.spec.shape[0]
        shape = (inputs, outputs) if embedding else (outputs, *down.spec.shape[1:])
        product = partial(held.get, ("update", start, place), partial(_update, factors, embedding))
        add(UPDATE, shape, "float32", lambda: product().reshape(shape))
    if (magnitude := adapter.factors.get("magnitude")) is not None:
        dtype = magnitude.spec.dtype
        add(MAGNITUDE, (magnitude.spec.numel,), dtype, lambda: magnitude.read().reshape(-1))
    return merged


def plain_module(module: str) -> str:
    """The module's name; those of diffusion models as both kohya and diffusers have them, with dots around numbers."""
    if not (match := KOHYA.match(module)):
        return module
    part = match[1] or match[2]
    joined = module[match.end() :].replace(".", "_")
    dotted = re.sub(r"_([0-9]+)(?=_|$)", r".\1.", joined).replace("._", ".").replace("..", ".").rstrip(".")
    return f"{KOHYA_PARTS.get(part, part)}.{dotted}"


def _factors(
    down: Part, up: Part, alpha: Part | None, module: str, config: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """B `[out, r]`, scaled, and A `[r, in]`, in float64."""
    a = down.read().double().flatten(1)
    b = up.read().double().reshape(len(up.read()), -1)
    return b * _scale(len(a), None if alpha is None else float(alpha.read().reshape(-1)[0]), module, config), a


def _update(factors: Callable[[], tuple[torch.Tensor, torch.Tensor]], embedding: bool) -> torch.Tensor:
    b, a = factors()
    product = b @ a
    return (product.T if embedding else product).float().contiguous()


def _scale(rank: int, alpha: float | None, module: str, config: Mapping[str, Any]) -> float:
    """What the product is multiplied by: alpha over the rank, or over its root (rsLoRA); 1 where no alpha is known."""
    if alpha is None:
        patterns = config.get("alpha_pattern")
        patterns = patterns if isinstance(patterns, Mapping) else {}
        # Compared as text: a pattern of unknown origin is not run.
        ends = (value for key, value in patterns.items() if module == key or module.endswith(f".{key}"))
        alpha = next(ends, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        return 1.0
    return alpha / (math.sqrt(rank) if config.get("use_rslora") is True else rank)


def _balanced(factors: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B, float32, with B A the same and the singular values' roots in either; signs by B's columns."""
    b, a = factors()
    left, left_rest = torch.linalg.qr(b)
    right, right_rest = torch.linalg.qr(a.T)
    u, values, vh = torch.linalg.svd(left_rest @ right_rest.T, full_matrices=False)
    u, vh = left @ u, vh @ right.T
    sign = torch.sign((u**3).sum(0))
    sign[sign == 0] = 1
    root = values.sqrt()
    columns, rows = u * (root * sign), vh * (root * sign)[:, None]
    new_b, new_a = torch.zeros_like(b), torch.zeros_like(a)
    new_b[:, : columns.shape[1]], new_a[: rows.shape[0]] = columns, rows
    return new_a.float(), new_b.float()
