"""What a model is: architecture, family, training data, task and base model (paper, section 2 and Figure 1).

Everything is read off what a model's config, card and tags state; its name is believed where these say nothing, as the
paper does. The words that decide are in `composition_rules.py`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .composition_rules import (
    CLASS_TASKS,
    DATA_RULES,
    FAMILIES,
    FAMILY_RULES,
    LABEL_RULES,
    LANGUAGE_TASKS,
    NOT_DATA,
    OTHER,
    PRETRAINING_DATA,
    TASKS,
    TIMM_TAGS,
    TRANSFORMER,
    UNKNOWN,
)


BASE_TAG = re.compile(r"base_model:(?:[a-z]+:)?(.+)")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?", re.ASCII)
# Folders of a training run look like `org/name` in `_name_or_path`; as base models they would tie strangers together.
RUN_FOLDER = re.compile(
    r"(?:.*/)?checkpoint-\d+|(?:models?|outputs?|results?|checkpoints?|runs?|logs?|weights|content)/.*"
)
CLASS_SUFFIX = re.compile(r"(?:For[A-Z]\w*|LMHeadModel|Model)$")
FINE_TUNED = re.compile(r"fine[-_ ]?tuned?")


@dataclass(frozen=True)
class Composition:
    """What `describe` finds; None is unknown.

    Attributes:
        architecture: as stated: a timm name, a transformers model type or class, a PEFT type.
        family: one of `FAMILIES`: "other" has an architecture that is none of the families, "unknown" has none.
        group: one of `GROUPS`.
        training_data: what it was trained on last, e.g. "imagenet-1k"; a Hub id where the data have no such name.
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
    library: str | None = None,
) -> Composition:
    """Describes a model. Entries of an unexpected type say nothing.

    Args:
        model_id: `owner/name`, or the name of a local model.
        config: parsed config.json or adapter_config.json.
        tags: of the model on the Hub.
        card: front matter of the model's card.
        architecture, task: where they are known already; then they are not looked for.
        library: "timm", "transformers" or "peft", where known.
    """
    config, card, tags = config or {}, card or {}, list(_texts(tags))
    name = _name(model_id)
    architecture = architecture or _architecture(config, name, library)
    task = task or _task(config, card, tags)
    base_model = _base_model(model_id, config, card, tags)
    base_name = _name(base_model or "")
    plain_tags = " ".join(tag for tag in tags if ":" not in tag and tag not in TASKS)
    family, group = _family([architecture or "", *_backbones(config)], task, [plain_tags, base_name, name])
    data = _stated_data(config, card, tags, name, library) or _named_data(name, base_name)
    return Composition(architecture, family, group, data, task, base_model)


def group_of(row: Mapping[str, Any]) -> str:
    """The group of a row of the config `models`, whose family may be any word that a list of models states."""
    family = row["family"] or UNKNOWN
    groups = {rule.group for rule in FAMILY_RULES if rule.family == family}
    if family == UNKNOWN or len(groups) == 1:
        return UNKNOWN if family == UNKNOWN else groups.pop()
    if family not in FAMILIES:  # the word, or the architecture, may be known to the rules
        group = _family([family, row["architecture"] or ""], None, [])[1]
        return OTHER if group == UNKNOWN else group
    # "other" and "language" are of several groups: the rules are asked again.
    names = [_name(row["base_model"] or ""), _name(row["model_id"])]
    found, group = _family([row["architecture"] or ""], row["task"], names)
    if found == family:
        return group
    return TRANSFORMER if family == "language" else OTHER


def _family(stated: Iterable[str], task: str | None, names: Iterable[str]) -> tuple[str, str]:
    """Family and group by the first rule that fits what is stated; failing that, the task; failing that, a name."""
    stated = " ".join(stated).lower().strip()
    for rule in FAMILY_RULES:
        if rule.pattern.search(stated):
            return rule.family, rule.group
    if task in LANGUAGE_TASKS:
        return "language", TRANSFORMER
    for name in names:
        for rule in FAMILY_RULES:
            if not rule.stated_only and rule.pattern.search(name.lower()):
                return rule.family, rule.group
    return ("other", OTHER) if stated else (UNKNOWN, UNKNOWN)


def _architecture(config: Mapping[str, Any], name: str, library: str | None) -> str | None:
    if peft_type := next(_texts(config.get("peft_type")), None):
        return peft_type.lower()
    if library == "timm" and "architecture" not in config:
        return name.partition(".")[0]  # timm's ids are the architecture and a tag
    classes = (CLASS_SUFFIX.sub("", name) for name in _texts(config.get("architectures")))
    return next(
        (text for text in (*_texts(config.get("architecture"), config.get("model_type")), *classes) if text), None
    )


def _backbones(config: Mapping[str, Any]) -> Iterator[str]:
    """What a segmenter, a detector or an encoder-decoder is built on."""
    for key in ("backbone_config", "encoder"):
        inner = config.get(key)
        if isinstance(inner, Mapping):
            yield from _texts(inner.get("model_type"), inner.get("backbone"))
    yield from _texts(config.get("backbone"))


def _task(config: Mapping[str, Any], card: Mapping[str, Any], tags: Sequence[str]) -> str | None:
    classes = (CLASS_SUFFIX.search(name) for name in _texts(config.get("architectures")))
    return next(
        (
            task
            for task in (
                *_texts(card.get("pipeline_tag")),
                *(tag for tag in tags if tag in TASKS),
                *(tag for tag in _texts(card.get("tags")) if tag in TASKS),
                *(CLASS_TASKS.get(match[0]) for match in classes if match),
            )
            if task
        ),
        None,
    )


def _base_model(model_id: str, config: Mapping[str, Any], card: Mapping[str, Any], tags: Sequence[str]) -> str | None:
    """The first Hub id that is named as base, and is not the model itself."""
    tagged = (match[1] for tag in tags if (match := BASE_TAG.fullmatch(tag)))
    named = _texts(card.get("base_model"), *tagged, config.get("base_model_name_or_path"))
    found = [name for name in named if HUB_ID.fullmatch(name)]
    # transformers writes where a model was loaded from: a Hub id, or a folder of the author's.
    found += [name for name in _texts(config.get("_name_or_path")) if "/" in name and HUB_ID.fullmatch(name)]
    return next((name for name in found if name != model_id and not RUN_FOLDER.fullmatch(name)), None)


def _stated_data(
    config: Mapping[str, Any], card: Mapping[str, Any], tags: Sequence[str], name: str, library: str | None
) -> str | None:
    """Training data by the card's list, the Hub's tags, the card's results, timm's tag, the names of the classes."""
    listed = [
        *_texts(card.get("datasets")),
        *(tag.removeprefix("dataset:") for tag in tags if tag.startswith("dataset:")),
    ]
    for dataset in (text.lower() for text in listed if HUB_ID.fullmatch(text)):
        if (short := dataset.rpartition("/")[2]) not in NOT_DATA:
            return _whole_data(re.sub(r"[-_](wds|full|hf)$", "", short)) or dataset
    for dataset in _result_data(card):
        if known := _whole_data(dataset.lower()):
            return known
    tag = _timm_tag(config, name, library)
    if tag in TIMM_TAGS:
        return TIMM_TAGS[tag]
    if last := _last_data(tag):
        return last[0]
    labels = ", ".join(_first_labels(config)).lower()
    return next((data for data, start in LABEL_RULES.items() if re.match(start, labels)), None)


def _named_data(name: str, base_name: str) -> str | None:
    """Training data by the model's name, without what its base model's name says."""
    own = name.lower().replace(base_name.lower(), "") if base_name else name.lower()
    own = FINE_TUNED.split(own)[-1]
    if (last := _last_data(own)) is None:
        return None
    data, end = last
    # `vit-in21k-flowers` is not named after what it was trained on last.
    return None if data in PRETRAINING_DATA and re.search(r"[a-z]{3}", own[end:]) else data


def _whole_data(text: str) -> str | None:
    return next((data for data, pattern in DATA_RULES.items() if pattern.fullmatch(text)), None)


def _last_data(text: str) -> tuple[str, int] | None:
    """The data set whose name ends last in a text, and where it ends."""
    found = [(match.end(), data) for data, pattern in DATA_RULES.items() for match in pattern.finditer(text)]
    if not found:
        return None
    end, data = max(found, key=lambda item: item[0])  # of two that end there, the first in the table
    return data, end


def _result_data(card: Mapping[str, Any]) -> Iterator[str]:
    """Data sets of the card's results (`model-index`)."""
    for model in _mappings(card.get("model-index")):
        for result in _mappings(model.get("results")):
            for dataset in _mappings([result.get("dataset")]):
                yield from _texts(dataset.get("type"), dataset.get("name"))


def _timm_tag(config: Mapping[str, Any], name: str, library: str | None) -> str:
    """`a1_in1k` of `resnet18.a1_in1k`."""
    pretrained = config.get("pretrained_cfg")
    inside = pretrained.get("tag") if isinstance(pretrained, Mapping) else None
    return next(_texts(inside), name.partition(".")[2] if library == "timm" else "").lower()


def _first_labels(config: Mapping[str, Any]) -> list[str]:
    labels = config.get("id2label")
    return list(_texts(*(labels.get(str(i)) for i in range(3)))) if isinstance(labels, Mapping) else []


def _name(model_id: str) -> str:
    return model_id.partition("/")[2] or model_id  # an owner may be called anything


def _texts(*values: Any) -> Iterator[str]:
    """The texts among values and in lists among them."""
    for value in values:
        if isinstance(value, str) and value.strip():
            yield value.strip()
        elif isinstance(value, list | tuple):
            yield from _texts(*value)


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
