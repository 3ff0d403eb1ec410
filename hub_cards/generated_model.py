"""A generated model for the Hub: its weights and config as its library reads them, and where every tensor is from."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from datasets_scripts.card.composition import describe
from datasets_scripts.licenses import license_ids
from hf_wsl.files import write_json
from hf_wsl.tables import code, markdown_table, plain

from .cards import fill_card, shortened, without_local_paths
from .errors import PublishError
from .origins import Origin, find_origin, license_fields, refuse_withheld, settle_license
from .publication import STAGING, Publication, model_publication, read_facts, weight_files


PROVENANCE_FILE, CONFIG_FILE, GENERATION_FILE = "provenance.json", "config.json", "generation_config.json"
OWNED = ("model*.safetensors", "model.safetensors.index.json", CONFIG_FILE, GENERATION_FILE, PROVENANCE_FILE)
NEEDED = ("target", "anchors", "tensors", "entries", "seed", "versions")
TAGS = ["hf-wsl", "weight-space-learning", "generated-weights"]
MEANINGS = {
    "sampled": "drawn by the backbone",
    "resized": "the donor's, brought to another size",
    "fitted": "fitted in closed form to the donor's outputs, or to labels",
    "inherited": "the first trained model's own",
    "re-estimated": "batch-norm statistics, measured anew on images",
    "initialized": "the library's initialization, untrained",
    "given": "values of the module that was given as target",
}


def prepare_generated_model(folder: Path, repo_id: str, license: str | None, on_hub: str | None) -> Publication:
    """Checks the folder of a generated model and writes its card.

    Args:
        folder: of `GeneratedModel.save_pretrained`.
        repo_id: where it goes.
        license: to publish under; None: the one that anchors and backbone share.
        on_hub: README.md of the repository, None where it has none.

    Raises:
        PublishError: a file is missing or damaged, or the licenses of its parts do not allow it.
    """
    provenance = read_facts(folder / PROVENANCE_FILE, NEEDED)
    weights = weight_files(folder)
    configs = [name for name in (CONFIG_FILE, GENERATION_FILE) if (folder / name).is_file()]
    library = provenance["target"]["library"]
    if library in ("timm", "transformers") and CONFIG_FILE not in configs:
        raise PublishError(f"{folder} lacks config.json, without which {library} cannot load it. Generate it again.")
    config = read_facts(folder / CONFIG_FILE, ()) if CONFIG_FILE in configs else {}
    anchors = [find_origin(anchor) for anchor in provenance["anchors"]]
    backbone = find_origin(provenance["backbone"]) if "backbone" in provenance else None  # donors need none
    refuse_withheld(anchors)
    stated = [origin.license for origin in (*anchors, backbone) if origin is not None]
    settled = settle_license(license, stated, "its anchors and backbone")
    card = generated_model_card(GeneratedFacts(repo_id, provenance, config, anchors, backbone, settled))
    staged = folder / STAGING / PROVENANCE_FILE
    write_json(staged, without_local_paths(provenance))
    files = [*weights, *configs]
    return model_publication(folder, "generated model", files, {PROVENANCE_FILE: staged}, OWNED, settled, card, on_hub)


@dataclass(frozen=True)
class GeneratedFacts:
    """The facts that the card of a generated model is made of.

    Attributes:
        repo_id: where it goes.
        provenance: content of provenance.json.
        config: content of config.json, `{}` where the model is tensors only.
        anchors, backbone: what it was drawn from; a model from donors has no backbone.
        license: that it is published under, see `origins.settle_license`.
    """

    repo_id: str
    provenance: Mapping[str, Any]
    config: Mapping[str, Any]
    anchors: Sequence[Origin]
    backbone: Origin | None
    license: str

    @property
    def origins(self) -> list[Origin]:
        return [origin for origin in (*self.anchors, self.backbone) if origin is not None]

    @property
    def library(self) -> str:
        return self.provenance["target"]["library"]


def generated_model_card(facts: GeneratedFacts) -> str:
    """README.md of a generated model.

    Raises:
        KeyError: provenance.json lacks an entry that every generation writes.
    """
    provenance, config, library = facts.provenance, facts.config, facts.library
    target = provenance["target"]["name"]
    composition = describe(target, config=config)
    timm_task = "image-classification" if config.get("num_classes") else "image-feature-extraction"
    base_models = dict.fromkeys(anchor.hub_id for anchor in facts.anchors if anchor.hub_id)
    data = ModelCardData(
        **license_fields(facts.license),
        library_name=library if library in ("timm", "transformers") else None,
        pipeline_tag=composition.task or (timm_task if library == "timm" else None),
        tags=TAGS,
        base_model=list(base_models) or None,
    )
    classes = config.get("architectures")
    model_class = classes[0] if isinstance(classes, list) and classes else "AutoModel"
    parts = [("trained model", *anchor.row()) for anchor in facts.anchors] + []
    if facts.backbone is not None:
        parts.append(("backbone", *facts.backbone.row()))
    score = provenance.get("score")
    return fill_card(
        "generated_model",
        data,
        name=facts.repo_id.split("/")[-1],
        repo_id=facts.repo_id,
        library=library,
        provenance=provenance,
        num_anchors=len(facts.anchors),
        architecture=code(composition.architecture or shortened(target)),
        model_class=model_class if str(model_class).isidentifier() else "AutoModel",
        num_entries=sum(provenance["entries"].values()),
        sources=_sources(provenance),
        parts=markdown_table(("", "name", "version", "license"), parts, text_columns=4),
        settings=markdown_table(("setting", "value"), _settings(provenance), text_columns=2),
        score=None if "score" not in provenance else "not finite" if score is None else f"{score:.4g}",
        ranked_by=plain(str(provenance.get("ranked_by"))),
        publisher_license=code(facts.license),
        shared=all(license_ids(origin.license) == (facts.license,) for origin in facts.origins),
    )


def _sources(provenance: Mapping[str, Any]) -> str:
    """A table of how many tensors and numbers are sampled, inherited, re-estimated, initialized."""
    total = sum(provenance["entries"].values())
    tensors = Counter(provenance["tensors"].values())
    rows = []
    for origin, count in provenance["entries"].items():
        kind, _, source = origin.partition(": ")
        named = f"{kind} from {code(shortened(source))}" if kind in ("inherited", "resized", "fitted") else kind
        rows.append((named, MEANINGS[kind], f"{tensors[origin]:,}", f"{count:,}", f"{count / total:.2%}"))
    return markdown_table(("origin", "meaning", "tensors", "numbers", "share"), rows, text_columns=2)


def _settings(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    if "donor" in provenance:
        return _transfer(provenance)
    backbone, extractor = provenance["backbone"], provenance["feature_extractor"]
    autocast = f", autocast to {provenance['autocast_dtype']}" if provenance["autocast_dtype"] else ""
    window = f"{provenance['window_size']} tokens, halo {provenance['halo']}, batch {provenance['batch_size']}"
    return [
        ("seed", f"{provenance['seed']}; of this draw: {provenance['draw_seed']}"),
        *_draws(provenance),
        *_adapted(provenance),
        ("windows", window),
        ("backbone", f"{backbone['dtype']} on {backbone['device']}{autocast}"),
        ("tokens", ", ".join(f"{name} {value}" for name, value in extractor.items())),
        ("versions", ", ".join(f"{name} {version}" for name, version in provenance["versions"].items() if version)),
    ]


def _transfer(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How a donor's weights were taken, as rows of the settings."""
    rows = [("method", provenance["method"]), ("seed", str(provenance["seed"]))]
    rows.append(("unlabeled examples", f"{provenance['num_images']:,}"))
    if (head := provenance.get("head")) is not None:
        rows.append(("classifier", f"from the labels of {head['images']:,} images, by ridge regression"))
    if (distillation := provenance.get("distillation")) is not None:
        rows.append(("distillation", f"{distillation['epochs']} epochs towards the donor's outputs"))
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items() if version)
    return [*rows, ("versions", versions)]


def _draws(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The way in which latents were drawn, as rows of the settings."""
    method = provenance.get("method", "density")  # before there were others it was not noted
    if method == "interpolation":
        return [("interpolation", f"{provenance['weight_of_second_anchor']:g} of the way from first to second")]
    rows = [("kernel density", f"bandwidth {provenance['bandwidth']:g}, noise {provenance['noise']}")]
    if provenance.get("bootstrap_rounds"):
        rows.append(("bootstrapping", f"round {provenance['round']} of {provenance['bootstrap_rounds']}"))
    return rows


def _adapted(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The tensors that a trained model has in another shape, as rows of the settings."""
    return [
        (code(name), f"{entry['how']}: {entry['anchor_shape'] or 'missing'} there, {entry['shape']} here")
        for name, entry in provenance.get("adapted", {}).items()
    ]
