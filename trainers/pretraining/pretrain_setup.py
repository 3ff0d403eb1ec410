"""What a pretraining run starts from: seeds, checkpoint, model, tokenizer settings, windows, baselines."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, set_seed
from huggingface_hub.errors import StrictDataclassError

from datasets_scripts.embedding.linear_projection import random_projection
from hf_wsl.errors import one_line
from hf_wsl.files import remove_folder, write_text
from hf_wsl.options import ConfigError, nearest
from modeling_wsl import WSLConfig, WSLForPreTraining
from modeling_wsl.configuration_wsl import SIZES
from modeling_wsl.feature_extraction_wsl import WSLFeatureExtractor
from modeling_wsl.loading import find_backbone

from ..checkpointing import checkpoint_step, last_checkpoint, list_checkpoints, read_state
from ..data.windows.dataset_source import DatasetSource, SplitSize
from ..data.windows.training_batches import StoredBatches, StreamedBatches, TrainingBatches
from ..data.windows.window_data import WindowDataset
from ..data.windows.window_table import DatasetError
from .baselines import evaluate, fit_pca
from .pretrain_config import PretrainConfig
from .pretrain_options import PretrainOptions


logger = logging.getLogger(__name__)
FACTS_FILE, CONFIG_FILE = "training_facts.json", "pretrain_config.yaml"
FINISHED_FILES = (
    "config.json",
    "preprocessor_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    FACTS_FILE,
)


def make_deterministic(config: PretrainConfig) -> None:
    """Seeds every generator and, by option, asks torch for kernels that give the same bytes each time."""
    set_seed(config.seed)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a memset per tensor


def find_checkpoint(config: PretrainOptions) -> Path | None:
    """The checkpoint to resume from, or None for a fresh run.

    Raises:
        ConfigError: output_dir holds checkpoints that the options neither resume nor overwrite; both are asked for.
        CheckpointStateError: the named checkpoint cannot be resumed from.
    """
    newest = last_checkpoint(config.output_dir)
    facts = Path(config.output_dir) / FACTS_FILE
    if config.resume_from_checkpoint is None:
        if (newest is not None or facts.is_file()) and not config.overwrite_output_dir:
            raise ConfigError(
                f"output_dir {config.output_dir} holds {(newest or facts).name}. Go on with --resume_from_checkpoint "
                "latest, start over with --overwrite_output_dir, or choose another folder"
            )
        return None
    if config.overwrite_output_dir:
        raise ConfigError("--resume_from_checkpoint and --overwrite_output_dir contradict each other; drop one")
    if config.resume_from_checkpoint == "latest":
        if newest is None:
            logger.info("no checkpoint in %s yet: starting at step 0", config.output_dir)
        return newest
    named = Path(config.resume_from_checkpoint)
    read_state(named)
    if newest is not None and newest.parent.resolve() != named.parent.resolve():
        raise ConfigError(
            f"output_dir {config.output_dir} holds {newest.name}, which {named} has no part in. Go on with "
            "--resume_from_checkpoint latest, or choose another folder"
        )
    return named


def prepare_folder(config: PretrainConfig, checkpoint: Path | None) -> None:
    """Makes output_dir with the resolved options in it, without what would be taken for a part of this run.

    A fresh run deletes the checkpoints and the finished model of an earlier one; a resumed run deletes the checkpoints
    after its own: `latest` would go on from them.
    """
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    step = 0 if checkpoint is None else read_state(checkpoint)["step"]
    for later in [folder for folder in list_checkpoints(output_dir) if checkpoint_step(folder) > step]:
        logger.warning("deleting %s: the run starts over from step %d", later, step)
        remove_folder(later)
    if checkpoint is None and (output_dir / FACTS_FILE).is_file():
        logger.warning("deleting the finished model of an earlier run in %s", output_dir)
        for pattern in FINISHED_FILES:
            for file in output_dir.glob(pattern):
                file.unlink()
    write_text(output_dir / CONFIG_FILE, config.to_yaml())


def make_model(config: PretrainConfig, checkpoint: Path | None) -> WSLForPreTraining:
    """The model in float32: from a checkpoint, from `model_name_or_path`, or fresh, drawn from the seed."""
    attention = {} if config.attn_implementation is None else {"attn_implementation": config.attn_implementation}
    known = set(WSLConfig().to_dict())
    for name in config.model:
        if name not in known:
            raise ConfigError(f"option 'model' has no field '{name}'.{nearest(name, known)}")
    source = checkpoint or config.model_name_or_path
    if source is None:
        try:
            wsl_config = WSLConfig.from_size(config.size, **config.model)
        except (ValueError, StrictDataclassError) as error:
            raise ConfigError(f"options 'size' and 'model': {one_line(error)}") from error
        torch.manual_seed(config.seed)
        return WSLForPreTraining._from_config(wsl_config, **attention)
    if checkpoint is not None:
        stored = WSLConfig.from_pretrained(checkpoint)
        for name, value in config.model.items():
            if getattr(stored, name) != value:
                raise ConfigError(
                    f"option 'model.{name}' is {value}, but {checkpoint} was trained with {getattr(stored, name)}"
                )
        return WSLForPreTraining.from_pretrained(checkpoint, dtype=torch.float32, **attention)
    try:
        name, commit = find_backbone(source, revision=config.model_revision)
        return WSLForPreTraining.from_pretrained(
            name, revision=commit or "main", dtype=torch.float32, **attention, **config.model
        )
    except (OSError, ValueError, RuntimeError, StrictDataclassError) as error:  # RuntimeError: shapes that do not fit
        raise ConfigError(f"options 'model_name_or_path' ({source}) and 'model': {one_line(error)}") from error


def size_of(config: WSLConfig) -> str | None:
    """The name of the size with these widths and depths, or None where the options made a size of their own."""
    dimensions = ("hidden_size", "num_hidden_layers", "num_attention_heads", "latent_size")
    for name in SIZES:
        size = WSLConfig.from_size(name)
        if all(getattr(size, key) == getattr(config, key) for key in dimensions):
            return name
    return None


def open_dataset(config: PretrainConfig, checkpoint: Path | None) -> tuple[DatasetSource, str | None]:
    """The dataset, and the commit that all processes read where it lies on the Hub: the checkpoint's, if it has one.

    Raises:
        ConfigError: a revision of a folder.
        DatasetError: there is no such dataset or revision, or it may not be read.
    """
    state = {} if checkpoint is None else read_state(checkpoint)
    same = all(state.get("config", {}).get(name) == getattr(config, name) for name in ("dataset", "dataset_revision"))
    commit = [state.get("dataset_commit") if same else None]
    if PartialState().is_main_process and commit == [None]:
        commit = [DatasetSource(config.dataset, config.dataset_revision).commit()]
    broadcast_object_list(commit)
    source = DatasetSource(config.dataset, commit[0] or config.dataset_revision)
    if source.folder is not None and config.dataset_revision is not None:
        raise ConfigError(f"option 'dataset_revision' is for datasets on the Hub, and '{config.dataset}' is a folder")
    return source, commit[0]


def check_tokens(config: WSLConfig, feature_extractor: WSLFeatureExtractor, windows: TrainingBatches) -> None:
    """Raises DatasetError where the dataset's tokens are not the ones that the model takes."""
    cut = {name: getattr(feature_extractor, name) for name in ("tokenization", "position_unit")}
    for name, value in {"token_size": windows.token_size, **cut}.items():
        expected = getattr(config, name)
        if value != expected:
            raise DatasetError(
                f"the dataset's {name} is {value}, the model's {expected}. Train with --model.{name} {value}, or "
                f"tokenize with {name} {expected}"
            )
    if config.position_encoding == "learned":
        windows.check_positions(config.max_positions)
    if feature_extractor.token_size != windows.token_size:
        raise DatasetError(
            f"preprocessor_config.json says token_size {feature_extractor.token_size}, the windows hold "
            f"{windows.token_size}. It belongs to another dataset"
        )


def load_splits(
    source: DatasetSource, config: PretrainConfig, window_size: int
) -> tuple[TrainingBatches, WindowDataset | None]:
    """The training windows, on the disk or as a stream, and the validation windows.

    Raises:
        DatasetError: they cannot be read, contradict themselves, or there is no validation split and one is asked for.
    """
    if config.streaming:
        sizes = source.sizes()
        validation = source.validation(sizes.get("validation", SplitSize()), config.max_eval_windows)
        return StreamedBatches(source.stream(), sizes["train"]), validation_windows(validation, config)
    splits = source.load()
    train = WindowDataset(splits["train"], pad_to=window_size, split="train")
    return StoredBatches(train), validation_windows(splits.get("validation"), config)


def validation_windows(rows: datasets.Dataset | None, config: PretrainConfig) -> WindowDataset | None:
    """The validation split, or None (with a warning) where the dataset has none and none is asked for."""
    if rows is not None and len(rows):
        return WindowDataset(rows, split="validation")
    if config.eval_steps:
        raise DatasetError(
            f"dataset '{config.dataset}' has no validation windows, and eval_steps is {config.eval_steps}. Tokenize "
            "with a validation share, or train blind with --eval_steps 0"
        )
    logger.warning("dataset '%s' has no validation windows: no R2 will be measured", config.dataset)
    return None


def linear_start(
    config: PretrainConfig, model: WSLForPreTraining, train: TrainingBatches, held_out: WindowDataset | None
) -> dict[str, float]:
    """Gives PCA to the model's linear path where it has one, and scores both baselines on held-out tokens."""
    latent_size = model.config.latent_size
    starts_linear = model.config.linear_path and config.model_name_or_path is None
    if not config.baseline_tokens or not (starts_linear or held_out is not None):
        return {}
    pca = fit_pca(train, latent_size, config.baseline_tokens)
    if starts_linear:
        affine = model.config.token_standardization
        start = pca if affine else fit_pca(train, latent_size, config.baseline_tokens, affine=False)
        rank = latent_size - model.config.num_token_statistics
        if len(start.components) < rank:
            raise ConfigError(
                f"linear_path starts at PCA, which has {len(start.components)} directions for tokens of "
                f"{train.token_size}; latent_size {latent_size} is larger. Set --model.linear_path false or a smaller "
                "--model.latent_size"
            )
        model.wsl.initialize_linear_path(start.components[:rank], start.mean)  # the leading directions of those
    if held_out is None:
        return {}
    lines = {"random projection": random_projection(latent_size, train.token_size, config.seed), "PCA": pca}
    return evaluate(lines, held_out, config.max_eval_windows)


def resolved(options: PretrainOptions, checkpoint: Path | None) -> PretrainConfig:
    """TrainingArguments of these options; a resumed run keeps the precision that `auto` chose at its beginning."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    if checkpoint is not None and options.precision == "auto":
        values["precision"] = read_state(checkpoint)["config"]["precision"]
    config = PretrainConfig(**values)
    config.more = {
        field.name: values[field.name]
        for field in dataclasses.fields(options)[len(dataclasses.fields(PretrainOptions)) :]
        if values[field.name] != field.default and not field.name.endswith("_token")
    }
    return config
