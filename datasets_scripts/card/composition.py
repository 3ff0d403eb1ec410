"""The composition of a collection (paper, section 2 and Figure 1): architecture, family, training data, task, base.

Everything is read off what a model's config, card and tags state. What nothing states is unknown, as in the paper.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_wsl.files import replacing
from hf_wsl.tables import markdown_table, plain

from ..schema import ACCEPTED
from .architectures import BEGINNINGS, CONVNET, GROUPS, HYBRID, OTHER, TRANSFORMER, UNKNOWN, family_of


BASE_TAG = re.compile(r"base_model:(?:[a-z]+:)?(.+)")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?", re.ASCII)
# Folders of a training run look like `org/name` in `_name_or_path`; as base models they would tie strangers together.
RUN_FOLDER = re.compile(
    r"(?:.*/)?checkpoint-\d+|(?:models?|outputs?|results?|checkpoints?|runs?|logs?|weights|content)/.*"
)
CLASS_SUFFIX = re.compile(r"(?:For[A-Z]\w*|LMHeadModel|Model)$")
# Suffix of the class of a transformers model -> task, as the Hub names it.
CLASS_TASKS = {
    "ForImageClassification": "image-classification",
    "ForImageClassificationWithTeacher": "image-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "ForUniversalSegmentation": "image-segmentation",
    "ForInstanceSegmentation": "image-segmentation",
    "ForSegmentation": "image-segmentation",
    "ForObjectDetection": "object-detection",
    "ForDepthEstimation": "depth-estimation",
    "ForMaskedImageModeling": "image-feature-extraction",
    "ForVideoClassification": "video-classification",
    "ForKeypointDetection": "keypoint-detection",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "ForNextSentencePrediction": "text-classification",
    "ForAudioClassification": "audio-classification",
    "ForCTC": "automatic-speech-recognition",
    "ForSpeechSeq2Seq": "automatic-speech-recognition",
}
LANGUAGE_TASKS = {
    *("text-generation", "fill-mask", "text-classification", "token-classification", "question-answering"),
    *("summarization", "translation", "sentence-similarity", "text2text-generation", "multiple-choice"),
}
TASKS = {
    *CLASS_TASKS.values(),
    *LANGUAGE_TASKS,
    *("image-to-image", "image-to-text", "mask-generation", "zero-shot-image-classification", "text-to-image"),
    *("zero-shot-object-detection", "image-text-to-text", "feature-extraction", "reinforcement-learning"),
    "visual-question-answering",
}
# Words of training scripts for a user's own folder.
NOT_DATA = {
    *("imagefolder", "image_folder", "generator", "custom", "custom_dataset", "dataset", "none", "unknown", "arrow"),
}
# Data sets that have one meaning whoever uploaded them; others keep the owner's name.
COMMON_DATA = {
    *("imagenet-1k", "imagenet-12k", "imagenet-21k", "imagenet-22k", "tiny-imagenet", "imagenette", "cifar10"),
    *("cifar100", "mnist", "fashion_mnist", "svhn", "stl10", "food101", "beans", "eurosat", "coco", "ade20k", "squad"),
    *("cityscapes", "wikitext", "bookcorpus", "imdb", "glue", "librispeech_asr"),
}
FIGURE_FILE = "composition.png"
# From the palette of Okabe and Ito, which color-blind eyes tell apart; in gray they get lighter from left to right.
COLORS = {TRANSFORMER: "#0072B2", CONVNET: "#D55E00", HYBRID: "#009E73", OTHER: "#E69F00", UNKNOWN: "#BBBBBB"}
DARK = "#4D4D4D"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Composition:
    """The facts that `describe` reads; None is unknown.

    Attributes:
        architecture: as stated: a timm name, a transformers model type or class, a PEFT type.
        family: one of `FAMILIES`: "other" is known and none of the families, "unknown" is not known.
        group: one of `GROUPS`.
        training_data: the data set that its card or tags name, e.g. "imagenet-1k".
        task: as the Hub names tasks.
        base_model: Hub id of what it was fine-tuned from, or of an adapter's base.
    """

    architecture: str | None
    family: str
    group: str
    training_data: str | None
    task: str | None
    base_model: str | None


def describe(
    model_id: str,
    *,
    config: Mapping[str, Any] | None = None,
    tags: Sequence[str] = (),
    card: Mapping[str, Any] | None = None,
    architecture: str | None = None,
    task: str | None = None,
) -> Composition:
    """Describes a model. Entries of an unexpected type say nothing.

    Args:
        model_id: `owner/name`, or the name of a local model; it only tells a base model from the model itself.
        config: parsed config.json or adapter_config.json.
        tags: of the model on the Hub.
        card: front matter of the model's card.
        architecture, task: where they are known already; then they are not looked for.
    """
    config, card, tags = config or {}, card or {}, list(_texts(tags))
    architecture = architecture or _architecture(config)
    task = task or _task(config, card, tags)
    place = family_of(*_texts(architecture), *_parts(config))
    if place is None:
        place = ("language", TRANSFORMER) if task in LANGUAGE_TASKS else (UNKNOWN, UNKNOWN)
    return Composition(
        architecture, *place, _training_data(card, tags), task, _base_model(model_id, config, card, tags)
    )


def group_of(row: Row) -> str:
    """The group of a row of the config `models`, whose family may be any word that a list of models states."""
    family, architecture = row["family"] or UNKNOWN, row["architecture"] or ""
    if family == UNKNOWN:
        return UNKNOWN
    groups = dict(BEGINNINGS.keys())
    if family not in ("other", "language") and family in groups:
        return groups[family]
    known = family_of(*([architecture] if family in ("other", "language") else [family, architecture]))
    if known is not None:
        return known[1]
    return TRANSFORMER if family == "language" else OTHER


def _architecture(config: Mapping[str, Any]) -> str | None:
    if peft_type := next(_texts(config.get("peft_type")), None):
        return peft_type.lower()
    classes = (CLASS_SUFFIX.sub("", name) for name in _texts(config.get("architectures")))
    stated = (*_texts(config.get("architecture"), config.get("model_type")), *classes)
    return next((text for text in stated if text), None)


def _parts(config: Mapping[str, Any]) -> Iterator[str]:
    """The networks that a segmenter, a detector or an encoder-decoder is built on."""
    for key in ("backbone_config", "encoder"):
        inner = config.get(key)
        if isinstance(inner, Mapping):
            yield from _texts(inner.get("model_type"), inner.get("backbone"))
    yield from _texts(config.get("backbone"))


def _task(config: Mapping[str, Any], card: Mapping[str, Any], tags: Sequence[str]) -> str | None:
    classes = (CLASS_SUFFIX.search(name) for name in _texts(config.get("architectures")))
    stated = (
        *_texts(card.get("pipeline_tag")),
        *(tag for tag in (*tags, *_texts(card.get("tags"))) if tag in TASKS),
        *(CLASS_TASKS.get(match[0]) for match in classes if match),
    )
    return next((task for task in stated if task), None)


def _training_data(card: Mapping[str, Any], tags: Sequence[str]) -> str | None:
    """The first data set of the card's list and of the Hub's tags that is one."""
    tagged = (tag.removeprefix("dataset:") for tag in tags if tag.startswith("dataset:"))
    for dataset in (text.lower() for text in (*_texts(card.get("datasets")), *tagged) if HUB_ID.fullmatch(text)):
        name = dataset.rpartition("/")[2]
        if name not in NOT_DATA:
            common = re.sub(r"[-_](wds|full|hf)$", "", name)
            return common if common in COMMON_DATA else dataset
    return None


def _base_model(model_id: str, config: Mapping[str, Any], card: Mapping[str, Any], tags: Sequence[str]) -> str | None:
    """The first Hub id that is named as base, and is not the model itself."""
    tagged = (match[1] for tag in tags if (match := BASE_TAG.fullmatch(tag)))
    named = _texts(card.get("base_model"), *tagged, config.get("base_model_name_or_path"))
    bases = [name for name in named if HUB_ID.fullmatch(name)]
    # transformers writes where a model was loaded from: a Hub id, or a folder of the author's.
    bases += [name for name in _texts(config.get("_name_or_path")) if "/" in name and HUB_ID.fullmatch(name)]
    return next((name for name in bases if name != model_id and not RUN_FOLDER.fullmatch(name)), None)


def _texts(*values: Any) -> Iterator[str]:
    """The texts among values and in lists among them."""
    for value in values:
        if isinstance(value, str) and value.strip():
            yield value.strip()
        elif isinstance(value, list | tuple):
            yield from _texts(*value)


@dataclass(frozen=True)
class Share:
    """A part of the accepted models.

    Attributes:
        name: the family, or the training data.
        group: of a family, one of `GROUPS`; else "".
        models, parameters: in it.
        share: of all models.
    """

    name: str
    group: str
    models: int
    parameters: int
    share: float


def family_shares(rows: Sequence[Row]) -> list[Share]:
    """The families, in the order of their groups, the largest first.

    Args:
        rows: of the config `models`, without their manifests; refused ones do not count.
    """
    shares = _shares(rows, lambda row: (row["family"] or UNKNOWN, group_of(row)))
    return sorted(shares, key=lambda share: GROUPS.index(share.group))


def training_data_shares(rows: Sequence[Row]) -> list[Share]:
    """The training data, the largest first, unknown ones at the end; `rows` as in `family_shares`."""
    shares = _shares(rows, lambda row: (row["training_data"] or UNKNOWN, ""))
    return sorted(shares, key=lambda share: share.name == UNKNOWN)


def _shares(rows: Sequence[Row], part_of: Callable[[Row], tuple[str, str]]) -> list[Share]:
    parts: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        if row["status"] == ACCEPTED:
            parts.setdefault(part_of(row), []).append(row["num_parameters"])
    count = sum(map(len, parts.values()))
    shares = [Share(*key, len(sizes), sum(sizes), len(sizes) / count) for key, sizes in parts.items()]
    return sorted(shares, key=lambda share: (-share.models, share.name))


def merge_rest(shares: Sequence[Share], limit: int) -> list[Share]:
    """At most `limit` parts: the smallest known ones become "<number> more" of no group."""
    if len(shares) <= limit:
        return list(shares)
    known = sorted((s for s in shares if s.name != UNKNOWN), key=lambda share: -share.models)
    rest = known[limit - 1 - (len(known) < len(shares)) :]
    sums = (sum(s.models for s in rest), sum(s.parameters for s in rest), sum(s.share for s in rest))
    kept = [share for share in shares if share not in rest]
    merged = Share(f"{len(rest)} more", "", *sums)
    return [*(s for s in kept if s.name != UNKNOWN), merged, *(s for s in kept if s.name == UNKNOWN)]


def composition_table(rows: Sequence[Row], limit: int = 25) -> str:
    """Two tables in markdown: families by group, and training data; `rows` as in `family_shares`.

    Args:
        limit: of their lines; the smallest parts share one.
    """

    def cells(share: Share) -> tuple[str, ...]:
        return plain(share.name), f"{share.models:,}", f"{share.share:.1%}", f"{share.parameters:,}"

    families = [(share.group, *cells(share)) for share in merge_rest(family_shares(rows), limit)]
    data = [cells(share) for share in merge_rest(training_data_shares(rows), limit)]
    numbers = ("models", "share", "parameters")
    return "\n\n".join(
        [
            markdown_table(("group", "family", *numbers), families, text_columns=2),
            markdown_table(("trained on", *numbers), data),
        ]
    )


def composition_figure(rows: Sequence[Row], path: Path) -> None:
    """Draws which share of the models is of which group and family, and what they were trained on.

    The same rows and the same matplotlib give the same bytes.

    Args:
        rows: as in `family_shares`; at least one accepted.
        path: of the PNG file, written completely or not at all.
    """
    import matplotlib  # here: only the picture needs it
    from matplotlib.figure import Figure

    halves = {
        "Architecture family": merge_rest(family_shares(rows), 14),  # 14 can be read at the width of a card
        "Trained on": merge_rest(training_data_shares(rows), 14),
    }
    slots = max(3, *map(len, halves.values()))
    accepted = [row["num_parameters"] for row in rows if row["status"] == ACCEPTED]
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "font.size": 12}):
        figure = Figure(figsize=(10.5, 1.5 + 0.36 * slots), layout="constrained")
        for axes, (title, shares) in zip(figure.subplots(1, 2), halves.items(), strict=True):
            names = [f"other {s.group}s" if s.name == "other" and s.group != OTHER else s.name for s in shares]
            colors = [COLORS.get(s.group, COLORS[UNKNOWN] if s.name == UNKNOWN else DARK) for s in shares]
            bars = axes.barh(range(len(shares)), [s.share for s in shares], color=colors, height=0.72)
            axes.bar_label(bars, [f"{s.share:.1%}  ({s.models:,})" for s in shares], padding=4, color=DARK)
            short = [name if len(name) <= 22 else name[:21] + "…" for name in names]
            axes.set_yticks(range(len(shares)), short, parse_math=False)
            axes.set_ylim(slots - 0.4, -0.6)  # the first on top, and bars as thick as those of the other half
            axes.set_xlim(0, 1.6 * max(s.share for s in shares))  # room for the numbers
            axes.xaxis.set_visible(False)
            axes.spines[["top", "right", "bottom"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
            axes.set_title(title, loc="left", weight="bold")
        figure.suptitle(f"{len(accepted):,} models, {sum(accepted):,} parameters", x=0.01, ha="left", fontsize=13)
        with replacing(path) as temporary:
            # Without matplotlib's version, the only entry of the metadata that is written by default.
            figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
