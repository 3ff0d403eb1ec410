"""Causal language modeling data: text in three splits, cut into blocks of tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import datasets
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from datasets_scripts.schema import SPLITS
from hf_wsl.errors import one_line
from hf_wsl.files import sha256
from modeling_wsl.checkpoints.hub import verify

from .data_config import TextDataConfig
from .public_dataset import FixedRows, PublicDatasetError, existing, read_dataset


logger = logging.getLogger(__name__)
END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES += ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")
_LINE, _DOCUMENT, _TOKENS = "line", "document", "input_ids"


class TextBlocks(Dataset):
    """Examples `{"input_ids": int64 [block]}`, cut from a text one after the other.

    Args:
        rows: tokens `[N, block]`, int32.
        count: how many of them to use, from the first.
    """

    def __init__(self, rows: FixedRows, count: int) -> None:
        self.rows, self.count = rows, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        tokens = torch.from_numpy(self.rows.take(np.asarray(indices)).astype(np.int64))
        return [{"input_ids": block} for block in tokens]


@dataclass(frozen=True)
class TextSplits:
    """Three splits of a text, in blocks of tokens. A rest that fills no block is left out."""

    config: TextDataConfig
    tokenizer: PreTrainedTokenizerBase
    train: TextBlocks
    validation: TextBlocks
    test: TextBlocks

    @property
    def vocab_size(self) -> int:
        """Rows that a model's embedding needs."""
        return len(self.tokenizer)

    def facts(self) -> dict[str, Any]:
        """What a result must say about its data; JSON-serializable. `fingerprint` is of sampled blocks."""
        splits = {split: getattr(self, split) for split in SPLITS}
        sampled = []
        for blocks in splits.values():
            sample = np.arange(min(64, len(blocks))) * len(blocks) // min(64, len(blocks))
            sampled.append(blocks.rows.take(sample).astype("<i4"))
        return {
            "text": self.config.text,
            "config": asdict(self.config),
            "sizes": {split: len(blocks) for split, blocks in splits.items()},
            "block_size": self.config.block_size,
            "vocab_size": self.vocab_size,
            "fingerprint": sha256(sampled),
        }


def load_text(config: TextDataConfig) -> TextSplits:
    """Reads texts, splits them in order, and turns them into blocks of tokens, which lie in the cache of `datasets`.

    A source that names splits "validation" or "test" keeps them. Else its last lines (rows) are taken for them, so
    that no part of a text is trained on whose neighbor is tested.

    Raises:
        PublicDatasetError: no such text or column, or a split that is shorter than a block.
        ValueError: the tokenizer cannot be read.
    """
    sources = [source.strip() for source in config.text.split(",") if source.strip()]
    if not sources:
        raise PublicDatasetError("no text is given; set --data.text to files or dataset ids on the Hub.")
    parts = [_read(source, config) for source in sources]
    tokenizer = _open_tokenizer(config.tokenizer) if config.tokenizer else train_tokenizer(_lines(parts), config)
    blocks = {}
    for split in SPLITS:
        limit = getattr(config, f"max_{split}_tokens")
        cut = [_blocks(part[split], tokenizer, config) for part in parts]
        stored = FixedRows(datasets.concatenate_datasets(cut), _TOKENS)
        count = min(len(stored), limit // config.block_size) if limit else len(stored)
        if count == 0:
            raise PublicDatasetError(
                f"the {split} part of '{config.text}' is shorter than a block of {config.block_size} tokens; give "
                f"more text, a smaller block_size, or a larger max_{split}_tokens or {split}_fraction."
            )
        blocks[split] = TextBlocks(stored, count)
    return TextSplits(config, tokenizer, **blocks)


def train_tokenizer(lines: Iterable[str], config: TextDataConfig) -> PreTrainedTokenizerFast:
    """A byte-level BPE, GPT-2's kind: it knows every byte, so that no text is without tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


def _open_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        for file in TOKENIZER_FILES:
            verify(name, file, {})
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer '{name}' cannot be read: {one_line(error)}") from error


def _read(source: str, config: TextDataConfig) -> dict[str, datasets.Dataset]:
    """The three splits of a source, one column each: `_LINE`, or `_DOCUMENT` where every text is to get an end."""
    path = existing(source)
    column, kind = "text", _LINE
    if path is None:
        splits = dict(read_dataset(source, revision=config.revision, subset=config.subset))
        column, kind = config.text_column, _DOCUMENT if config.end_of_text else _LINE
    else:
        files = sorted(map(str, path.rglob("*.txt"))) if path.is_dir() else [str(path)]
        if not files:
            raise PublicDatasetError(f"'{source}' holds no .txt file.")
        splits = dict(read_dataset(source, "text", data_files={"train": files}, keep_linebreaks=True))
    if "train" not in splits:
        raise PublicDatasetError(f"'{source}' has no split 'train' (splits: {', '.join(splits)}).")
    features = splits["train"].features
    if getattr(features.get(column), "dtype", None) not in ("string", "large_string"):
        raise PublicDatasetError(
            f"'{source}' has no column '{column}' of text (columns: {', '.join(features)}); set --data.text_column."
        )
    rows, end = splits["train"], len(splits["train"])
    found = {}
    for split, fraction in (("test", config.test_fraction), ("validation", config.validation_fraction)):
        if split in splits:
            found[split] = splits[split]
            continue
        start = end - round(fraction * len(rows))
        found[split], end = rows.select(range(start, end)), start
    found["train"] = rows.select(range(end))
    return {split: part.select_columns(column).rename_column(column, kind) for split, part in found.items()}


def _lines(parts: Iterable[dict[str, datasets.Dataset]]) -> Iterator[str]:
    """The texts of the training parts."""
    for part in parts:
        for batch in part["train"].iter(1000):
            yield from next(iter(batch.values()))


def _blocks(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, config: TextDataConfig) -> datasets.Dataset:
    """Rows of `block_size` tokens; the rest of every ten thousand texts is left out."""
    return rows.map(
        _tokenize,
        batched=True,
        batch_size=10_000,
        fn_kwargs={"tokenizer": tokenizer, "block_size": config.block_size},
        remove_columns=rows.column_names,
        features=datasets.Features({_TOKENS: datasets.List(datasets.Value("int32"), length=config.block_size)}),
        desc="tokenize text",
    )


def _tokenize(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, block_size: int
) -> dict[str, np.ndarray]:
    ((kind, texts),) = batch.items()
    tokens = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    end = [tokenizer.eos_token_id] if kind == _DOCUMENT and tokenizer.eos_token_id is not None else []
    flat = np.fromiter((token for text in tokens for token in (*text, *end)), np.int32)
    return {_TOKENS: list(flat[: len(flat) // block_size * block_size].reshape(-1, block_size))}
