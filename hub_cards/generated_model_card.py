"""The card of a generated model, written from its provenance.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from datasets_scripts.card.composition import describe
from datasets_scripts.licenses import OTHER, License, Strictest

from .card_text import fill_template, model_card, table
from .local_paths import shortened
from .origins import Origin


TAGS = ["hf-wsl", "weight-space-learning", "generated-weights"]
MEANINGS = {
    "sampled": "drawn by the backbone",
    "inherited": "the first trained model's own",
    "re-estimated": "batch-norm statistics, measured anew on images",
    "initialized": "the library's initialization, untrained",
    "given": "values of the module that was given as target",
}


@dataclass(frozen=True)
class GeneratedFacts:
    """What the card of a generated model is made of.

    Attributes:
        repo_id: where it goes.
        provenance: content of provenance.json.
        config: content of config.json, `{}` where the model is tensors only.
        anchors, backbone: what it was drawn from.
        license: that it is published under.
        strictest: of the known licenses of these.
    """

    repo_id: str
    provenance: Mapping[str, Any]
    config: Mapping[str, Any]
    anchors: Sequence[Origin]
    backbone: Origin
    license: License
    strictest: Strictest | None

    @property
    def library(self) -> str:
        return self.provenance["target"]["library"]


def generated_model_card(facts: GeneratedFacts) -> str:
    """README.md of a generated model.

    Raises:
        KeyError: provenance.json lacks an entry that every generation writes.
    """
    provenance, target = facts.provenance, facts.provenance["target"]
    composition = describe(target["name"], config=facts.config, library=facts.library)
    base_models = [anchor.hub_id for anchor in facts.anchors if anchor.hub_id]
    data = ModelCardData(
        license=facts.license.identifier,
        license_name=facts.license.stated if facts.license.identifier == OTHER else None,
        library_name=facts.library if facts.library in ("timm", "transformers") else None,
        pipeline_tag=composition.task or _timm_task(facts),
        tags=TAGS,
        base_model=list(dict.fromkeys(base_models)) or None,
    )
    counts = provenance["entries"]
    name = facts.repo_id.split("/")[-1]
    architecture = composition.architecture or shortened(target["name"])
    text = fill_template(
        "generated_model",
        {
            "name": name,
            "origin": _origin(facts),
            "summary": (
                f"`{architecture}` ({facts.library}), {sum(counts.values()):,} numbers in "
                f"{len(provenance['tensors'])} tensors, draw {provenance['draw']} of {provenance['total_draws']}."
            ),
            "loading": _loading(facts),
            "sources": _sources(provenance),
            "parts": _parts(facts),
            "settings": table(("setting", "value"), _settings(provenance)),
            "evaluation": _evaluation(provenance),
            "license": _license(facts),
        },
    )
    return model_card(data, text)


def _origin(facts: GeneratedFacts) -> str:
    """What the weights were drawn from, and what that means."""
    if not facts.anchors:
        return (
            "no trained model of the same architecture, but a prior over what the tensors of other models are like. "
            "They are an initialization: unless somebody shows otherwise, they solve no task."
        )
    count = "one trained model" if len(facts.anchors) == 1 else f"{len(facts.anchors)} trained models"
    return (
        f"{count} of the same architecture. They are close to what they were drawn from. Unless somebody shows "
        "otherwise, they know nothing that a trained model did not, and know it less well. Compare with the trained "
        "model itself, and with the trained model plus the same amount of noise."
    )


def _draws(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How latents were drawn, as rows of the settings."""
    method = provenance.get("method", "density")  # before there were others it was not noted
    if method == "prior":
        rows = [("prior", f"fitted on {provenance['prior'].get('dataset') or 'an unnamed dataset'}")]
    elif method == "interpolation":
        rows = [("interpolation", f"{provenance['weight_of_second_anchor']:g} of the way from first to second")]
    else:
        rows = [("kernel density", f"bandwidth {provenance['bandwidth']:g}, noise {provenance['noise']}")]
        if provenance.get("bootstrap_rounds"):
            rows.append(("bootstrapping", f"round {provenance['round']} of {provenance['bootstrap_rounds']}"))
    return rows


def _adapted(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The tensors that a trained model has in another shape, as rows of the settings."""
    return [
        (f"`{name}`", f"{entry['how']}: {entry['anchor_shape'] or 'missing'} there, {entry['shape']} here")
        for name, entry in provenance.get("adapted", {}).items()
    ]


def _timm_task(facts: GeneratedFacts) -> str | None:
    """What timm's models are for; None for other libraries'."""
    if facts.library != "timm":
        return None
    return "image-classification" if facts.config.get("num_classes") else "image-feature-extraction"


def _loading(facts: GeneratedFacts) -> str:
    if facts.library == "timm":
        return f'import timm\n\nmodel = timm.create_model("hf-hub:{facts.repo_id}", pretrained=True).eval()'
    if facts.library == "transformers":
        architecture = (facts.config.get("architectures") or ["AutoModel"])[0]
        return (
            f"from transformers import {architecture}\n\n"
            f'model = {architecture}.from_pretrained("{facts.repo_id}").eval()'
        )
    return (
        "from huggingface_hub import hf_hub_download\nfrom safetensors.torch import load_file\n\n"
        f'state_dict = load_file(hf_hub_download("{facts.repo_id}", "model.safetensors"))'
    )


def _sources(provenance: Mapping[str, Any]) -> str:
    """How many tensors and numbers are sampled, inherited, re-estimated, initialized."""
    total = sum(provenance["entries"].values())
    tensors: dict[str, int] = {}
    for origin in provenance["tensors"].values():
        tensors[origin] = tensors.get(origin, 0) + 1
    rows = []
    for origin, count in provenance["entries"].items():
        kind, _, source = origin.partition(": ")
        named = f"{kind} from `{shortened(source)}`" if kind == "inherited" else kind
        rows.append((named, MEANINGS[kind], tensors[origin], f"{count:,}", f"{count / total:.2%}"))
    return table(("origin", "meaning", "tensors", "numbers", "share"), rows)


def _parts(facts: GeneratedFacts) -> str:
    rows = [("trained model", *anchor.row()) for anchor in facts.anchors]
    return table(("", "name", "version", "license"), [*rows, ("backbone", *facts.backbone.row())])


def _settings(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
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


def _evaluation(provenance: Mapping[str, Any]) -> str:
    if "score" not in provenance:
        return "Nothing was measured when the model was generated."
    score = "not finite" if provenance["score"] is None else f"{provenance['score']:.4g}"
    return (
        f"Of {provenance['total_draws']} candidates this one was kept for its score {score} "
        f"({provenance['ranked_by']}). A score that candidates were chosen by is higher than what new data would give."
    )


def _license(facts: GeneratedFacts) -> str:
    text = f"Published under `{facts.license.stated}`"
    if facts.strictest is None:
        return f"{text} by the word of the publisher; none of its parts states a license that is known."
    text += f"; the strictest known license of its parts is `{facts.strictest.license.stated}`."
    conflicts = "".join(f"\n- {conflict}" for conflict in facts.strictest.conflicts)
    return f"{text}\n\nLicenses among them that no license of the whole satisfies:\n{conflicts}" if conflicts else text
