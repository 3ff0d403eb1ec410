"""Makes the backbone that comes with the library, modeling_wsl/default/, of a pretraining run.

    python benchmarks/build_default_backbone.py RUN --models MODELS... --representation FILE --search FILE

RUN is the folder of `hf-wsl pretrain` (recipe tiny_matrix); MODELS are the folders of the models that its dataset was
made of: their model.json names source and license, those without one were trained for this library. What the card
says of R2 and neighbors comes from the results of benchmarks/representation.py and search_public_models.py.
"""

import argparse
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from huggingface_hub import ModelCard, ModelCardData

from hf_wsl.files import write_json, write_text
from hf_wsl.tables import markdown_table
from hub_cards.cards import TEMPLATES
from modeling_wsl import WSLConfig
from modeling_wsl.loading import DEFAULT_FOLDER
from trainers.pretraining.pretrain_setup import FACTS_FILE


COPIED = ("config.json", "preprocessor_config.json", "model.safetensors")
SOURCES_FILE = "training_sources.json"
PERMISSIVE = ("MIT", "BSD", "Apache", "CC0")
OWN = ("trained for this library", "CC0-1.0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--representation", type=Path, required=True)
    parser.add_argument("--search", type=Path, required=True)
    parser.add_argument("--name", default="ours", help="Of the backbone in the file of --representation.")
    arguments = parser.parse_args()
    facts = json.loads((arguments.run / FACTS_FILE).read_text())
    sources = training_sources(Path(facts["config"]["dataset"]), arguments.models)
    kept = what_it_keeps(json.loads(arguments.representation.read_text()), arguments.name)
    found = what_it_finds(json.loads(arguments.search.read_text()))
    DEFAULT_FOLDER.mkdir(exist_ok=True)
    for name in COPIED:
        shutil.copyfile(arguments.run / name, DEFAULT_FOLDER / name)
    write_json(DEFAULT_FOLDER / SOURCES_FILE, {"models": sources})
    write_text(DEFAULT_FOLDER / "README.md", card(facts, sources, kept, found))


def training_sources(dataset: Path, folders: list[Path]) -> list[dict[str, Any]]:
    """Source, license and size of every model of the training split; a license that does not let go ends it."""
    rows = [
        row
        for file in sorted(dataset.glob("models/train-*.parquet"))
        for row in pq.read_table(file, columns=["model_id", "num_parameters"]).to_pylist()
    ]
    sources = []
    for row in rows:
        name = row["model_id"]
        described = next((file for folder in folders if (file := folder / name / "model.json").is_file()), None)
        if described is None and not any((folder / name).is_dir() for folder in folders):
            raise SystemExit(f"{name}: no folder of --models holds it. Name the one that it was tokenized from.")
        source, license = OWN
        if described is not None:
            record = json.loads(described.read_text())
            source, license = record["source"], record["license"]
        if not license.startswith(PERMISSIVE):
            raise SystemExit(f"{name}: its license, {license}, does not let what was learned from it be passed on.")
        sources.append({"model": name, "source": source, "license": license, "weights": row["num_parameters"]})
    return sources


def card(facts: dict[str, Any], sources: list[dict[str, Any]], kept: str, found: str) -> str:
    config = WSLConfig.from_dict(facts["model_config"])
    models: Counter = Counter()
    weights: Counter = Counter()
    for source in sources:
        key = source["source"], source["license"]
        models[key] += 1
        weights[key] += source["weights"]
    rows = [[*key, f"{count:,}", f"{weights[key]:,}"] for key, count in sorted(models.items())]
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=["hf-wsl", "weight-space-learning", "hyper-representations", "model-weights"],
    )
    written = ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "default_backbone.md"),
        parameters=f"{facts['parameters']:,}",
        window_size=config.window_size,
        token_size=config.token_size,
        latent_size=config.latent_size,
        kept=kept,
        found=found,
        steps=f"{facts['steps']:,}",
        batch_size=facts["config"]["per_device_train_batch_size"],
        minutes=f"{facts['seconds'] / 60:.0f}",
        device=facts["device"],
        train_tokens=f"{facts['train_tokens']:,}",
        num_models=len(sources),
        sources=markdown_table(["source", "license", "models", "weights"], rows, text_columns=2),
    )
    return str(written).strip() + "\n"


def what_it_keeps(figures: dict[str, Any], name: str, budget: str = "128") -> str:
    """What the yardstick says of this backbone beside the plain lines, all at one number of latents a token."""
    codes, held_out = figures["codes"], figures["held_out"]
    ours, before = codes[name][budget], codes["matrix code"][budget]["r2"]
    low, high = ours["interval"]
    lines = ", ".join(f"{line} {codes[line][budget]['r2']:.3f}" for line in ("PCA", "random projection"))
    return (
        f"Of {held_out['models']} models of {held_out['owners']} owners that it has not seen ({held_out['tokens']:,} "
        f"tokens, each standardized): R2 {ours['r2']:.3f} [{low:.3f}, {high:.3f}] (95 %, owners resampled); in as "
        f"many numbers {lines}; its own factors before training {before:.3f}."
    )


def what_it_finds(figures: dict[str, Any]) -> str:
    """How often the nearest public model by cosine is of the same repository, beside what needs no training."""
    names = {
        "backbone": "this backbone",
        "backbone, moments": "the moments of its features",
        "untrained": "the same network untrained",
        "pooled-statistics": "pooled statistics of the weights",
        "pca": "PCA",
    }
    found = {name: figures["embeddings"][name]["neighbors"]["cosine"]["repository"] for name in names}
    rates = ", ".join(f"by {text} {found[name]['rate']:.0%}" for name, text in names.items())
    return (
        f"The nearest of {figures['models']} public models is of the same repository: {rates}; by chance "
        f"{found['backbone']['chance']:.0%}. "
        "Most of these models were in the training data: measure before you rely on it."
    )


if __name__ == "__main__":
    main()
