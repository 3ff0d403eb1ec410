"""R2 of a backbone over a whole validation split, beside which the two linear baselines stand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from modeling_wsl.backbone.losses import R2Accumulator

from ..data.windows.crops import batches_of, tiles
from ..data.windows.window_data import WindowDataset, make_loader
from ..data.windows.window_inputs import model_inputs
from ..distribution import is_sharded


class Validation:
    """Deterministic tiling of the validation windows, no augmentation, every token counted once over all processes.

    Args:
        dataset: validation windows.
        window_size: tokens of a tile; the last tile of a window is shorter.
        max_windows: evaluate on this many windows only; 0 for all.
    """

    def __init__(
        self, accelerator: Accelerator, dataset: WindowDataset, window_size: int, batch_size: int, max_windows: int = 0
    ) -> None:
        self.accelerator = accelerator
        # Longest first: tiles of similar length share a batch, so little of it is padding.
        crops = sorted(tiles(dataset.num_tokens, window_size, max_windows), key=lambda crop: -crop.length)
        batches = batches_of(crops, batch_size, accelerator.process_index, accelerator.num_processes)
        # Where the model lies in parts all processes must run every pass: who has no tiles left runs one again.
        self.counted = len(batches)
        self.in_step = is_sharded(accelerator)
        if self.in_step:
            longest = -(-len(crops[:: accelerator.num_processes]) // batch_size)
            batches += [crops[:1]] * (longest - len(batches))
        self.dataset, self.batches = dataset, batches

    @torch.no_grad()
    def r2(self, model: PreTrainedModel, stopped: Callable[[], bool]) -> float | None:
        """R2, tokens standardized one by one; None where `stopped()` turned true on any process before the end.

        Args:
            model: WSLForPreTraining; its training mode is left as it was.
        """
        was_training = model.training
        model.eval()
        score = R2Accumulator()
        incomplete = False
        for number, batch in enumerate(make_loader(self.dataset, self.batches, num_workers=0)):
            incomplete = self._agreed(stopped())
            if incomplete:
                break
            inputs = model_inputs(batch, self.accelerator.device)
            # The whole model is called, for one that is sharded puts its parts together there; but not compiled, for
            # tiles come in many shapes.
            with self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
                output = model(**inputs, return_loss=False)
            if number < self.counted:
                score.update(output.reconstruction, inputs["tokens"], inputs["token_mask"])
        model.train(was_training)
        flag = torch.tensor([float(incomplete)], dtype=torch.float64)
        state = torch.cat([score.state(), flag]).to(self.accelerator.device)
        state = self.accelerator.reduce(state, "sum")
        total = R2Accumulator()
        total.merge(state[:2])
        return None if state[2] > 0 else total.compute()

    def _agreed(self, stopped: bool) -> bool:
        """Whether to stop: for any process's sake where they run in step, else for this one's."""
        if not self.in_step:
            return stopped
        return bool(self.accelerator.reduce(torch.tensor(float(stopped), device=self.accelerator.device), "sum"))
