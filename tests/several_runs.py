"""Run by tests under torchrun: one pretraining command after the other, in the same processes.

`several_runs.py FILE`: FILE holds a JSON list of `{"words": [...], "environment": {...}}`.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import state
from accelerate.utils import DistributedType

from trainers.pretrain import main


def shard_on_the_cpu_where_asked():
    """Makes accelerate shard CPU processes where its environment asks for it, as it does GPUs.

    CPU processes are not on its list: it would fall back to DistributedDataParallel without a word. All else is real,
    torch's `fully_shard` over gloo included.
    """
    initialize = state.PartialState.__init__

    def as_on_gpus(self, *arguments, **options):
        initialize(self, *arguments, **options)
        asked = os.environ.get("ACCELERATE_USE_FSDP") == "true"
        if asked and self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    state.PartialState.__init__ = as_on_gpus


if __name__ == "__main__":
    shard_on_the_cpu_where_asked()
    file = Path(sys.argv[1])
    own = dict(os.environ)
    for number, run in enumerate(json.loads(file.read_text())):
        os.environ.clear()
        os.environ.update(own | run["environment"])
        # A meeting place for each run: in torchrun's own, processes would still find each other's earlier addresses.
        meeting = file.with_name(f"meeting-{number}").resolve().as_uri()
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
        main(run["words"])
        state.AcceleratorState._reset_state(reset_partial_state=True)
