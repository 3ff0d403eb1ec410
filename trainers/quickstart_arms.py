"""Fine-tunes the held-out architecture from every kind of initial weights: same images, same order, same steps."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoFeatureExtractor
from transformers.utils.logging import is_progress_bar_enabled

from datasets_scripts.digits import digits_splits
from datasets_scripts.files import replacing, write_json
from datasets_scripts.worker_pool import one_thread, run_tasks
from datasets_scripts.zoo import ARCHITECTURES, new_model, read_properties
from modeling_wsl.batch_norm import reestimate_batch_norm
from modeling_wsl.checkpoints import open_checkpoint

from .baselines import fit_pca, random_projection
from .dataset_source import load_windows
from .finetune import FinetuneConfig, evaluate_classifier, finetune
from .quickstart_controls import ARMS, inherited_only, permuted, projected, with_noise
from .window_data import WindowDataset


@dataclass(frozen=True)
class ArmTask:
    """One fine-tuning run: from the file `weights`, in the data order of `config.seed`, to the file `outcome`."""

    arm: str
    family: str
    weights: Path
    outcome: Path
    config: FinetuneConfig


def finetune_arms(
    folder: Path,
    held_out: Path,
    images: dict[str, TensorDataset],
    config: FinetuneConfig,
    seeds: Sequence[int],
    num_candidates: int,
    num_workers: int,
) -> dict[str, Any]:
    """Makes the initial weights of every arm and seed, fine-tunes each in a process of its own, and sums up.

    Args:
        folder: of the quickstart; gets `arms/<arm>-<seed>.safetensors` and `.json`. Runs that are there are kept.
        held_out: the anchor's folder.
        images: of the quickstart's digits: "train" for batch-norm statistics, "validation" to choose among draws.
        config: of every run; its seed is replaced.
        seeds: one run of every arm for each.
        num_candidates: draws of "anchor + noise" that its runs are the best of, as the generated models are.
        num_workers: processes.

    Returns:
        arm -> what its initial weights are (`about`) and its `runs`: seed, history, test accuracy and loss. `skipped`:
        arm -> why it was not run.
    """
    family = read_properties(held_out)["family"]
    tasks = []
    noised = _best_noised(folder, held_out, images, len(seeds), num_candidates)
    for index, seed in enumerate(seeds):
        for arm in _save_weights(folder, held_out, images["train"], noised[index], index, seed):
            stem = folder / "arms" / f"{arm.replace(' ', '_')}-{seed}"
            weights, outcome = stem.with_suffix(".safetensors"), stem.with_suffix(".json")
            tasks.append(ArmTask(arm, family, weights, outcome, replace(config, seed=seed)))
    missing = [task for task in tasks if not task.outcome.is_file()]
    hidden = not is_progress_bar_enabled()
    with tqdm(
        total=len(tasks), initial=len(tasks) - len(missing), desc="fine-tune", unit="run", disable=hidden
    ) as bar:
        for arm, accuracy in run_tasks(_run_arm, missing, num_workers, preload=__name__):
            bar.set_postfix_str(f"{arm} {accuracy:.3f}")
            bar.update()
    arms = {}
    for arm, about in ARMS.items():
        runs = [json.loads(task.outcome.read_text(encoding="utf-8")) for task in tasks if task.arm == arm]
        if runs:
            arms[arm] = {"about": about, "runs": runs, "mean_test_accuracy": mean(r["test_accuracy"] for r in runs)}
    skipped = {arm: "generation took nothing from the anchor untouched" for arm in ARMS if arm not in arms}
    return {"arms": arms, "skipped": skipped, "seeds": list(seeds), "config": asdict(config)}


def _best_noised(
    folder: Path, held_out: Path, images: dict[str, TensorDataset], count: int, num_candidates: int
) -> list[dict[str, torch.Tensor]]:
    """The best `count` of `num_candidates` noised anchors, chosen as the generated models were: without this, the
    selection alone would set the generated arm apart."""
    family = read_properties(held_out)["family"]
    draw = folder / "generated" / "draw_0"
    origins = json.loads((draw / "provenance.json").read_text(encoding="utf-8"))["tensors"]
    sampled = [name for name, origin in origins.items() if origin == "sampled"]
    anchor, generated = open_checkpoint(held_out).state_dict(), open_checkpoint(draw).state_dict()
    candidates = []
    for seed in range(num_candidates):
        model = new_model(family, seed=0)
        noised = with_noise(anchor, generated, sampled, seed)
        model.load_state_dict(_with_own_statistics(family, noised, images["train"]))
        _, accuracy = evaluate_classifier(model, images["validation"], use_cpu=True)
        candidates.append((accuracy, model.state_dict()))
    candidates.sort(key=lambda candidate: -candidate[0])
    return [state for _, state in candidates[:count]]


def _save_weights(
    folder: Path, held_out: Path, train: TensorDataset, noised: dict[str, torch.Tensor], index: int, seed: int
) -> list[str]:
    """Writes the initial weights of every arm for one seed; returns the arms there are."""
    feature_extractor = AutoFeatureExtractor.from_pretrained(folder / "backbone")
    latent_size = AutoConfig.from_pretrained(folder / "backbone").latent_size
    windows = WindowDataset(load_windows(str(folder / "dataset"))["train"], split="train")
    draw = folder / "generated" / f"draw_{index}"
    origins = json.loads((draw / "provenance.json").read_text(encoding="utf-8"))["tensors"]
    sampled = [name for name, origin in origins.items() if origin == "sampled"]
    anchor, generated = open_checkpoint(held_out).state_dict(), open_checkpoint(draw).state_dict()
    family = read_properties(held_out)["family"]
    scratch = new_model(family, seed).state_dict()
    random_directions = random_projection(latent_size, feature_extractor.token_size, seed)
    # Another network's batch-norm statistics fit none of these: they are re-estimated, as the generated model's are.
    disturbed = {
        "PCA": projected(feature_extractor, fit_pca(windows, latent_size, 500_000), anchor),
        "random projection": projected(feature_extractor, random_directions, anchor),
        "anchor permuted": permuted(anchor, sampled, seed),
    }
    arms = {
        "anchor": anchor,
        "generated": generated,
        "reconstructed": open_checkpoint(folder / "generated" / "reconstructed").state_dict(),
        **{arm: _with_own_statistics(family, state, train) for arm, state in disturbed.items()},
        "anchor + noise": noised,
        "scratch": scratch,
    }
    inherited = inherited_only(generated, origins, scratch)
    if inherited is not None:
        arms["inherited only"] = inherited
    for arm, state in arms.items():
        path = folder / "arms" / f"{arm.replace(' ', '_')}-{seed}.safetensors"
        with replacing(path) as temporary:
            save_file({name: value.contiguous() for name, value in state.items()}, temporary)
    return list(arms)


def _with_own_statistics(family: str, state: dict[str, torch.Tensor], train: TensorDataset) -> dict[str, torch.Tensor]:
    model = new_model(family, seed=0)
    model.load_state_dict(state)
    reestimate_batch_norm(model, train.tensors[0])
    return model.state_dict()


def _run_arm(task: ArmTask) -> tuple[str, float]:
    """Fine-tunes one arm on one thread, writes its outcome and returns its arm and test accuracy."""
    with one_thread():
        images = digits_splits(ARCHITECTURES[task.family].image_size)
        model = new_model(task.family, seed=0)
        model.load_state_dict(load_file(task.weights))
        history = finetune(model, images["train"], images["validation"], task.config, progress=False)
        loss, accuracy = evaluate_classifier(model, images["test"], use_cpu=task.config.use_cpu)
    outcome = {
        "seed": task.config.seed,
        "history": [asdict(metrics) for metrics in history],
        "test_accuracy": accuracy,
        "test_loss": loss,
    }
    write_json(task.outcome, outcome)
    return task.arm, accuracy
