"""The work of each kind of step, by the functions that the commands call. A step is done when it has a record."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from time import monotonic
from typing import Any

import pyarrow.parquet as pq
from transformers import AutoConfig

from datasets_scripts.collect.collect import collect
from datasets_scripts.collect.config import CollectConfig
from datasets_scripts.sources import ZOO_MODELS, ZOO_TABLE
from datasets_scripts.tokenize import tokenize
from datasets_scripts.tokenize_config import TokenizeConfig
from hf_wsl.options import build
from hf_wsl.run_folder import RunFolder
from hf_wsl.workers import one_thread
from modeling_wsl import WSLConfig, WSLFeatureExtractor
from modeling_wsl.checkpoints.checkpoint import open_checkpoint
from modeling_wsl.generation.targets import Target, resolve_target
from modeling_wsl.loading import load_pipeline

from ..data.images.image_data import ImageDataConfig, ImageSplits, load_images
from ..data.text_data import TextDataConfig, TextSplits, load_text
from ..evaluation.evaluate import evaluate
from ..evaluation.evaluate_config import EvaluateConfig
from ..evaluation.weight_comparison import compare_kinds
from ..finetuning.finetune_options import FinetuneOptions
from ..finetuning.finetune_trainer import finetune, measure
from ..finetuning.tasks import CAUSAL_LANGUAGE_MODELING, IMAGE_CLASSIFICATION
from ..pretrain import pretrain, versions
from ..pretraining.pretrain_options import PretrainOptions
from ..probing.probe import probe
from ..probing.probe_config import ProbeConfig
from ..zoo.build_zoo import build_zoo
from ..zoo.zoo_config import ZooConfig
from .plan import BACKBONE, EVALUATION, MODEL, PROBE, RECONSTRUCTION, TOKENS, ZOO, Step


PROBE_FILE = "probe.json"
OWN_WORKERS = (ZOO, TOKENS)  # have worker processes of their own; those steps are done one by one


def work_folder(work_dir: Path) -> RunFolder:
    """The folder of all steps. The name of a step's folder follows from its settings, so that it has none itself."""
    return RunFolder(work_dir, "a reproduction", records=".")


def is_done(step: Step, work_dir: Path) -> bool:
    return work_folder(work_dir).is_done(_record(step))


def read_record(step: Step, work_dir: Path) -> dict[str, Any]:
    """The record of a finished step: its settings, seconds, versions and outcome."""
    return work_folder(work_dir).read_record(_record(step))


def _record(step: Step) -> str:
    return f"{step.folder}/step"


def step_config(step: Step, work_dir: Path, num_workers: int = 1) -> Any:
    """The options that the step's function is called with; None for a reconstruction, which has none.

    Raises:
        ConfigError, TokenizeError, ValueError: an option that is unknown or cannot be.
    """
    folder, settings = work_dir / step.folder, step.settings
    if step.kind == MODEL:
        return build(FinetuneOptions, (step.name, settings["training"]))
    if step.kind == ZOO:
        own = {"num_workers": num_workers, "output_dir": str(folder)}
        return build(ZooConfig, (step.name, {**settings["options"], **own}))
    if step.kind == TOKENS:
        cls, key = (CollectConfig, "collect") if "collect" in settings else (TokenizeConfig, "tokenize")
        return build(cls, (step.name, {**settings[key], "num_workers": num_workers}))
    if step.kind == BACKBONE:
        paths = {"dataset": str(work_dir / step.needs[0].folder), "output_dir": str(folder)}
        return PretrainOptions.from_yaml(
            settings["recipe"], **settings["options"], **paths, resume_from_checkpoint="latest"
        )
    if step.kind == EVALUATION:
        return build(EvaluateConfig, (step.name, _evaluation_options(step, work_dir, num_workers)))
    if step.kind == PROBE:
        return build(ProbeConfig, (step.name, _probe_options(step, work_dir, num_workers)))
    return None


def run_step(step: Step, work_dir: Path, num_workers: int) -> None:
    """Does one step and writes its record, the last file of its folder. A step that was interrupted goes on, or starts
    over where its function cannot go on."""
    start = monotonic()
    work = {
        MODEL: _train_model,
        ZOO: _train_zoo,
        TOKENS: _tokenize,
        BACKBONE: _pretrain,
        EVALUATION: _evaluate,
        RECONSTRUCTION: _reconstruct,
        PROBE: _probe,
    }[step.kind]
    outcome = work(step, work_dir, num_workers)
    record = {
        "kind": step.kind,
        "name": step.name,
        "settings": step.settings,
        "needs": [need.folder for need in step.needs],
        "seconds": round(monotonic() - start, 1),
        "versions": versions(),
        "outcome": outcome,
    }
    work_folder(work_dir).write_record(_record(step), record)


def check_data(steps: Sequence[Step]) -> None:
    """Opens the data of steps, so that an unreadable dataset is met before hours of work, and not after them."""
    for data in {json.dumps(step.settings["data"]) for step in steps if "data" in step.settings}:
        _load_data(data)
    for config in {step_config(step, Path()).data_config for step in steps if step.kind == ZOO}:
        load_images(config)


@dataclass(frozen=True)
class StepTask:
    """A step for a pool of processes."""

    step: Step
    work_dir: Path
    num_workers: int


def run_step_task(task: StepTask) -> str:
    """Does one step, on one thread (sums depend on their number), and returns its name."""
    workers = task.num_workers if task.step.kind in OWN_WORKERS else 1  # the pool has them
    with one_thread():
        run_step(task.step, task.work_dir, workers)
    return task.step.name


def _train_model(step: Step, work_dir: Path, num_workers: int) -> dict[str, Any]:
    folder, config = work_dir / step.folder, step_config(step, work_dir)
    task, splits = _load_data(json.dumps(step.settings["data"]))
    target = _target(step.settings["architecture"], splits)
    module = target.build(config.seed)
    history = finetune(module, splits.train, splits.validation, config, progress=False, task=task)
    test = measure(module, splits.test, task, batch_size=config.per_device_eval_batch_size, use_cpu=config.use_cpu)
    with work_folder(work_dir).replacing_folder(folder) as unfinished:
        target.save({name: value.cpu() for name, value in module.state_dict().items()}, unfinished)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return {"validation": history[-1].metrics, "test": test, "parameters": parameters, "data": splits.facts()}


def _train_zoo(step: Step, work_dir: Path, num_workers: int) -> dict[str, Any]:
    report = build_zoo(step_config(step, work_dir, num_workers))
    return {"members": report.members, "checkpoints": report.checkpoints, "diverged": report.diverged}


def _tokenize(step: Step, work_dir: Path, num_workers: int) -> dict[str, Any]:
    folder, config = work_dir / step.folder, step_config(step, work_dir, num_workers)
    if "collect" in step.settings:
        return collect(folder, config).numbers()
    zoo, properties = step.needed(ZOO), None
    if zoo:
        sources: list[Any] = [work_dir / zoo[0].folder / ZOO_MODELS]
        properties = pq.read_table(work_dir / zoo[0].folder / ZOO_TABLE)
    else:
        sources = [*step.settings["sources"], *(work_dir / need.folder for need in step.needs)]
    report = tokenize(sources, folder, config, properties=properties)
    return {
        "accepted": report.accepted,
        "refused": report.refused,
        "num_parameters": report.num_parameters,
        "num_tokens": report.num_tokens,
        "tokens_by_split": dict(report.tokens_by_split),
    }


def _pretrain(step: Step, work_dir: Path, num_workers: int) -> dict[str, Any]:
    facts = pretrain(step_config(step, work_dir))
    kept = ("size", "parameters", "steps", "train_tokens", "tokens_seen", "val_r2", "baselines", "seconds", "device")
    return {key: facts[key] for key in kept}


def _evaluate(step: Step, work_dir: Path, num_workers: int) -> dict[str, Any]:
    config = step_config(step, work_dir, num_workers)
    if not step.needed(BACKBONE):
        tokens = step.needed(TOKENS)
        sizes = {"latent_size": step.settings["latent_size"]} if tokens else {}
        _save_backbone_settings(Path(config.backbone), work_dir / tokens[0].folder if tokens else None, sizes)
    evaluation = evaluate(config)
    return {"arms": list(evaluation["arms"]), "skipped": evaluation["skipped"]}


def _reconstruct(step: Step, work_dir: Path, num_workers: int) -> dict[str, Any]:
    """The anchors through encoder and decoder without noise, by kind of layer beside the originals."""
    pipeline = load_pipeline("weight-generation", str(work_dir / step.needed(BACKBONE)[0].folder))
    pairs = []
    for anchor in _anchors(step, work_dir):
        model = pipeline(anchor, anchors=[anchor], bandwidth=0.0, progress=False)[0]
        pairs.append((model.instantiate(), open_checkpoint(anchor).state_dict(), model.provenance["tensors"]))
    return {"models": [Path(anchor).name for anchor in _anchors(step, work_dir)], "kinds": compare_kinds(pairs)}


def _probe(step: Step, work_dir: Path, num_workers: int) -> dict[str, Any]:
    probed = probe(step_config(step, work_dir, num_workers))
    return {"models": probed["models"], "skipped": probed["skipped"]}


def _probe_options(step: Step, work_dir: Path, num_workers: int) -> dict[str, Any]:
    zoo, backbones = step.needed(ZOO), step.needed(BACKBONE)
    return {
        "models": [str(work_dir / zoo[0].folder)] if zoo else list(step.settings["sources"]),
        "backbones": [f"{backbone.name}={work_dir / backbone.folder}" for backbone in backbones],
        "num_workers": num_workers,
        "output_dir": str(work_dir / step.folder),
        **step.settings["options"],
        "baselines": step.settings["baselines"],
    }


def _anchors(step: Step, work_dir: Path) -> list[str]:
    return [*step.settings["anchors"], *(str(work_dir / need.folder) for need in step.needed(MODEL))]


def _evaluation_options(step: Step, work_dir: Path, num_workers: int) -> dict[str, Any]:
    settings, folder, anchors = step.settings, work_dir / step.folder, _anchors(step, work_dir)
    backbone = step.needed(BACKBONE)
    # A language model that is trained here is known by its config alone, which its anchors carry.
    architecture = settings["architecture"]
    options = {
        "backbone": str(work_dir / backbone[0].folder if backbone else folder / "backbone_settings"),
        "target": architecture.get("target", anchors[0]),
        "target_kwargs": architecture.get("target_kwargs", {}),
        "anchors": anchors,
        "task": (CAUSAL_LANGUAGE_MODELING if _is_text(settings["data"]) else IMAGE_CLASSIFICATION).name,
        "arms": list(settings["arms"]),
        "data": _data_options(settings["data"]),
        "num_workers": num_workers,
        "cache_dir": str(work_dir / "cache"),
        "output_dir": str(folder),
        **settings["options"],
    }
    if step.needed(TOKENS):
        options["tokens"] = str(work_dir / step.needed(TOKENS)[0].folder)
    return options


def _is_text(data: Mapping[str, Any]) -> bool:
    return data["kind"] == "text"


def _data_options(data: Mapping[str, Any]) -> dict[str, Any]:
    return {data["kind"]: data["path"], **data["options"]}


@lru_cache(maxsize=2)
def _load_data(data: str) -> tuple[Any, ImageSplits | TextSplits]:
    """(task, splits) of a step's data, as JSON; kept, because many models are trained on the same."""
    data = json.loads(data)
    if _is_text(data):
        return CAUSAL_LANGUAGE_MODELING, load_text(build(TextDataConfig, ("texts", _data_options(data))))
    return IMAGE_CLASSIFICATION, load_images(build(ImageDataConfig, ("datasets", _data_options(data))))


def _target(architecture: Mapping[str, Any], splits: ImageSplits | TextSplits) -> Target:
    if "transformers" in architecture:
        return resolve_target(AutoConfig.for_model(**architecture["transformers"]))
    return resolve_target(
        architecture["target"],
        num_classes=splits.num_classes,
        target_kwargs=architecture.get("target_kwargs"),
    )


def _save_backbone_settings(folder: Path, tokens: Path | None, sizes: Mapping[str, int]) -> None:
    """Controls ask a backbone for its tokens and the number of its latents, and for no weights."""
    feature_extractor = WSLFeatureExtractor.from_pretrained(tokens) if tokens else WSLFeatureExtractor()
    config = WSLConfig(
        token_size=feature_extractor.token_size,
        tokenization=feature_extractor.tokenization,
        position_unit=feature_extractor.position_unit,
        **sizes,
    )
    config.save_pretrained(folder)
    feature_extractor.save_pretrained(folder)
