"""A pretraining run from the options to the finished model."""

from __future__ import annotations

import logging
import platform
from pathlib import Path
from typing import Any

import accelerate
import datasets
import torch
import transformers
from accelerate import PartialState

from hf_wsl.files import write_json

from ..checkpointing import finished_model, read_state, save_model
from ..data.windows.training_batches import StoredBatches
from ..data.windows.window_data import WindowDataset
from ..distribution import is_sharded
from ..run_trainer import INTERRUPTED
from .pretrain_options import PretrainOptions
from .pretrain_setup import (
    FACTS_FILE,
    check_tokens,
    find_checkpoint,
    linear_start,
    load_splits,
    make_deterministic,
    make_model,
    open_dataset,
    prepare_folder,
    resolved,
    size_of,
)
from .pretrain_trainer import PretrainTrainer


logger = logging.getLogger(__name__)


def pretrain(options: PretrainOptions) -> dict[str, Any]:
    """Trains a backbone; when it is finished, `options.output_dir` itself loads with `from_pretrained`.

    Returns:
        The content of training_facts.json: config, versions, steps, tokens seen, wall time, R2 and baselines, status
        ("completed", "out of time", "interrupted").

    Raises:
        ConfigError, DatasetError, CheckpointStateError: before training, naming the option, row or folder.
        NonFiniteLossError: during training; the last good checkpoint is kept.
    """
    options.require_paths()
    checkpoint = find_checkpoint(options)
    config = resolved(options, checkpoint)
    make_deterministic(config)
    state = PartialState()
    source, commit = open_dataset(config, checkpoint)
    model = make_model(config, checkpoint)
    with state.local_main_process_first():  # of each node: it fetches, the others find it in the cache
        feature_extractor = source.feature_extractor()
        train, held_out = load_splits(source, config, model.config.window_size)
    check_tokens(model.config, feature_extractor, train)
    if held_out is not None:
        check_tokens(model.config, feature_extractor, StoredBatches(held_out))
    baselines: dict[str, float] = {}
    if checkpoint is not None:
        baselines = read_state(checkpoint)["baselines"]
    elif state.is_main_process:
        # Processes agree on the model without fitting it each: DistributedDataParallel broadcasts from this one.
        baselines = linear_start(config, model, train, held_out)
    trainer = PretrainTrainer(
        model, config, train, held_out, feature_extractor, baselines=baselines, dataset_commit=commit
    )
    if state.is_main_process:  # only now, when nothing is left that could refuse the run
        prepare_folder(config, checkpoint)
    state.wait_for_everyone()
    describe(trainer, held_out, 0 if checkpoint is None else read_state(checkpoint)["step"])
    trainer.train(checkpoint)
    facts = facts_of(trainer, held_out)
    finished = trainer.status != INTERRUPTED
    if finished:
        save_finished(trainer, Path(config.output_dir))
    if state.is_main_process:
        write_json(Path(config.output_dir) / FACTS_FILE, facts)
    state.wait_for_everyone()
    if finished and config.push_to_hub:
        trainer.push_to_hub(commit_message="End of training")
    trainer.accelerator.end_training()
    return facts


def facts_of(trainer: PretrainTrainer, held_out: WindowDataset | None) -> dict[str, Any]:
    """What a card or a table may say about the run."""
    size, history = trainer.train_dataset.size, trainer.r2_history
    none = {"step": None, "val_r2": None}
    last, best = (history[-1], max(history, key=lambda line: line["val_r2"])) if history else (none, none)
    return {
        "status": trainer.status,
        "size": size_of(trainer.config),
        "parameters": trainer.num_parameters,
        "seed": trainer.args.seed,
        "steps": trainer.state.global_step,
        "total_steps": trainer.total_steps,
        "windows_per_step": trainer.windows_per_step,
        "tokens_seen": trainer.tokens_seen,
        "seconds": round(trainer.seconds, 1),
        "dataset_commit": trainer.dataset_commit,
        "train_windows": size.windows,
        "train_tokens": size.tokens,
        "validation_tokens": 0 if held_out is None else int(held_out.num_tokens.sum()),
        "val_r2": last["val_r2"],
        "val_r2_step": last["step"],
        "best_val_r2": best["val_r2"],
        "best_val_r2_step": best["step"],
        "val_r2_history": history,
        "baselines": trainer.baselines,
        "processes": trainer.accelerator.num_processes,
        "distribution": trainer.accelerator.distributed_type.value,
        "device": trainer.accelerator.device.type,
        "versions": versions(),
        "config": trainer.args.to_dict(),
        "model_config": {key: value for key, value in trainer.config.to_diff_dict().items() if key != "auto_map"},
    }


def describe(trainer: PretrainTrainer, held_out: WindowDataset | None, step: int) -> None:
    """Says in the log what is about to run."""
    if not trainer.is_world_process_zero():
        return
    validation = "no validation" if held_out is None else f"{int(held_out.num_tokens.sum())} validation tokens"
    logger.info(
        "%.3g M parameters; %d windows, %d tokens, %s; steps %d to %d of %d windows; %d process(es) on %s",
        trainer.num_parameters / 1e6,
        trainer.train_dataset.size.windows,
        trainer.train_dataset.size.tokens,
        validation,
        step,
        trainer.total_steps,
        trainer.windows_per_step,
        trainer.accelerator.num_processes,
        trainer.accelerator.device.type,
    )


def save_finished(trainer: PretrainTrainer, output_dir: Path) -> None:
    """Writes the finished model into the output folder itself, in the dtype it is to be shared in.

    Every process must call it: they may each hold a part of the model.
    """
    model = trainer.model.to(getattr(torch, trainer.args.save_dtype))
    weights = trainer.accelerator.get_state_dict(model) if is_sharded(trainer.accelerator) else None
    if not trainer.is_world_process_zero():
        return
    with finished_model(output_dir) as partial:
        save_model(partial, model, trainer.processing_class, weights)


def versions() -> dict[str, str]:
    modules = (torch, transformers, accelerate, datasets)
    return {"python": platform.python_version(), **{module.__name__: module.__version__ for module in modules}}
