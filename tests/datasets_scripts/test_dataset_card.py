"""The dataset card: valid for the Hub's library, filled from the rows, readable whatever the rows hold."""

import shlex

import pytest
import yaml
from huggingface_hub import DatasetCard

from datasets_scripts.card.dataset_card import Collection, content_hash, dataset_card
from datasets_scripts.collect.config import CollectConfig, CollectOptions
from datasets_scripts.outcomes import OUTCOMES
from datasets_scripts.tokenize_config import TokenizeConfig, TokenizeOptions
from hf_wsl.command_line import parse
from hf_wsl.options import part_of


CONFIG = TokenizeConfig(token_size=10, seed=3, title="Toys, tokenized")
COLLECTION = Collection(
    ("hf-wsl", "collect"), "https://huggingface.co", "2026-11-02", {"image-classification": 40, "kitchen": 2}, 41, 30
)


def row(name: str, split: str, **columns) -> dict:
    """A row of the config `models`; refused if the split is."""
    refused = split == "refused"
    stated = {"owner": "ada", "license": "MIT", "architecture": "resnet18", "family": "resnet", "task": None}
    known = {"training_data": None, "base_model": None, "source": name, "revision": None, "library": None}
    numbers = {"num_parameters": 90, "num_tokens": 10, "num_windows": 2, "padding": 0.1}
    numbers = dict.fromkeys(numbers, 0) if refused else numbers
    groups = {"duplicate_group": None if refused else name, "near_copy_group": None if refused else name}
    status = {"status": "refused", "outcome": "damaged"} if refused else {"status": "accepted", "outcome": "accepted"}
    return {
        "model_id": name,
        **stated,
        **known,
        **numbers,
        **groups,
        **status,
        "weights_sha256": None if refused else name,
        "split": split,
        "reason": "is broken" if refused else None,
        **columns,
    }


def parsed(text: str) -> DatasetCard:
    """As the Hub's client reads it; every section has a heading of its own and no placeholder is left."""
    card = DatasetCard(text)
    card.data.to_dict()
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert len(headings) == len(set(headings))
    assert "More Information Needed" not in text
    assert "None" not in text
    return card


def test_the_card_is_filled_from_the_counts_and_parsed_by_the_hub_s_library():
    rows = [
        row("a", "train"),
        row("b|c", "validation", license="MIT (by mail)", family=None, owner=None),
        *(row(f"f{i}", "train", family=f"family-{i:02}", owner=f"owner-{i}") for i in range(30)),
        row("x", "refused", reason="is <broken>\nand | odd"),
    ]
    text = dataset_card(rows, CONFIG)
    card = parsed(text)
    assert card.data.license == ["mit", "other"]
    assert card.data.configs[0]["default"] is True
    assert [split["split"] for split in card.data.configs[1]["data_files"]] == ["train", "validation", "refused"]
    assert yaml.safe_load(text.split("---")[1])["pretty_name"] == "Toys, tokenized"
    assert "The weights of 32 trained neural networks, 2,880 parameters in all, as 320 tokens" in text
    assert "10.00% of the numbers are padding" in text
    assert "| train | 31 | 31 | 62 | 310 | 2,790 |" in text
    assert "| refused | 1 | 1 | 0 | 0 | 0 |" in text
    assert "12 more" in text  # owners
    assert "| x | damaged | is &lt;broken> and \\| odd |" in text
    assert "--token_size 10 --seed 3 --title 'Toys, tokenized'" in text
    assert "hf-wsl tokenize PATH..." in text
    assert "Subsets by family" not in text
    assert "Withheld" not in text


def test_the_composition_is_a_table_and_a_picture_if_there_is_one():
    rows = [row("a", "train"), row("b", "train", training_data="coco")]
    text = dataset_card(rows, CONFIG, picture="composition.png")
    parsed(text)
    assert "](composition.png)" in text
    assert "| ConvNet | resnet | 2 | 100.0% | 180 |" in text
    assert "| coco | 1 | 50.0% | 90 |" in text
    assert "![" not in dataset_card(rows, CONFIG)


def test_families_with_files_of_their_own_are_configs():
    rows = [
        row("a", "train"),
        row("b", "validation"),
        row("c", "train", family="vit"),
        row("d", "train", family="odd"),
    ]
    families = {"other": ["train"], "resnet": ["train", "validation"], "vit": ["train"]}
    text = dataset_card(rows, CONFIG, families=families, dataset_id="org/weights")
    configs = {config["config_name"]: config for config in parsed(text).data.configs}
    assert list(configs) == ["windows", "models", "windows-other", "windows-resnet", "windows-vit"]
    assert [files["split"] for files in configs["windows-resnet"]["data_files"]] == ["train", "validation"]
    assert 'load_dataset("org/weights", "windows-other")' in text
    assert "<this dataset>" not in text
    assert "| windows-resnet | train 1, validation 1 | 4 | 20 | 180 |" in text
    assert "| windows-other | train 1 | 2 | 10 | 90 |" in text  # a family that the list of models made up


def test_licenses_say_whether_weights_may_be_passed_on_and_withheld_models_are_named():
    rows = [row("a", "train"), row("b", "train", license=None), row("c", "train", license="cc-by-nd-4.0")]
    hidden = [row(f"w{i}", "validation", license="gemma") for i in range(25)]
    reasons = {f"w{i}": "license [gemma] says so" for i in range(25)}
    text = dataset_card([*rows, *hidden], CONFIG, withheld=reasons)
    data = parsed(text).data
    assert data.license == ["cc-by-nd-4.0", "mit", "unknown"]
    windows, models = ([files["split"] for files in config["data_files"]] for config in data.configs)
    assert (windows, models) == (["train"], ["train", "validation"])  # no window of the validation split is there
    assert "The weights of 3 trained neural networks" in text
    assert "| MIT | 1 | 10 | 90 | yes |" in text
    assert "| cc-by-nd-4.0 | 1 | 10 | 90 | no |" in text
    assert "| not stated | 1 | 10 | 90 | no |" in text
    assert "windows of 25 models with 2,250 parameters are not in this copy, of which 20 are shown" in text
    assert r"| w0 | license \[gemma\] says so |" in text
    assert "| w20 |" not in text


def test_copies_and_near_copies_are_counted_and_their_groups_named():
    groups = ["a", "a", "b", "a", "e", "e"]
    rows = [row(name, "train", near_copy_group=group) for name, group in zip("abcdef", groups, strict=True)]
    rows[1]["duplicate_group"] = "a"
    text = dataset_card(rows, CONFIG)
    parsed(text)
    assert (
        "1 model is a bit-identical copy of others (`duplicate_group`). 5 models are in 2 groups of near copies"
        in text
    )
    assert "| a | 3 |\n| e | 2 |" in text
    assert "0 models are bit-identical copies" in dataset_card([row("a", "train")], CONFIG)


def test_outcomes_are_counted_in_their_order_with_examples_of_each():
    codes = [code for code in OUTCOMES if code != "accepted"]
    refused = [row(f"{code}-{i}", "refused", outcome=code, reason=f"{code} " * 90) for i in range(9) for code in codes]
    text = dataset_card([row("a", "train"), *refused], CONFIG)
    parsed(text)
    lines = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    counted = lines[lines.index("outcome") + 2 :][: len(OUTCOMES)]
    assert counted == list(OUTCOMES)
    assert f"| damaged | {OUTCOMES['damaged']} | 9 |" in text
    assert f"{len(refused)} models were refused, of which {len(codes)} are shown" in text
    assert all(f"| {code}-0 | {code} | {code}" in text and f"| {code}-1 |" not in text for code in codes)
    assert max(map(len, text.splitlines())) < 1000


def test_a_dataset_of_refused_models_has_a_card_too():
    text = dataset_card([row(f"r{i}", "refused") for i in range(4)], CONFIG)
    card = parsed(text)
    assert [config["config_name"] for config in card.data.configs] == ["models"]
    assert "No model could be tokenized." in text
    assert "4 models were refused; all are in the split `refused`" in text
    assert "| r3 | damaged | is broken |" in text


def test_a_zoo_says_that_it_was_made_as_one_and_what_its_splits_keep_together():
    text = dataset_card([row("a", "train"), row("b", "test")], CONFIG, properties="digest")
    card = parsed(text)
    assert [config["config_name"] for config in card.data.configs] == ["windows", "models", "properties"]
    assert "hf-wsl zoo --tokenize true --output_dir DIR --tokens.token_size 10 --tokens.seed 3" in text
    assert "All checkpoints of a member of the zoo are in one split" in text
    assert "always in one split" not in text and "hf-wsl tokenize" not in text


@pytest.mark.parametrize(
    ("config", "collected"),
    [
        (CollectConfig(), COLLECTION),
        (CollectConfig(num_train=9, licenses="mit,isc", split_files_by_family=False, title="a 'b' $c"), COLLECTION),
        (TokenizeConfig(validation_fraction=0.25, min_parameters=7, split_files_by_family=True), None),
    ],
)
def test_the_command_gives_the_same_settings_again(config, collected):
    text = dataset_card([row("a", "train")], config, collected=collected)
    parsed(text)
    line = text.split("## How it was made")[1].split("```")[1].strip()
    program, name, *arguments = shlex.split(line)
    assert program == "hf-wsl"
    options = parse(CollectOptions if collected else TokenizeOptions, arguments, program=name)
    assert str(options.output_dir) == "DIR"
    assert part_of(options, type(config)) == config


def test_a_collection_names_the_hub_the_day_and_the_numbers_seen():
    text = dataset_card([row("a", "train")], CollectConfig(), collected=COLLECTION)
    assert "On 2026-11-02, https://huggingface.co listed 41 models (`image-classification` 40, `kitchen` 2" in text
    assert "30 of them were looked at" in text
    assert "HF_ENDPOINT" not in text
    mirror = Collection(("hf-wsl", "collect", "ada/net"), "http://hub.lab:80", "2026-11-02", {"named": 1}, 1, 1)
    text = dataset_card([row("a", "train")], CollectConfig(), collected=mirror)
    assert "HF_ENDPOINT=http://hub.lab:80 hf-wsl collect ada/net --output_dir DIR\n" in text


def test_the_content_hash_follows_weights_splits_and_settings():
    rows, config = [row("a", "train")], TokenizeConfig()
    known = {
        content_hash(rows, config),
        content_hash([row("a", "train", weights_sha256="2")], config),
        content_hash([row("a", "validation")], config),
        content_hash(rows, TokenizeConfig(seed=1)),
    }
    assert len(known) == 4
    assert content_hash(rows, TokenizeConfig(num_workers=4)) in known
