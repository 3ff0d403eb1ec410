"""The fine-tuning command: `hf-wsl finetune --model FOLDER --data.images DIR --output_dir OUT`, or with `accelerate
launch -m trainers.finetune` on several processes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedTokenizerBase

from hf_wsl.command_line import parse, run_command, set_log_level
from hf_wsl.errors import one_line
from hf_wsl.files import write_json
from hf_wsl.options import build
from modeling_wsl.checkpoints.checkpoint import open_checkpoint
from modeling_wsl.generation.generated_model import package_versions
from modeling_wsl.generation.targets import Target, resolve_target

from .checkpointing import finished_model
from .data.data_config import ImageDataConfig, TextDataConfig
from .data.images.image_data import ImageSplits, load_images
from .data.text_data import TextSplits, load_text
from .finetuning.finetune_options import RESULT_FILE, FinetuneCommandOptions
from .finetuning.finetune_trainer import finetune, measure
from .finetuning.tasks import CAUSAL_LANGUAGE_MODELING, IMAGE_CLASSIFICATION, Task


PROGRAM = "hf-wsl finetune"
TASKS = {task.name: task for task in (IMAGE_CLASSIFICATION, CAUSAL_LANGUAGE_MODELING)}
logger = logging.getLogger(__name__)


def finetune_model(config: FinetuneCommandOptions) -> dict[str, Any]:
    """Trains a model and measures it on the test split once, at the end; `output_dir` then loads with its own library.

    Started again after an interruption, it goes on from the last checkpoint.

    Returns:
        The content of finetuning.json: config, versions, facts of the data, history, test.

    Raises:
        ValueError: data, model and classes do not fit; said before any training.
        CheckpointStateError: `output_dir` holds another run.
        DivergedError: the loss is not finite.
    """
    task, output_dir = TASKS[config.task], Path(config.output_dir)
    state = PartialState(cpu=config.use_cpu)
    with state.local_main_process_first():  # it decodes, the others find that in the cache
        data = load_data(config)
    target, model = load_model(config, data)
    check_fit(task, model, data)
    history = finetune(
        model,
        data.train,
        data.validation,
        config.training,
        progress=logger.isEnabledFor(logging.INFO),
        task=task,
        output_dir=output_dir,
        save_steps=config.save_steps,
    )
    test = measure(
        model,
        data.test,
        task,
        batch_size=config.per_device_eval_batch_size,
        use_cpu=config.use_cpu,
    )
    result = {
        "task": task.name,
        "model": config.model,
        "library": target.library,
        "config": asdict(config),
        "processes": state.num_processes,
        "versions": package_versions(),
        "data": data.facts(),
        "history": [asdict(measurement) for measurement in history],
        "test": test,
    }
    if state.is_main_process:
        save_finetuned(target, model, output_dir, data.tokenizer if isinstance(data, TextSplits) else None)
        write_json(output_dir / RESULT_FILE, result)
    state.wait_for_everyone()
    return result


def load_data(config: FinetuneCommandOptions) -> ImageSplits | TextSplits:
    """The data that the options `data.*` describe. Raises ConfigError on an unknown one."""
    if config.task == IMAGE_CLASSIFICATION.name:
        return load_images(build(ImageDataConfig, ("option 'data'", config.data)))
    return load_text(build(TextDataConfig, ("option 'data'", config.data)))


def load_model(config: FinetuneCommandOptions, data: ImageSplits | TextSplits) -> tuple[Target, nn.Module]:
    """The model to train and how its library saves it.

    Raises:
        ValueError: no such model, or weights that are not those of its architecture.
    """
    source, options, sizes = config.model, dict(config.target_kwargs), {}
    revision = {} if config.model_revision is None else {"revision": config.model_revision}
    if isinstance(data, ImageSplits) and (config.from_scratch or config.new_head):
        sizes["num_classes"] = data.num_classes
    if isinstance(data, ImageSplits) and config.from_scratch:
        sizes["in_channels"] = data.config.channels
    if isinstance(data, TextSplits) and config.from_scratch and source in CONFIG_MAPPING:
        source = _language_model(source, options, data.tokenizer)
        options = {}
    target = resolve_target(source, target_kwargs=options, **sizes, **revision)
    model = target.build(config.seed)
    if config.from_scratch:
        return target, model
    with open_checkpoint(config.model, **revision) as checkpoint:
        weights = checkpoint.state_dict()
    kept = {name: value for name, value in weights.items() if not (config.new_head and name in target.head)}
    try:
        missing, unexpected = model.load_state_dict(kept, strict=False)
    except RuntimeError as error:
        raise ValueError(f"The weights of '{config.model}' do not fit: {one_line(error)}") from error
    # transformers stores a tied tensor once, under one of its names.
    held = {target.tied.get(name, name) for name in kept}
    missing = {name for name in missing if target.tied.get(name, name) not in held}
    missing -= target.head if config.new_head else set()
    if missing or unexpected:
        raise ValueError(
            f"'{config.model}' does not hold the weights of its architecture: it lacks {sorted(missing)[:3]} and has "
            f"{sorted(unexpected)[:3]} too many. Give the folder of a whole model, or --from_scratch."
        )
    return target, model


def _language_model(name: str, options: dict[str, Any], tokenizer: PreTrainedTokenizerBase):
    """The config of a causal language model by its transformers name ("gpt2")."""
    kind = CONFIG_MAPPING[name]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"'{name}' has no causal language model in transformers; take gpt2, llama, ...")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return kind(architectures=[MODEL_FOR_CAUSAL_LM_MAPPING[kind].__name__], **{**ends, **options})


def check_fit(task: Task, model: nn.Module, data: ImageSplits | TextSplits) -> None:
    """Raises ValueError where the model's classes are not those of the data, or it cannot take an example."""
    batch = torch.utils.data.default_collate([data.validation[0]])
    classes = task.num_classes(model, batch)
    if isinstance(data, ImageSplits) and classes != data.num_classes:
        raise ValueError(
            f"The model has {classes} classes, '{data.config.images}' has {data.num_classes}. Give it a new "
            "classifier with --new_head."
        )
    if isinstance(data, TextSplits) and classes < data.vocab_size:
        raise ValueError(
            f"The tokenizer has {data.vocab_size} tokens, the model's vocabulary {classes}. Use the tokenizer that "
            "belongs to the model (--data.tokenizer), or a model with a larger vocab_size."
        )


def save_finetuned(
    target: Target, model: nn.Module, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Writes what the target's own library loads into an existing folder, config.json last."""
    with finished_model(folder) as partial:
        target.save(model.cpu().state_dict(), partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        for path in partial.iterdir():
            path.chmod(0o644)  # safetensors leaves weight files readable by their owner only


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command with these arguments (`sys.argv` by default); see `finetune_model`."""
    config = parse(FinetuneCommandOptions, sys.argv[1:] if argv is None else argv, program=PROGRAM)
    set_log_level()
    return finetune_model(config)


def train(config: FinetuneCommandOptions) -> list[str]:
    """`finetune_model`, and a line about the result."""
    result = finetune_model(config)
    figures = ", ".join(f"{name} {value:.4g}" for name, value in result["test"].items())
    return [f"{config.output_dir}: test {figures}"]


def run(argv: Sequence[str] | None = None) -> int:
    """`main` for a shell, see `run_command`."""
    return run_command(FinetuneCommandOptions, train, argv, program=PROGRAM)


if __name__ == "__main__":
    sys.exit(run())
