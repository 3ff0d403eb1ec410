"""A part of a model that was passed as if it were all of it: told by its name, or by the shapes of its tensors."""

import re
from collections.abc import Mapping
from pathlib import Path

from ...tokens.manifest import TensorSpec
from ..errors import PartOfModelError, shorten
from ..file_names import SHARD, is_weight_name, part_of
from .layouts import MEGATRON_FILES, MEGATRON_FOLDER, list_files, megatron_files


WEIGHT = re.compile(r"(^|[._])(weight|bias|lora_[AB]\w*|lora_embedding_[AB]\w*)$")


def refuse_single_part(path: Path) -> None:
    """Refuses a file that is one of several parts of a model, by its name and what lies beside it.

    Raises:
        PartOfModelError: with the number of the part, how many there are, and what to pass instead.
    """
    name, folder = path.name, path.parent
    if name in MEGATRON_FILES and (match := MEGATRON_FOLDER.fullmatch(folder.name)):
        files = megatron_files(folder.parent, list_files(folder.parent))
        if len(files) > 1 or int(match["tensor"]):
            reason = f"is part {int(match['tensor'])} of {max(len(files), int(match['tensor']) + 1)}, from Megatron"
            raise PartOfModelError(path, reason, f"Pass the folder of all parts ({folder.parent})")
        return
    if name.endswith("_optim_states.pt"):
        raise PartOfModelError(
            path, "is a part of the state of an optimizer, from ZeRO", f"Pass its folder ({folder})"
        )
    if not is_weight_name(name):
        return
    if (match := SHARD.fullmatch(name)) and int(match["world"]) > 1:
        reason = f"is shard {int(match['rank'])} of {int(match['world'])} of a model"
        raise PartOfModelError(path, reason, f"Pass its folder, with the index of the shards ({folder})")
    if part := part_of(name, list_files(folder)):
        reason = f"is part {part.rank} of {part.world} of a model, from {part.maker}"
        if part.world == 1:
            reason = f"is part {part.rank} of a model by its name, from {part.maker}"
        raise PartOfModelError(path, reason, f"Pass the folder of all parts ({folder}), or rename it if it is all")


def refuse_ungathered(source: object, specs: Mapping[str, TensorSpec]) -> None:
    """Refuses weights of which only the names are there: what a process of ZeRO-3 holds of parameters, `[0]`.

    Raises:
        PartOfModelError: with the first such tensor.
    """
    floats = [spec for spec in specs.values() if spec.torch_dtype.is_floating_point]
    empty = [spec.name for spec in floats if spec.shape == (0,)]
    if any(WEIGHT.search(name) for name in empty) or (len(empty) > 1 and len(empty) == len(floats)):
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        reason = f"holds empty tensors ({shorten(empty[0])}{more} of shape [0]): saved under ZeRO-3 without gathering"
        advice = (
            "Save it with stage3_gather_16bit_weights_on_model_save, or pass the folder global_stepN beside it, which "
            "has the weights"
        )
        raise PartOfModelError(source, reason, advice)


def refuse_cut(source: object, specs: Mapping[str, TensorSpec]) -> None:
    """Refuses what the shapes and names of tensors show to be one of several parts.

    These are flattened parameters of FSDP, and one `consolidated.NN.pth` of Llama 1 or 2, whose embedding is too
    narrow.

    Raises:
        PartOfModelError: with the tensor that shows it.
    """
    if flat := [name for name in specs if name.endswith("flat_param")]:
        reason = f"holds flattened parameters of FSDP ({shorten(flat[0])}), a part of a model without its shapes"
        raise PartOfModelError(source, reason, "Save it with StateDictType.FULL_STATE_DICT, or SHARDED by DCP")
    embedding, norm = specs.get("tok_embeddings.weight"), specs.get("norm.weight")
    if embedding and norm and len(embedding.shape) == 2 and embedding.shape[1] < norm.numel:
        world = norm.numel / embedding.shape[1]
        reason = f"is one of {world:g} parts of a model: it holds {embedding.shape[1]} of {norm.numel} columns"
        raise PartOfModelError(source, reason, "Pass the folder that has all consolidated.NN.pth")
