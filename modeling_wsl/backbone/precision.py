"""The arithmetic that a machine multiplies matrices fastest in."""

import functools
import time

import torch


_SECONDS = 0.02  # for the products of one dtype, about
_ROUNDS = 3
_CLEAR = 1.5  # one round is enough where the slower one takes this many times as long
# bfloat16 must win by this much: around the products autocast also casts, which float32 needs not.
_MARGIN = 0.95


@functools.lru_cache
def choose_precision(device: str, width: int, rows: int = 512) -> tuple[str, dict[str, float]]:
    """Times one product of a backbone's own size, tokens times the up projection of a block, in both arithmetics.

    Autocast to bfloat16 halves or quarters the time where a machine has matrix units for it, and doubles it on a CPU
    without them.

    Args:
        device: of torch, "cpu" or "cuda" for example.
        width: `hidden_size` of the backbone.
        rows: tokens at a time.

    Returns:
        "float32" or "bfloat16", whichever is faster, and the seconds of a product by name. Where the device has no
        bfloat16, {} and "float32".
    """
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    try:
        operands = {
            name: (
                torch.ones(rows, width, device=device, dtype=kind),
                torch.ones(width, 4 * width, device=device, dtype=kind),
            )
            for name, kind in kinds.items()
        }
        for left, right in operands.values():
            left @ right  # the first product also prepares kernels
        _wait(device)
        began = time.perf_counter()
        operands["float32"][0] @ operands["float32"][1]
        _wait(device)
        repeats = max(1, min(100, int(_SECONDS / _ROUNDS / max(time.perf_counter() - began, 1e-6))))
        seconds = dict.fromkeys(kinds, float("inf"))
        for _ in range(_ROUNDS):  # in turn, so that both meet the same disturbances; the fastest round counts
            for name, (left, right) in operands.items():
                began = time.perf_counter()
                for _ in range(repeats):
                    left @ right
                _wait(device)
                seconds[name] = min(seconds[name], (time.perf_counter() - began) / repeats)
            if max(seconds.values()) > _CLEAR * min(seconds.values()):
                break
    except (RuntimeError, NotImplementedError):
        return "float32", {}
    faster = "bfloat16" if seconds["bfloat16"] < _MARGIN * seconds["float32"] else "float32"
    return faster, seconds


def _wait(device: str) -> None:
    if not device.startswith("cpu"):
        torch.accelerator.synchronize()
