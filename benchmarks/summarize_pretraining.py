"""Sums up a pretraining run on public models for the README: results/tiny_public_models.json.

python benchmarks/summarize_pretraining.py RUN DATASET  # the folders of `hf-wsl pretrain` and `hf-wsl tokenize`
"""

import argparse
import json
from pathlib import Path

import pyarrow.parquet as pq

from hf_wsl.files import write_json
from modeling_wsl import WSLConfig
from trainers.pretraining.pretrain_options import PretrainOptions
from trainers.pretraining.pretrain_setup import FACTS_FILE, size_of
from trainers.pretraining.run_log import METRICS_FILE


COPIED = ("status", "parameters", "train_tokens", "validation_tokens", "device", "steps", "versions")
RESULT = Path(__file__).resolve().parent.parent / "results" / "tiny_public_models.json"


def owners(dataset: Path, split: str) -> list[str | None]:
    """One entry a model."""
    files = sorted(dataset.glob(f"models/{split}-*.parquet"))
    return [owner for file in files for owner in pq.read_table(file, columns=["owner"])["owner"].to_pylist()]


def summary(run: Path, dataset: Path) -> dict:
    facts = json.loads((run / FACTS_FILE).read_text())
    evaluated = [line for line in map(json.loads, (run / METRICS_FILE).open()) if "eval_r2" in line]
    config, validation = WSLConfig.from_dict(facts["model_config"]), owners(dataset, "validation")
    default = PretrainOptions(dataset=facts["config"]["dataset"], output_dir=facts["config"]["output_dir"]).to_dict()
    return {
        "size": size_of(config),
        "train_models": len(owners(dataset, "train")),
        "validation_models": len(validation),
        "validation_owners": len(set(validation)),
        "minutes": facts["seconds"] / 60,
        "latent_size": config.latent_size,
        "token_size": config.token_size,
        "random_projection": evaluated[0]["eval_random_projection_r2"],
        "pca": evaluated[0]["eval_pca_r2"],
        "r2_first": evaluated[0]["eval_r2"],
        "r2_best": max(line["eval_r2"] for line in evaluated),
        "r2_last": evaluated[-1]["eval_r2"],
        "config": {key: value for key, value in facts["config"].items() if value != default.get(key)},
        **{key: facts[key] for key in COPIED},
    }


if __name__ == "__main__":
    folders = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folders.add_argument("run", type=Path)
    folders.add_argument("dataset", type=Path)
    write_json(RESULT, summary(**vars(folders.parse_args())))
