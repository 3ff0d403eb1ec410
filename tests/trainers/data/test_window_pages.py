"""Tokens read from Parquet pages without Arrow's decoding: the same as by Arrow, or left to Arrow."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from window_fixtures import make_row

from datasets_scripts.schema import window_features
from datasets_scripts.window_rows import windows_writer
from trainers.data.windows.token_pages import TokenPages
from trainers.data.windows.window_files import WindowFiles
from trainers.data.windows.window_table import DatasetError


LENGTHS = [40, 7, 33, 16, 1, 90, 25, 64]
TOKEN_SIZE = 24


def table_of(dtype="float16"):
    generator = np.random.default_rng(0)
    basis = generator.normal(size=(6, TOKEN_SIZE))
    rows = [make_row(generator, basis, length, f"model-{i}", 0, 0) for i, length in enumerate(LENGTHS)]
    return pa.Table.from_pylist(rows, schema=window_features(TOKEN_SIZE, dtype).arrow_schema)


@pytest.fixture
def read_by_pages(monkeypatch):
    """For each row group that is read from now on: whether its tokens come from pages."""
    found = []
    plain = TokenPages.of.__func__

    def watched(cls, *arguments):
        pages = plain(cls, *arguments)
        found.append(pages is not None)
        return pages

    monkeypatch.setattr(TokenPages, "of", classmethod(watched))
    return found


def windows_of(path):
    for _, _, table in WindowFiles([str(path)]).tables([0]):
        yield from ((table.model_id(row), table, row) for row in range(len(table)))


def check_every_crop(path, table, generator):
    expected = [np.asarray(window, np.float32) for window in table["tokens"].to_pylist()]
    valid = table["valid_entries"].to_pylist()
    count = 0
    for number, (model_id, windows, row) in enumerate(windows_of(path)):
        assert model_id == f"model-{number}"
        tokens, entries = windows.window(row)
        np.testing.assert_array_equal(tokens, expected[number])
        assert entries.tolist() == valid[number]
        for _ in range(3):
            start = int(generator.integers(0, len(tokens)))
            stop = int(generator.integers(start + 1, len(tokens) + 1))
            np.testing.assert_array_equal(windows._tokens.part(row, start, stop), expected[number][start:stop])
        count += 1
    assert count == table.num_rows


PAGED = [
    {"compression": "zstd"},
    {"compression": "gzip"},
    {"compression": "zstd", "data_page_size": 1},  # many pages in a window
    {"compression": "zstd", "data_page_size": 1, "write_batch_size": 37},  # whose limits are not those of tokens
    {"compression": "zstd", "write_statistics": True},
    {"compression": "zstd", "row_group_size": 3},
]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("options", PAGED, ids=str)
def test_pages_give_the_tokens_that_were_written(tmp_path, read_by_pages, options, dtype):
    table, path = table_of(dtype), tmp_path / "windows.parquet"
    pq.write_table(table, path, **{"use_dictionary": False, **options})
    check_every_crop(path, table, np.random.default_rng(1))
    assert read_by_pages and all(read_by_pages)


def test_the_files_that_tokenize_writes_are_read_by_pages(tmp_path, read_by_pages):
    table, path = table_of(), tmp_path / "windows.parquet"
    with windows_writer(path, table.schema) as writer:
        writer.write_table(table.slice(0, 5))
        writer.write_table(table.slice(5))
    check_every_crop(path, table, np.random.default_rng(1))
    assert read_by_pages == [True, True]


LEFT_TO_ARROW = [
    {"compression": "snappy", "use_dictionary": False},
    {"compression": "none", "use_dictionary": False},
    {"compression": "zstd", "use_dictionary": True},
    {"compression": "zstd", "use_dictionary": False, "data_page_version": "2.0"},
    {"compression": "zstd", "use_dictionary": False, "use_byte_stream_split": ["tokens.list.element.list.element"]},
]


@pytest.mark.parametrize("options", LEFT_TO_ARROW, ids=str)
def test_whatever_is_stored_otherwise_is_read_by_arrow(tmp_path, read_by_pages, options):
    table, path = table_of("float32"), tmp_path / "windows.parquet"
    pq.write_table(table, path, **options)
    check_every_crop(path, table, np.random.default_rng(1))
    assert read_by_pages == [False]


def test_missing_weights_are_refused(tmp_path):
    rows = table_of().to_pylist()
    rows[2]["tokens"][5][3] = None
    path = tmp_path / "windows.parquet"
    pq.write_table(pa.Table.from_pylist(rows, table_of().schema), path, compression="zstd", use_dictionary=False)
    with pytest.raises((OSError, DatasetError), match="bytes of them|cannot be read"):
        for _, windows, row in windows_of(path):
            windows.window(row)


def test_a_damaged_page_is_refused(tmp_path):
    path = tmp_path / "windows.parquet"
    pq.write_table(table_of(), path, compression="zstd", use_dictionary=False)
    columns = pq.read_metadata(path).row_group(0)
    (tokens,) = (
        columns.column(i) for i in range(columns.num_columns) if columns.column(i).path_in_schema.startswith("tokens.")
    )
    content = bytearray(path.read_bytes())
    middle = tokens.data_page_offset + tokens.total_compressed_size // 2
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(content)
    with pytest.raises((OSError, DatasetError)):
        for _, windows, row in windows_of(path):
            windows.window(row)


def test_reading_from_a_row_on_leaves_out_the_row_groups_before(tmp_path, read_by_pages):
    paths = [tmp_path / f"{number}.parquet" for number in range(2)]
    for path in paths:
        pq.write_table(table_of(), path, compression="zstd", use_dictionary=False, row_group_size=3)
    files = WindowFiles(list(map(str, paths)))
    found = [(at, first, len(table)) for at, first, table in files.tables([1, 0], first_row=4)]
    assert found == [(0, 3, 3), (0, 6, 2), (1, 0, 3), (1, 3, 3), (1, 6, 2)]
    assert len(read_by_pages) == 5
    groups = files.by_row_group()
    assert files.num_shards == 2 and groups.num_shards == 6
    assert [(at, first, len(table)) for at, first, table in groups.tables([2, 4])] == [(0, 0, 2), (1, 0, 3)]
