"""Training windows as a stream: which crops come, in which order, and that a resumed stream goes on exactly."""

from itertools import islice

import pyarrow.parquet as pq
import pytest
import torch
from window_fixtures import crop_start, write_dataset

from modeling_wsl.tokens.manifest import Segment, positions_from_segments
from trainers.data.windows.dataset_source import DatasetSource, SplitSize
from trainers.data.windows.training_batches import BatchPlan, StreamedBatches
from trainers.data.windows.window_stream import WindowStream, _window_key
from trainers.data.windows.window_table import DatasetError


LENGTHS = {"train": [40, 7, 33, 16, 1, 90, 25, 64, 12, 20, 31, 5, 18, 70], "validation": [30, 5, 44, 9, 21]}
WINDOWS = len(LENGTHS["train"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("stream") / "data", LENGTHS, rows_per_file=4, rows_per_group=2)


@pytest.fixture(scope="module")
def source(folder):
    return DatasetSource(str(folder))


@pytest.fixture(scope="module")
def rows(source):
    return source.stream()


@pytest.fixture(scope="module")
def names(source):
    """Window key -> row of the training split."""
    return {_window_key(row["model_id"], row["token_start"]): i for i, row in enumerate(source.load()["train"])}


def stream_of(rows, **options):
    defaults = {"window_size": 16, "batch_size": 1, "seed": 3, "buffer_size": 4}
    return WindowStream(rows, **{**defaults, **options})


def batches_of(stream, count):
    return [batch for batch, _ in islice(stream, count)]


def visited(stream, count, names):
    return [names[int(batch["window"][0])] for batch in batches_of(stream, count)]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_crop_equals_the_row_sliced_by_hand(rows, source, names):
    stored = source.load()["train"]
    for number, batch in enumerate(batches_of(stream_of(rows, batch_size=3), 12)):
        for i, key in enumerate(batch["window"].tolist()):
            row = stored[names[key]]
            length = min(16, row["num_tokens"])
            epoch = (3 * number + i) // WINDOWS
            start = crop_start(3, epoch, key, row["num_tokens"], 16)
            part = slice(start, start + length)
            columns = (row[f"segment_{name}"] for name in ("layer", "position", "stride", "length"))
            segments = [Segment(*values) for values in zip(*columns, strict=True)]
            assert torch.equal(batch["tokens"][i, :length], torch.tensor(row["tokens"])[part].half())
            assert batch["valid_entries"][i, :length].tolist() == row["valid_entries"][part]
            positions = positions_from_segments(row["token_start"], segments)[part]
            assert torch.equal(batch["positions"][i, :length], positions)
            for name in ("tokens", "valid_entries", "positions"):
                assert not batch[name][i, length:].any()


@pytest.mark.parametrize("crops_per_window", [1, 2])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_epoch_visits_every_window_once_over_all_processes(rows, names, processes, crops_per_window):
    seen = {epoch: [] for epoch in range(4)}
    for rank in range(processes):
        options = {"rank": rank, "world_size": processes, "crops_per_window": crops_per_window}
        for batch, place in islice(stream_of(rows, **options), 5 * WINDOWS * crops_per_window):
            if place.epoch in seen:
                seen[place.epoch].append(names[int(batch["window"][0])])
    for windows in seen.values():
        assert sorted(windows) == sorted(list(range(WINDOWS)) * crops_per_window)
    if processes == 1:
        assert len({tuple(windows) for windows in seen.values()}) == 4


def test_crops_depend_on_seed_window_and_visit_alone(rows, names):
    def crops(**options):
        found = {}
        for batch in batches_of(stream_of(rows, **options), 3 * WINDOWS):
            found.setdefault(names[int(batch["window"][0])], []).append(batch["tokens"][0])
        return found

    one_by_one, all_at_once = crops(), crops(buffer_size=100)
    for row, tokens in one_by_one.items():
        assert all(torch.equal(a, b) for a, b in zip(tokens, all_at_once[row], strict=True))
    # Two crops of a window at once are the crops of two epochs that follow each other.
    both = [crops(crops_per_window=2)[row][:2] for row in range(WINDOWS)]
    for row, pair in enumerate(both):
        assert all(any(torch.equal(crop, other) for other in pair) for crop in one_by_one[row][:2])
    assert any(not torch.equal(crops(seed=4)[row][0], one_by_one[row][0]) for row in range(WINDOWS))


def test_the_same_seed_gives_the_same_order_and_another_does_not(rows, names):
    first, again, other = (visited(stream_of(rows, seed=seed), WINDOWS, names) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("options", [{}, {"crops_per_window": 3, "buffer_size": 7}, {"buffer_size": 1}])
def test_a_stream_that_begins_at_any_place_equals_the_one_that_came_to_it(rows, options):
    batches = list(islice(stream_of(rows, batch_size=3, **options), 20))
    for stop in range(0, 19, 3):
        place = batches[stop][1]
        rest = list(islice(stream_of(rows, batch_size=3, place=place, **options), 19 - stop))
        for (first, reached), (second, expected) in zip(rest, batches[stop + 1 :], strict=True):
            assert same(first, second) and reached == expected


def test_a_block_is_shuffled_and_no_more_than_the_next_one_is_read_meanwhile(rows, names, monkeypatch):
    read = []
    cut = WindowStream._cut

    def counted(self, table, crop, key, shard):
        read.append(names[key])
        return cut(self, table, crop, key, shard)

    monkeypatch.setattr(WindowStream, "_cut", counted)
    given = []
    for batch, _ in islice(stream_of(rows, buffer_size=5), WINDOWS):
        given.append(names[int(batch["window"][0])])
        assert len(given) <= len(read) <= len(given) + 6
    assert sorted(given[:5]) == sorted(read[:5])
    assert given != read[:WINDOWS]


def plan_of(**options):
    defaults = {"window_size": 16, "batch_size": 2, "accumulation": 2, "rank": 0, "world_size": 1, "seed": 3}
    return BatchPlan(**{**defaults, "num_workers": 0, "buffer_size": 4, **options})


def test_threads_change_nothing_and_a_stream_resumes_at_any_number_of_them(rows):
    alone = StreamedBatches(rows, SplitSize(WINDOWS, 1))
    expected = list(alone.batches(plan_of(), 0, 6))
    whole = StreamedBatches(rows, SplitSize(WINDOWS, 1))
    got = list(whole.batches(plan_of(num_workers=2), 0, 6))
    assert len(got) == 12 and all(same(a, b) for a, b in zip(got, expected, strict=True))

    part = StreamedBatches(rows, SplitSize(WINDOWS, 1))
    for _ in islice(part.batches(plan_of(num_workers=3), 0, 6), 4):  # two steps; more has been read ahead
        pass
    rest = StreamedBatches(rows, SplitSize(WINDOWS, 1))
    rest.resume([part.state()])
    resumed = list(rest.batches(plan_of(num_workers=1), 2, 6))
    assert len(resumed) == 8 and all(same(a, b) for a, b in zip(resumed, got[4:], strict=True))
    assert rest.state() == whole.state() == alone.state()


def test_other_processes_than_before_go_on_with_the_next_epoch_and_say_so(rows, caplog):
    before = StreamedBatches(rows, SplitSize(WINDOWS, 1))
    list(before.batches(plan_of(), 0, 5))
    assert before.state()[0] == 1
    after = StreamedBatches(rows, SplitSize(WINDOWS, 1))
    after.resume([before.state()])
    list(islice(after.batches(plan_of(world_size=2), 5, 6), 1))
    assert after.state()[0] == 2
    assert "by 1 processes and is by 2 now: it goes on with epoch 2" in caplog.text


def test_too_few_row_groups_for_the_processes_are_refused(rows):
    with pytest.raises(DatasetError, match="has 7 row groups, too few for 9 processes.*without --streaming"):
        StreamedBatches(rows, SplitSize(WINDOWS, 1)).batches(plan_of(world_size=9), 0, 1)


def test_reading_from_a_row_on_leaves_out_the_row_groups_before(folder, rows):
    found = [(at, first, len(table)) for at, first, table in rows.tables([(1, 2), (0, 0)])]
    assert found == [(0, 2, 2), (1, 0, 2), (1, 2, 2)]
    groups = rows.by_row_group()
    assert rows.num_shards == 4 and groups.num_shards == 7
    assert [(at, first, len(table)) for at, first, table in groups.tables([(2, 0), (6, 0)], 2)] == [
        (0, 0, 2),
        (1, 0, 2),
    ]


def test_a_weight_that_is_not_finite_names_file_and_model(tmp_path):
    def damage(row):
        if row["num_tokens"] == 90:
            row["tokens"][40][3] = float("nan")

    files = DatasetSource(str(write_dataset(tmp_path / "nan", LENGTHS, rows_per_file=4, edit=damage))).stream()
    with pytest.raises(DatasetError, match=r"file train-00001-of-00004.parquet, model 'train/model-2': .* not finite"):
        batches_of(stream_of(files, window_size=90), 2 * WINDOWS)


@pytest.mark.parametrize("checked", [True, False])
def test_a_page_that_was_changed_after_it_was_written_is_refused_by_its_checksum(tmp_path, checked):
    source = write_dataset(tmp_path / "data", LENGTHS, rows_per_file=20)
    path = next((source / "windows").glob("train-*"))
    table = pq.read_table(path)
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=checked)
    columns = pq.read_metadata(path).row_group(0)
    (tokens,) = (
        columns.column(i) for i in range(columns.num_columns) if columns.column(i).path_in_schema.startswith("tokens.")
    )
    content = bytearray(path.read_bytes())
    content[tokens.data_page_offset + tokens.total_compressed_size - 100] ^= 1
    path.write_bytes(content)
    files = DatasetSource(str(source)).stream()
    if not checked:  # nothing tells: hence the checksums
        assert len(list(files.tables([(0, 0)]))) == 1
        return
    with pytest.raises(DatasetError, match="file train-00000-of-00001.parquet: cannot be read.*[Cc]hecksum|CRC"):
        list(files.tables([(0, 0)]))
