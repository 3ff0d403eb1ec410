"""The dataset card, filled from what the run counted; nothing in it is typed by hand."""

import json
from collections.abc import Mapping, Sequence

from huggingface_hub import DatasetCardData

from hf_wsl.files import sha256
from modeling_wsl.hub_card import signed

from ..licenses import license_ids
from ..schema import (
    ACCEPTED,
    MODELS,
    PROPERTIES,
    REFUSED,
    TEST,
    TRAIN,
    VALIDATION,
    WINDOWS,
    card_configs,
)
from ..tokenize_config import DatasetConfig
from .sections import (
    Collection,
    Row,
    composition,
    copies,
    licenses,
    outcomes,
    owners,
    reading,
    rebuilding,
    split_table,
    subsets,
    summary,
    withheld_section,
)


__all__ = ["Collection", "content_hash", "dataset_card"]
SPLITS = (TRAIN, VALIDATION, TEST, REFUSED)
SIZES = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]


def dataset_card(
    rows: Sequence[Row],
    config: DatasetConfig,
    *,
    collected: Collection | None = None,
    withheld: Mapping[str, str] | None = None,
    families: Mapping[str, Sequence[str]] | None = None,
    picture: str | None = None,
    properties: str | None = None,
    dataset_id: str = "<this dataset>",
) -> str:
    """README.md: front matter that `load_dataset` and the Hub read, and a description made of counts.

    Args:
        rows: of the config `models`, complete but for the manifest, in order.
        config: of the run.
        collected: how the models were found, if `collect` found them.
        withheld: model_id -> reason, of models whose windows are not in this copy: their license does not let others
            share them. Their rows stay in `models`.
        families: family -> splits, where families have files of their own, as in `schema.card_configs`.
        picture: of the composition: its path relative to the card.
        properties: digest of the table of the config `properties`, where there is one.
        dataset_id: where the dataset is published, for the examples.
    """
    withheld = withheld or {}
    there = [row for row in rows if row["model_id"] not in withheld]
    accepted = [row for row in there if row["status"] == ACCEPTED]
    splits = [split for split in SPLITS if any(row["split"] == split for row in rows)]
    num_windows = sum(row["num_windows"] for row in accepted)
    configs = {MODELS: splits}
    if accepted:
        with_windows = {row["split"] for row in accepted}
        configs = {WINDOWS: [s for s in splits if s in with_windows], MODELS: splits}
    if properties:
        configs[PROPERTIES] = splits
    data = DatasetCardData(
        license=sorted({name for row in accepted for name in license_ids(row["license"])}) or None,
        pretty_name=config.title,
        size_categories=next((name for limit, name in SIZES if num_windows < limit), "n>10M"),
        tags=["model-weights", "weight-space-learning", "hf-wsl"],
        configs=card_configs(configs, content_hash(rows, config, properties), families),
    )
    sections = [f"# {config.title}"]
    if accepted:
        sections += [
            summary(accepted, config, collected, bool(properties)),
            split_table(there, splits),
            reading(config, dataset_id, bool(properties)),
            *subsets(accepted, families or {}, dataset_id),
            *composition(accepted, picture, collected),
            *licenses(accepted),
            *withheld_section([row for row in rows if row["model_id"] in withheld], withheld),
            *owners(accepted),
            *copies(accepted),
        ]
    else:
        sections += ["No model could be tokenized."]
    sections += [*outcomes(rows), *rebuilding(config, collected, bool(properties))]
    return signed(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def content_hash(rows: Sequence[Row], config: DatasetConfig, properties: str | None = None) -> str:
    """Tells datasets apart: the settings, and every model's columns; the hash of its weights and its split are two."""
    models = (json.dumps(dict(row), sort_keys=True) for row in rows)
    return sha256([json.dumps(config.settings(), sort_keys=True), properties or "", *models])
