"""Checks of a saved backbone before it is built and after it was loaded: transformers takes much for a backbone."""

from os import PathLike
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.architectures import on_meta
from ..checkpoints.checkpoint import first_nonfinite, open_checkpoint
from ..checkpoints.errors import CheckpointError, NonFiniteWeightsError, shorten
from ..checkpoints.folders import read_config


REPLACE = "Save the backbone again, or fetch it again"


def check_files(folder: str | PathLike, model_class: type[PreTrainedModel]) -> None:
    """Refuses a folder whose weights are not those that its config describes; reads their headers alone.

    Args:
        folder: with config.json and weights; one of an adapter is left alone.
        model_class: what is to be loaded. A head that the file lacks is drawn anew, as everywhere in transformers.

    Raises:
        CheckpointError: a file is missing, damaged, foreign or a pickle with code; a tensor is missing, of another
            shape, or no floating-point number.
        ValueError: the config describes no backbone that can be.
    """
    path = Path(folder)
    library, entries = read_config(path)
    if library == "peft" or not entries:
        return
    # As the model is: a config of another model is refused by the fields that it lacks.
    config = model_class.config_class.from_dict(entries)
    with on_meta():
        model = model_class(config)
    prefix = f"{model_class.base_model_prefix}."
    base = {name.removeprefix(prefix): value for name, value in model.state_dict().items()}
    headed = model.base_model is not model
    own = {name for name in model.state_dict() if headed and not name.startswith(prefix)}
    with open_checkpoint(path, order="file", allow_nonfinite=True) as checkpoint:
        names = {name.removeprefix(prefix): name for name in checkpoint.tensor_order}
        for name, expected in base.items():
            if name not in names:
                if name in own:
                    continue
                more = sum(other not in names and other not in own for other in base)
                reason = f"lacks the tensor {shorten(name)} of its architecture ({more} are missing)"
                raise CheckpointError(folder, reason, REPLACE)
            spec = checkpoint.tensors[checkpoint.tied.get(names[name], names[name])]
            if spec.shape != tuple(expected.shape):
                shapes = f"the shape {list(spec.shape)}, its config says {list(expected.shape)}"
                reason = f"tensor {shorten(name)} has {shapes}"
                raise CheckpointError(folder, reason, REPLACE)
            if spec.torch_dtype.is_floating_point != expected.is_floating_point():
                raise CheckpointError(folder, f"tensor {shorten(name)} is of {spec.dtype}, no weights", REPLACE)


def check_loaded(source: object, model: nn.Module) -> None:
    """Refuses a loaded backbone with NaN or infinite weights: whatever it computes would be NaN.

    Raises:
        NonFiniteWeightsError: naming the tensor.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.device.type == "cpu" and first_nonfinite(tensor) is not None:
            reason = f"tensor {shorten(name)} of this backbone holds NaN or infinity"
            raise NonFiniteWeightsError(source, reason, REPLACE)
