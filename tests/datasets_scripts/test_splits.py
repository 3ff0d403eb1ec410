"""Splits: nothing that belongs together parts, whatever the seed; the same seed draws the same."""

import random
from dataclasses import replace
from itertools import combinations

import pytest

from datasets_scripts.assembly import AssembledModel, plan_shards
from datasets_scripts.splits import SplitItem, assign_splits, duplicate_groups
from datasets_scripts.tokenize_config import TokenizeConfig


def population(seed: int, count: int = 60, owners: int = 12) -> list[SplitItem]:
    """Models of a dozen owners and of none, every fifth a copy of another's model, every seventh a near copy."""
    draw = random.Random(seed)
    items = []
    for number in range(count):
        owner = draw.choice([*(f"owner-{i}" for i in range(owners)), None])
        sha256 = draw.choice(items).weights_sha256 if items and number % 5 == 0 else f"hash-{number}"
        near_to = draw.choice(items).near_copy_group if items and number % 7 == 0 else f"model-{number}"
        items.append(SplitItem(f"model-{number}", owner, sha256, draw.randint(1, 1000), near_to))
    return items


def divide(items, how, split_by, seed):
    """Splits by share of tokens or by number of models."""
    if how == "tokens":
        return assign_splits(items, split_by=split_by, validation_fraction=0.3, seed=seed)
    return assign_splits(items, split_by=split_by, validation_models=len(items) // 3, seed=seed)


@pytest.mark.parametrize("how", ["tokens", "models"])
@pytest.mark.parametrize("split_by", ["owner", "model"])
@pytest.mark.parametrize("seed", range(20))
def test_copies_near_copies_and_owners_are_not_divided(how, split_by, seed):
    items = population(seed, owners=60)
    splits = divide(items, how, split_by, seed)
    assert set(splits) == {"train", "validation"}
    for key in ("weights_sha256", "near_copy_group", "owner")[: 3 if split_by == "owner" else 2]:
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
    for how in ("tokens", "models"):
        draws = [divide(items, how, "model", seed) for seed in (0, 0, 1)]
        assert draws[0] == draws[1] != draws[2]


def test_without_near_copies_the_split_is_that_of_the_hashes_and_owners_alone():
    items = [replace(item, near_copy_group=None) for item in population(3)]
    alone = [replace(item, near_copy_group=item.model_id) for item in items]
    for split_by in ("owner", "model"):
        assert divide(items, "tokens", split_by, 0) == divide(alone, "tokens", split_by, 0)


def test_near_copies_tie_their_owners():
    items = [SplitItem(str(i), owner, str(i), 10) for i, owner in enumerate("aabbcc")]
    tied = [replace(item, near_copy_group="base") if i in (1, 2) else item for i, item in enumerate(items)]
    for how in ("tokens", "models"):
        splits = divide(tied, how, "owner", 0)
        assert splits == ["train"] * 4 + ["validation"] * 2


def sizes_to_items(sizes: list[int]) -> list[SplitItem]:
    return [SplitItem(f"{g}-{i}", f"owner-{g}", f"{g}-{i}", 1) for g, size in enumerate(sizes) for i in range(size)]


def test_validation_has_as_many_models_as_whole_groups_allow_and_never_more():
    draw = random.Random(0)
    for seed in range(60):
        sizes = [draw.choice((1, 2, 3, 5, 8, 13)) for _ in range(draw.randint(1, 8))]
        items, wanted = sizes_to_items(sizes), draw.randint(0, sum(sizes) + 2)
        splits = assign_splits(items, split_by="owner", validation_models=wanted, seed=seed)
        unions = [
            sum(union) for n in range(len(sizes)) for union in combinations(sizes, n)
        ]  # at least one is left out
        assert splits.count("validation") == max(size for size in unions if size <= wanted)


def test_two_hundred_of_two_thousand_models_are_held_out_exactly():
    draw = random.Random(1)
    items = sizes_to_items([400, 300, 250] + [draw.choice((1, 1, 1, 2, 3, 7)) for _ in range(500)])
    for seed in range(3):
        splits = assign_splits(items, split_by="owner", validation_models=200, seed=seed)
        assert splits.count("validation") == 200


def test_every_group_comes_to_validation_with_some_seed():
    items = sizes_to_items([1, 2, 3, 4, 5, 6])
    seen = set()
    for seed in range(60):
        splits = assign_splits(items, split_by="owner", validation_models=7, seed=seed)
        seen |= {item.owner for item, split in zip(items, splits, strict=True) if split == "validation"}
    assert len(seen) == 6


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
    for how in ("tokens", "models"):
        assert set(divide([SplitItem("one", "a", "x", 1)], how, "owner", 0)) == {"train"}
        assert divide([], how, "owner", 0) == []


def test_a_copy_is_named_after_the_first_of_its_group():
    items = [SplitItem(name, None, sha256, 1) for name, sha256 in (("a", "x"), ("b", "y"), ("c", "x"))]
    assert duplicate_groups(items) == ["a", "b", "a"]


def test_each_window_is_planned_once_in_files_below_their_size():
    draw = random.Random(0)
    models = []
    for index in range(50):
        row = {
            "status": "accepted",
            "split": draw.choice(["train", "validation"]),
            "family": draw.choice(["vit", "resnet", "made-up"]),
            "num_tokens": draw.randint(1, 200),
            "redistributable": draw.random() < 0.7,
        }
        models.append(AssembledModel(index, "", row, None, None, 200))
    for limit in (1, 3, 20, 10**6):
        config = TokenizeConfig(token_size=9, window_size=40, max_shard_size=f"{limit}KB", split_files_by_family=True)
        shards = plan_shards(models, config)
        assert len({shard.path for shard in shards}) == len(shards)
        rows = []
        for shard in shards:
            if shard.config_name != "windows":
                continue
            here = [(run.model, row) for run in shard.runs for row in range(run.first, run.first + run.count)]
            tokens = [min(40, models[m].row["num_tokens"] - row * 40) for m, row in here]
            assert sum(tokens) * config.token_bytes <= max(1000 * limit, 40 * config.token_bytes)
            rows += here
            for model in {m: models[m].row for m, _ in here}.values():
                family = "other" if model["family"] == "made-up" else model["family"]
                local = "" if model["redistributable"] else "local-"
                assert shard.path.startswith(f"windows/{model['split']}-{family}-{local}00")
        assert sorted(rows) == [(m.index, n) for m in models for n in range(-(-m.row["num_tokens"] // 40))]
