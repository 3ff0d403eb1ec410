"""Splits: nothing that belongs together parts, whatever the seed; the same seed draws the same."""

import random

import pytest
import yaml
from huggingface_hub import DatasetCard

from datasets_scripts.dataset_card import CardFacts, content_hash, dataset_card
from datasets_scripts.dataset_writer import PlannedModel, plan_shards
from datasets_scripts.splits import SplitItem, assign_splits, duplicate_groups
from datasets_scripts.tokenize_config import TokenizeConfig


def population(seed: int, count: int = 60) -> list[SplitItem]:
    """Models of a dozen owners and of none, every fifth a copy of another owner's model."""
    draw = random.Random(seed)
    items = []
    for number in range(count):
        owner = draw.choice([*(f"owner-{i}" for i in range(12)), None])
        sha256 = draw.choice(items).weights_sha256 if items and number % 5 == 0 else f"hash-{number}"
        items.append(SplitItem(f"model-{number}", owner, sha256, draw.randint(1, 1000)))
    return items


@pytest.mark.parametrize("split_by", ["owner", "model"])
@pytest.mark.parametrize("seed", range(20))
def test_neither_copies_nor_owners_are_divided(split_by, seed):
    items = population(seed)
    splits = assign_splits(items, split_by=split_by, validation_fraction=0.3, seed=seed)
    for key in ("weights_sha256", "owner") if split_by == "owner" else ("weights_sha256",):
        seen = {}
        for item, split in zip(items, splits, strict=True):
            if getattr(item, key) is not None:
                assert seen.setdefault(getattr(item, key), split) == split


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_validation_holds_about_its_share_of_tokens_and_never_more(fraction):
    for seed in range(20):
        items = population(seed)
        splits = assign_splits(items, split_by="model", validation_fraction=fraction, seed=seed)
        held_out = sum(i.num_tokens for i, split in zip(items, splits, strict=True) if split == "validation")
        assert 0.8 * fraction <= held_out / sum(i.num_tokens for i in items) <= fraction


def test_the_seed_decides_and_nothing_else_does():
    items = population(0)
    draws = [assign_splits(items, split_by="model", validation_fraction=0.3, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_models_without_an_owner_stand_for_themselves():
    items = [SplitItem(str(i), None, str(i), 10) for i in range(10)]
    assert assign_splits(items, split_by="owner", validation_fraction=0.3, seed=0).count("validation") == 3


def test_one_owner_leaves_no_validation_and_two_leave_both():
    def split(owners, fraction):
        items = [SplitItem(str(i), owner, str(i), 10) for i, owner in enumerate(owners)]
        return assign_splits(items, split_by="owner", validation_fraction=fraction, seed=0)

    assert set(split("aaa", 0.3)) == {"train"}
    assert split("aaabb", 0.1) == ["train"] * 3 + ["validation"] * 2  # neither fits: the smaller one goes
    assert set(split("aabb", 0.0)) == {"train"}
    assert assign_splits([], split_by="owner", validation_fraction=0.1, seed=0) == []


def test_a_copy_is_named_after_the_first_of_its_group():
    items = [SplitItem(name, None, sha256, 1) for name, sha256 in (("a", "x"), ("b", "y"), ("c", "x"))]
    assert duplicate_groups(items) == ["a", "b", "a"]


def test_every_window_is_planned_once_in_files_below_their_size():
    draw = random.Random(0)
    models = [
        PlannedModel(i, draw.choice(["train", "validation"]), tuple(draw.choices(range(1, 900), k=n)), 200, None)
        for i, n in enumerate(draw.choices(range(1, 12), k=50))
    ]
    for limit in (1000, 3000, 20_000, 10**9):
        shards = plan_shards(models, limit)
        assert len({shard.path for shard in shards}) == len(shards)
        rows = [
            (run.model, row)
            for shard in shards
            if shard.config_name == "windows"
            for run in shard.runs
            for row in range(run.first, run.first + run.count)
        ]
        assert sorted(rows) == [(m.index, row) for m in models for row in range(len(m.row_bytes))]
        for shard in shards:
            if shard.config_name == "windows":
                sizes = [models[r.model].row_bytes[i] for r in shard.runs for i in range(r.first, r.first + r.count)]
                assert sum(sizes) <= max(limit, 900)


def facts(name: str, split: str, **columns) -> CardFacts:
    row = {"model_id": name, "owner": "ada", "licence": "MIT", "family": "toy", "status": "accepted", "reason": None}
    numbers = {"num_parameters": 90, "num_tokens": 10, "num_windows": 2}
    return CardFacts({**row, **numbers, **columns}, split, columns.get("duplicate_group", name))


def test_the_card_is_filled_from_the_counts_and_parsed_by_the_hub_s_library():
    config = TokenizeConfig(token_size=10, seed=3, title="Toys, tokenized")
    models = [
        facts("a", "train"),
        facts("b|c", "validation", licence="MIT (by mail)", family=None, owner=None),
        *(facts(f"f{i}", "train", family=f"family-{i:02}") for i in range(30)),
        facts("x", "refused", status="refused", reason="is <broken>\nand | odd", num_tokens=0, num_windows=0),
    ]
    text = dataset_card(models, config)
    card = DatasetCard(text)
    card.data.to_dict()
    assert card.data.license == ["mit", "other"]
    assert card.data.configs[0]["default"] is True
    assert [split["split"] for split in card.data.configs[1]["data_files"]] == ["train", "validation", "refused"]
    assert yaml.safe_load(text.split("---")[1])["pretty_name"] == "Toys, tokenized"
    assert "The weights of 32 trained neural networks, 2,880 parameters in all, as 320 tokens" in text
    assert "10.00% of the numbers are padding" in text
    assert "12 more" in text
    assert "| x | is &lt;broken> and \\| odd |" in text
    assert "--token-size 10 --seed 3 --title 'Toys, tokenized'" in text
    assert "More Information Needed" not in text


def test_the_content_hash_follows_weights_splits_and_settings():
    models, config = [facts("a", "train", weights_sha256="1")], TokenizeConfig()
    known = {
        content_hash(models, config),
        content_hash([facts("a", "train", weights_sha256="2")], config),
        content_hash([facts("a", "validation", weights_sha256="1")], config),
        content_hash(models, TokenizeConfig(seed=1)),
    }
    assert len(known) == 4
    assert content_hash(models, TokenizeConfig(num_workers=4)) in known
