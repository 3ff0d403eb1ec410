"""Windows of a tokenized dataset as the model takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from modeling_wsl.tokens.manifest import Segment, mask_from_valid_entries, positions_from_segments


class WindowCollator:
    """Rows of the config `windows` -> a batch: `model(**WindowCollator()(rows[:4]))`.

    Args:
        max_tokens: of a window, its first ones; None takes windows whole.
    """

    def __init__(self, max_tokens: int | None = None) -> None:
        self.max_tokens = max_tokens

    def __call__(self, rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]) -> dict[str, torch.Tensor]:
        """Pads windows to the longest of the batch, with tokens that hold no weight.

        Args:
            rows: a list of rows, or a mapping of columns as slicing a `datasets.Dataset` gives.

        Returns:
            tokens float32 and token_mask bool, true where an entry is a weight, both `[batch, tokens, d_t]`;
            positions int64 `[batch, tokens, 3]`.
        """
        if isinstance(rows, Mapping):
            rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        stop = self.max_tokens
        tokens = [torch.from_numpy(np.asarray(row["tokens"], np.float32))[:stop] for row in rows]
        valid = [torch.as_tensor(np.asarray(row["valid_entries"], np.int64))[:stop] for row in rows]
        tokens, valid = pad_sequence(tokens, batch_first=True), pad_sequence(valid, batch_first=True)
        return {
            "tokens": tokens,
            "token_mask": mask_from_valid_entries(valid, tokens.shape[-1]),
            "positions": pad_sequence([self._positions(row)[:stop] for row in rows], batch_first=True),
        }

    @staticmethod
    def _positions(row: Mapping[str, Any]) -> torch.Tensor:
        columns = (row[f"segment_{name}"] for name in ("layer", "position", "stride", "length"))
        segments = [Segment(*map(int, values)) for values in zip(*columns, strict=True)]
        return positions_from_segments(int(row["token_start"]), segments)


def model_inputs(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, Any]:
    """A batch of `WindowDataset`, on the CPU, as keyword arguments of the model.

    Returns:
        tokens float32 and token_mask bool `[batch, window, d_t]` (None where no entry is padding), positions int64
        `[batch, window, 3]`, attend_all: whether every token holds a weight, so that attention needs no mask.

    Tokens travel as stored and the mask as counts: a quarter of the bytes.
    """
    fewest = int(batch["valid_entries"].amin())  # asked here: a GPU would have to wait
    pinned = device.type == "cuda"  # elsewhere a copy that is waited for: the next batch takes the same memory
    tokens, valid, positions = (
        batch[name].to(device, non_blocking=pinned) for name in ("tokens", "valid_entries", "positions")
    )
    mask = None if fewest == tokens.shape[-1] else mask_from_valid_entries(valid, tokens.shape[-1])
    return {"tokens": tokens.float(), "token_mask": mask, "positions": positions, "attend_all": fewest > 0}
