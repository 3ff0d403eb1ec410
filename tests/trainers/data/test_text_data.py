"""Text becomes three splits of token blocks."""

import json

import pytest
import torch
from datasets import Dataset

from trainers.data.public_dataset import PublicDatasetError
from trainers.data.text_data import END_OF_TEXT, TextDataConfig, load_text


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(
        "".join(f"Line {number}: the cat sat on mat {number % 17}, wrote — and left.\n" for number in range(2000))
    )
    return path


def load(text, **options):
    return load_text(TextDataConfig(text=str(text), **{"block_size": 32, "vocab_size": 400, **options}))


def text_of(splits, name):
    return splits.tokenizer.decode(torch.cat([block["input_ids"] for block in getattr(splits, name)]))


def test_blocks_are_the_text_in_order_and_the_test_is_its_end(book):
    splits = load(book)
    text = book.read_text()
    lines = text.splitlines(keepends=True)
    assert text.startswith(text_of(splits, "train"))
    assert "".join(lines[1600:]).startswith(text_of(splits, "validation"))
    assert "".join(lines[1800:]).startswith(text_of(splits, "test"))
    assert len(text_of(splits, "test")) > 0.95 * len("".join(lines[1800:]))
    block = splits.train[0]["input_ids"]
    assert (block.shape, block.dtype) == ((32,), torch.int64)
    assert splits.vocab_size <= 400


def test_the_tokenizer_is_trained_on_the_training_part_alone_and_always_the_same(book, tmp_path):
    splits = load(book)
    changed = tmp_path / "changed.txt"
    lines = book.read_text().splitlines(keepends=True)
    changed.write_text("".join([*lines[:1600], *("quixotic zephyr\n" for _ in range(400))]))
    assert load(changed).tokenizer.get_vocab() == splits.tokenizer.get_vocab()
    assert load(book).facts() == splits.facts()


def test_a_saved_tokenizer_gives_the_same_tokens(book, tmp_path):
    splits = load(book)
    splits.tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = load(book, tokenizer=str(tmp_path / "tokenizer"))
    assert torch.equal(again.train[5]["input_ids"], splits.train[5]["input_ids"])


def test_several_texts_are_each_split_and_limits_count_tokens(book, tmp_path):
    other = tmp_path / "more"
    other.mkdir()
    (other / "a.txt").write_text("Another text altogether, and a shorter one.\n" * 300)
    both, one = load(f"{book}, {other}"), load(book)
    assert len(both.test) > len(one.test)
    assert "Another" in text_of(both, "test") and "Another" in text_of(both, "train")
    limited = load(book, max_train_tokens=320, max_test_tokens=64)
    assert (len(limited.train), len(limited.test)) == (10, 2)
    facts = json.loads(json.dumps(limited.facts()))
    assert facts["sizes"] == {"train": 10, "validation": len(one.validation), "test": 2}


def test_a_dataset_of_the_hub_keeps_its_splits_and_its_documents_get_an_end(hub, tmp_path):
    for split, word in (("train", "apple"), ("test", "pear")):
        Dataset.from_dict({"text": [f"{word} number {i}" for i in range(300)]}).to_parquet(
            tmp_path / f"{split}.parquet"
        )
    hub.add("org/words", {path.name: path for path in tmp_path.iterdir()}, repo_type="dataset")
    splits = load("org/words", end_of_text=True)
    assert "pear" not in text_of(splits, "train") + text_of(splits, "validation")
    assert "apple" not in text_of(splits, "test")
    assert f"number 3{END_OF_TEXT}apple" in text_of(splits, "train")
    assert END_OF_TEXT not in text_of(load("org/words"), "train")


@pytest.mark.parametrize("times", [1, 2])
def test_a_file_of_the_hub_with_a_wrong_byte_is_fetched_again_or_refused(hub, tmp_path, times):
    lines = "".join(f"apple number {i}\n" for i in range(300 + times))
    hub.add(f"org/text{times}", {"train.txt": lines}, repo_type="dataset")
    fault = hub.fault("GET .*train.txt", times=times, corrupt=3)
    if times == 1:
        assert "apple number 0" in text_of(load("org/text1"), "train")
    else:
        with pytest.raises(PublicDatasetError, match="org/text2': train.txt has other bytes than the Hub states"):
            load("org/text2")
    assert fault.fired == times


def test_text_that_cannot_be_learned_from_is_refused_with_what_to_do(hub, book, tmp_path):
    (tmp_path / "short.txt").write_text("Too short.\n" * 20)
    (tmp_path / "pictures").mkdir()
    for text, reason in (
        (tmp_path / "short.txt", "shorter than a block of 512"),
        (tmp_path / "none", "neither a file, a folder nor a dataset id"),
        (tmp_path / "pictures", "holds no .txt file"),
        ("org/none", "org/none.*doesn't exist on the Hub.*hf auth login"),
        ("", "no text is given"),
    ):
        with pytest.raises(PublicDatasetError, match=reason):
            load(text, block_size=512)
    with pytest.raises(ValueError, match="tokenizer 'org/none' cannot be read"):
        load(book, tokenizer="org/none")


@pytest.mark.parametrize("option", [{"vocab_size": 10}, {"block_size": 1}, {"test_fraction": 0.95}])
def test_an_impossible_option_is_refused_by_name(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        TextDataConfig(text="x", **option)
