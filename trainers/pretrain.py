"""The pretraining command: `accelerate launch -m trainers.pretrain --config tiny --dataset DIR --output_dir OUT`."""

from __future__ import annotations

import logging
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerate
import datasets
import torch
import transformers
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin

from hf_wsl.errors import one_line
from hf_wsl.files import write_json
from hf_wsl.options import ConfigError, parse, run_command, set_log_level
from modeling_wsl import WSLConfig, WSLForPreTraining
from modeling_wsl.codes.registry import code_of
from modeling_wsl.feature_extraction_wsl import WSLFeatureExtractor
from modeling_wsl.generation.latent_prior import PRIOR_FILE

from .checkpointing import publish_files, read_state, save_model
from .data.windows.training_batches import StoredBatches
from .data.windows.window_data import WindowDataset
from .distribution import check_distribution, refuse_deepspeed, whole_weights
from .pretraining.fit_prior import fit_and_save_prior
from .pretraining.pretrain_config import PretrainConfig
from .pretraining.pretrain_setup import (
    FACTS_FILE,
    check_tokens,
    find_checkpoint,
    linear_start,
    load_splits,
    make_deterministic,
    make_model,
    open_dataset,
    prepare_folder,
    size_of,
)
from .pretraining.pretrain_trainer import PretrainTrainer
from .pretraining.validation import Validation


logger = logging.getLogger(__name__)
PROGRAM = "hf-wsl pretrain"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command with these arguments (`sys.argv` by default) and returns the run's facts (see `pretrain`)."""
    config = parse(PretrainConfig, sys.argv[1:] if argv is None else argv, program=PROGRAM)
    set_log_level()
    return pretrain(config)


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Trains a backbone; when it is finished, `config.output_dir` itself loads with `from_pretrained`.

    Returns:
        The content of training_facts.json: config, versions, steps, tokens seen, wall time, R2 and baselines, status
        ("completed", "out of time", "interrupted").

    Raises:
        ConfigError, DatasetError, CheckpointStateError: before training, naming the option, row or folder.
        NonFiniteLossError: during training; the last good checkpoint is kept.
    """
    config.require_paths()
    output_dir = Path(config.output_dir)
    trackers = [name for name in config.trackers if name not in ("jsonl", "none")]
    installed = {str(tracker) for tracker in get_available_trackers()}
    for name in trackers:
        if name not in installed:
            raise ConfigError(
                f"option 'report_to': {name} is not installed. Run `pip install {name}`, or leave it out"
            )
    refuse_deepspeed()
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            cpu=config.use_cpu,
            log_with=trackers or None,
            project_dir=config.output_dir,
            # The trainer weights its forward passes itself; a number from `accelerate config` would divide them again.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
    except ValueError as error:  # for example bfloat16 on a GPU that has none
        raise ConfigError(f"accelerate refuses these options: {error}") from error
    check_distribution(accelerator)
    config = config.for_processes(accelerator.num_processes)
    make_deterministic(config)
    checkpoint = find_checkpoint(config)
    source, commit = open_dataset(config, checkpoint, accelerator)
    model = make_model(config, checkpoint)
    with accelerator.local_main_process_first():  # of each node: it fetches, the others find it in the cache
        feature_extractor = source.feature_extractor()
        train, held_out = load_splits(source, config, model.config.window_size)
    check_tokens(model.config, feature_extractor, train)
    if held_out is not None:
        check_tokens(model.config, feature_extractor, StoredBatches(held_out))
    baselines: dict[str, float] = {}
    if checkpoint is not None:
        baselines = read_state(checkpoint)["baselines"]
    elif accelerator.is_main_process:
        # Processes agree on the model without fitting it each: DistributedDataParallel broadcasts from this one.
        baselines = linear_start(config, model, train, held_out)
    validation = None
    if held_out is not None:
        batch_size = config.eval_batch_size or config.batch_size
        validation = Validation(accelerator, held_out, model.config.window_size, batch_size, config.max_eval_windows)
    trainer = PretrainTrainer(
        config, accelerator, model, train, validation, feature_extractor, baselines, checkpoint, commit
    )
    if accelerator.is_main_process:  # only now, when nothing is left that could refuse the run
        prepare_folder(config, checkpoint)
    accelerator.wait_for_everyone()
    describe(accelerator, model, held_out, trainer)
    try:
        status = trainer.train()
        facts = facts_of(config, status, trainer, held_out)
        if status != "interrupted":
            save_finished(accelerator, model, feature_extractor, output_dir, config.save_dtype)
        if accelerator.is_main_process:
            write_json(output_dir / FACTS_FILE, facts)
            if status != "interrupted":
                save_prior(config, model.config, commit, accelerator.device)
        accelerator.wait_for_everyone()
    finally:
        accelerator.end_training()
    return facts


def facts_of(
    config: PretrainConfig, status: str, trainer: PretrainTrainer, held_out: WindowDataset | None
) -> dict[str, Any]:
    """What a card or a table may say about the run."""
    model, size, history = trainer.unwrapped, trainer.batches.size, trainer.r2_history
    none = {"step": None, "val_r2": None}
    last, best = (history[-1], max(history, key=lambda line: line["val_r2"])) if history else (none, none)
    return {
        "status": status,
        "size": size_of(model.config),
        "parameters": model.num_parameters(),
        "seed": config.seed,
        "steps": trainer.step,
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
        "config": config.to_dict(),
        "model_config": {key: value for key, value in model.config.to_diff_dict().items() if key != "auto_map"},
    }


def describe(
    accelerator: Accelerator,
    model: WSLForPreTraining,
    held_out: WindowDataset | None,
    trainer: PretrainTrainer,
) -> None:
    """Says in the log what is about to run."""
    if not accelerator.is_main_process:
        return
    validation = "no validation" if held_out is None else f"{int(held_out.num_tokens.sum())} validation tokens"
    logger.info(
        "%.3g M parameters; %d windows, %d tokens, %s; steps %d to %d of %d windows; %d process(es) on %s",
        model.num_parameters() / 1e6,
        trainer.batches.size.windows,
        trainer.batches.size.tokens,
        validation,
        trainer.step,
        trainer.total_steps,
        trainer.windows_per_step,
        accelerator.num_processes,
        accelerator.device.type,
    )


def save_finished(
    accelerator: Accelerator,
    model: WSLForPreTraining,
    feature_extractor: WSLFeatureExtractor,
    output_dir: Path,
    dtype: str,
) -> None:
    """Writes the finished model into the output folder itself, in the dtype it is to be shared in.

    Every process must call it: they may each hold a part of the model.
    """
    model = model.to(getattr(torch, dtype))
    weights = whole_weights(accelerator, model)
    if not accelerator.is_main_process:
        return
    partial = output_dir / ".partial-model"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_model(partial, model, feature_extractor, weights)
    publish_files(partial, output_dir)


def save_prior(config: PretrainConfig, model_config: WSLConfig, commit: str | None, device: torch.device) -> None:
    """Fits the prior over latents beside the finished weights; one of an earlier run in the same folder goes.

    The backbone is whole without a prior: what stands in its way is a warning.
    """
    (Path(config.output_dir) / PRIOR_FILE).unlink(missing_ok=True)
    if config.streaming or not config.prior_tokens or not code_of(model_config).by_token:
        return
    options = {"max_tokens": config.prior_tokens, "batch_size": config.batch_size, "device": device}
    try:
        fit_and_save_prior(config.output_dir, config.dataset, dataset_revision=commit, **options)
    except (ValueError, torch.OutOfMemoryError) as error:
        logger.warning("no prior over latents was fitted: %s", one_line(error))


def versions() -> dict[str, str]:
    modules = (torch, transformers, accelerate, datasets)
    return {"python": platform.python_version(), **{module.__name__: module.__version__ for module in modules}}


def run(argv: Sequence[str] | None = None) -> int:
    """`main` for a shell, see `run_command`."""
    return run_command(PretrainConfig, train, argv, program=PROGRAM)


def train(config: PretrainConfig) -> None:
    """`pretrain` for a command that prints nothing."""
    pretrain(config)


if __name__ == "__main__":
    sys.exit(run())
