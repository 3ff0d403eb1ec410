"""Parts of one model, joined by the rule that their layout states."""

from pathlib import Path

from ..containers.container import Contents
from ..errors import CheckpointError
from .layouts import layout_of, names_in


TOOLS = {
    "dcp": "Run torch.distributed.checkpoint.format_utils dcp_to_torch",
    "zero": "Run zero_to_fp32.py, which DeepSpeed lays beside the checkpoint",
    "megatron": "Run Megatron's tools/checkpoint/convert.py",
    "ranks": "Run the merging script of the tool that wrote them (verl: `python -m verl.model_merger merge`)",
}


def parts_contents(folder: Path, key: str | None) -> Contents:
    """Contents of the model whose parts lie in a folder.

    Raises:
        CheckpointError: a part is missing or damaged, or nothing in the files says how they are joined.
    """
    layout = layout_of(folder, names_in(folder))
    raise CheckpointError(
        folder, "holds parts of a model that are not joined", f"{TOOLS[layout]}, and pass what it writes"
    )
