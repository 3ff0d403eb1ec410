"""A part of a model that was passed as if it were all of it: told by its name, or by the shapes of its tensors."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...tokens.manifest import TensorSpec
from ..errors import PartOfModelError, read_json, shorten
from ..file_names import SHARD, is_weight_name, part_of
from .layouts import JOIN, MEGATRON_FILES, MEGATRON_FOLDER, RANK_FOLDER, list_files, megatron_files


VOCABULARY = re.compile(r"(^|\.)(embed_tokens|vocab_embedding|wte|tok_embeddings)\.weight$")
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
    if RANK_FOLDER.fullmatch(folder.name):
        ranks = [other.name for other in folder.parent.iterdir() if RANK_FOLDER.fullmatch(other.name)]
        if len(ranks) > 1:
            reason = f"is one of {len(ranks)} parts of a model ({', '.join(sorted(ranks)[:4])})"
            raise PartOfModelError(path, reason, JOIN)
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


def refuse_cut(
    source: object,
    specs: Mapping[str, TensorSpec],
    folder: Path | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Refuses what the shapes and names of tensors, or the config beside them, show to be one of several parts.

    These are flattened parameters of FSDP, one `consolidated.NN.pth` of Llama, whose embedding (Llama 1 and 2) or
    whose attention's output (Llama 3) is too narrow, and one rank of TensorRT-LLM or of a vocabulary that was cut.

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
    output = specs.get("layers.0.attention.wo.weight")
    if norm and output and len(output.shape) == 2 and output.shape[1] not in (norm.numel, attention_width(folder)):
        world, rest = divmod(norm.numel, output.shape[1])  # heads may have a width of their own, as in Mistral Nemo
        if not rest and world > 1:
            reason = (
                f"is one of {world} parts of a model: its attention gives {output.shape[1]} of {norm.numel} numbers"
            )
            raise PartOfModelError(source, reason, "Pass the folder that has all consolidated.NN.pth")
    config = config or {}
    mapping = config.get("mapping")
    world = mapping.get("world_size") if isinstance(mapping, dict) else None
    rows = config.get("vocab_size")
    table = next((spec for name, spec in specs.items() if VOCABULARY.search(name) and len(spec.shape) == 2), None)
    if table and not (isinstance(world, int) and world > 1) and isinstance(rows, int) and 0 < table.shape[0] < rows:
        world = (
            rows // table.shape[0] if rows % table.shape[0] == 0 and config.get("hidden_size") == table.shape[1] else 1
        )
        world = world if world in (2, 4, 8, 16, 32) else 1
    if isinstance(world, int) and world > 1:
        reason = f"is one of {world} parts of a model, as its config says"
        raise PartOfModelError(source, reason, JOIN)


def attention_width(folder: Path | None) -> int | None:
    """The width of the heads together that Llama's `params.json` states."""
    path = folder / "params.json" if folder else None
    if path is None or not path.is_file():
        return None
    said = read_json(path, "params.json", unique_keys=False)
    heads, size = (said.get(name) for name in ("n_heads", "head_dim")) if isinstance(said, dict) else (None, None)
    return heads * size if type(heads) is int and type(size) is int else None
