import pickle
import threading
from itertools import islice

import numpy as np
import pytest
import torch
from window_fixtures import crop_start, write_dataset

from modeling_wsl.tokens.manifest import Segment, positions_from_segments
from trainers.data.windows.crops import Crop, TrainingOrder, batches_of, crop_starts, steps_for_epochs, tiles
from trainers.data.windows.dataset_source import load_windows
from trainers.data.windows.reading import BatchMemory
from trainers.data.windows.window_data import WindowDataset, make_loader
from trainers.data.windows.window_table import DatasetError, WindowTable, collate


LENGTHS = {"train": [40, 7, 33, 16, 1, 90, 25, 64, 12], "validation": [30, 5]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "windows", LENGTHS)


@pytest.fixture(scope="module")
def rows(folder):
    return load_windows(str(folder))["train"]


@pytest.fixture(scope="module")
def dataset(rows):
    return WindowDataset(rows, pad_to=16)


def order_of(dataset, **options):
    defaults = {"seed": 3, "batch_size": 4, "last_step": 5}
    return TrainingOrder(dataset.num_tokens, 16, **{**defaults, **options})


def test_a_window_is_a_view_on_the_arrow_buffer(dataset, rows):
    for row in range(len(rows)):
        tokens, valid = dataset.window(row)
        assert not tokens.flags.owndata and not tokens.flags.writeable
        np.testing.assert_array_equal(tokens, np.asarray(rows[row]["tokens"], np.float16))
        np.testing.assert_array_equal(valid, rows[row]["valid_entries"])


def test_a_batch_equals_the_crops_sliced_one_by_one(dataset, rows):
    crops = [Crop(5, 70, 16), Crop(0, 11, 16), Crop(1, 0, 7), Crop(4, 0, 1), Crop(8, 2, 10)]
    batch = dataset.__getitems__(crops)
    assert batch["tokens"].dtype == torch.float16 and batch["tokens"].shape == (5, 16, 24)
    for i, crop in enumerate(crops):
        row, part = rows[crop.window], slice(crop.start, crop.start + crop.length)
        columns = (row[f"segment_{name}"] for name in ("layer", "position", "stride", "length"))
        segments = [Segment(*values) for values in zip(*columns, strict=True)]
        positions = positions_from_segments(row["token_start"], segments)
        assert torch.equal(batch["tokens"][i, : crop.length], torch.tensor(row["tokens"])[part].half())
        assert batch["valid_entries"][i, : crop.length].tolist() == row["valid_entries"][part]
        assert torch.equal(batch["positions"][i, : crop.length], positions[part])
        for name in ("tokens", "valid_entries", "positions"):
            assert not batch[name][i, crop.length :].any()


def test_without_a_fixed_length_a_batch_is_as_long_as_its_longest_crop(rows):
    batch = WindowDataset(rows).__getitems__([Crop(0, 0, 9), Crop(5, 3, 11)])
    assert batch["tokens"].shape == (2, 11, 24)


def test_a_batch_equals_its_crops_cut_one_by_one(dataset, rows):
    generator = np.random.default_rng(0)
    table = WindowTable(rows.data.table, "split 'train'")
    for longest in (1, 3, 16, 90):
        windows = generator.integers(0, len(dataset), 20)
        lengths = np.minimum(generator.integers(1, longest + 1, 20), dataset.num_tokens[windows])
        starts = generator.integers(0, dataset.num_tokens[windows] - lengths + 1)
        crops = [Crop(*values) for values in zip(windows.tolist(), starts.tolist(), lengths.tolist(), strict=True)]
        for pad_to in (0, 90):
            batch = table.read(crops, pad_to)
            expected = collate([table.cut(crop) for crop in crops], BatchMemory(), pad_to)
            assert batch.keys() == expected.keys()
            assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_memory_is_used_again_only_when_nobody_holds_its_batch(dataset, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # pinned memory is torch's to give

    def read(window):
        return dataset.__getitems__([Crop(window, 0, 7)])["tokens"]

    held = read(1)
    before, place = held.clone(), held.data_ptr()
    part = held[0, :3]  # a part keeps the whole
    del held
    others = [read(window) for window in (2, 3, 5)]
    assert place not in {other.data_ptr() for other in others}
    assert torch.equal(part, before[0, :3])
    del part
    assert read(0).data_ptr() == place


def test_the_highest_positions_are_those_of_all_crops(dataset):
    batch = dataset.__getitems__(tiles(dataset.num_tokens, 16))
    assert dataset.highest_positions() == tuple(batch["positions"].amax((0, 1)).tolist())


def test_a_filtered_dataset_reads_its_own_rows(rows):
    kept = rows.select([8, 2])
    tokens, _ = WindowDataset(kept, pad_to=16).window(1)
    np.testing.assert_array_equal(tokens, np.asarray(rows[2]["tokens"], np.float16))


def test_a_pickled_dataset_reopens_its_views(dataset):
    copy = pickle.loads(pickle.dumps(dataset))
    crop = Crop(5, 1, 16)
    assert torch.equal(copy[crop]["tokens"], dataset[crop]["tokens"])


def test_an_epoch_visits_every_window_once_over_all_processes_and_batches(dataset):
    count = len(dataset)
    parts = [order_of(dataset, batch_size=1, world_size=3, rank=rank, last_step=6) for rank in range(3)]
    visited = [crop.window for batches in zip(*parts, strict=True) for batch in batches for crop in batch]
    assert sorted(visited[:count]) == list(range(count))
    assert sorted(visited[count:]) == list(range(count))
    assert visited[:count] != visited[count:]


def test_the_split_into_batches_does_not_change_what_a_step_holds(dataset):
    whole = list(order_of(dataset, batch_size=8))
    pieces = list(order_of(dataset, batch_size=2, accumulation=4))
    ranks = [list(order_of(dataset, batch_size=2, accumulation=2, world_size=2, rank=rank)) for rank in range(2)]
    for step in range(5):
        assert [crop for piece in pieces[4 * step : 4 * step + 4] for crop in piece] == whole[step]
        mixed = [crop for micro in range(2) for rank in ranks for crop in rank[2 * step + micro]]
        assert mixed == whole[step]


def test_a_resumed_order_equals_the_uninterrupted_one(dataset):
    assert list(order_of(dataset, first_step=3)) == list(order_of(dataset))[3:]


def test_the_number_of_workers_does_not_change_the_batches(dataset):
    alone = list(make_loader(dataset, order_of(dataset), num_workers=0))
    workers = list(make_loader(dataset, order_of(dataset), num_workers=2))
    assert len(alone) == len(workers) == 5
    for first, second in zip(alone, workers, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_workers_read_ahead_and_no_further(dataset):
    batches = list(order_of(dataset, last_step=30))
    asked, others = [], set(threading.enumerate())

    class Watched:
        def __getitems__(self, crops):
            asked.append(crops)
            return {"first": crops[0]}

    given = make_loader(Watched(), batches, num_workers=2)
    assert [batch["first"] for batch in islice(given, 10)] == [crops[0] for crops in batches[:10]]
    assert 10 <= len(asked) <= 10 + 2 * 2
    given.close()
    for thread in set(threading.enumerate()) - others:
        thread.join(10)
        assert not thread.is_alive()


def test_what_a_worker_raises_comes_out_as_it_was_raised(dataset):
    batches = [[Crop(0, 0, 3)], [Crop(10**6, 0, 3)], [Crop(1, 0, 3)]]
    for num_workers in (0, 1, 3):
        given = make_loader(dataset, batches, num_workers)
        assert next(given)["window"].tolist() == [0]
        with pytest.raises(IndexError):
            next(given)


def test_all_crops_of_an_epoch_are_those_computed_one_by_one():
    def one(seed, epoch, window, num_tokens, size):
        def mix(value):
            value = (value + 0x9E3779B97F4A7C15) % 2**64
            value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
            return value ^ value >> 31

        if num_tokens <= size:
            return 0
        first, starts = mix(mix(seed) ^ window), num_tokens - size + 1
        place = (first + epoch * 0x9E3779B97F4A7C15) % 2**64
        if starts == 2:
            return (first + epoch) % 2
        margin = min(size - 1, int((0.381966 * starts - 1) / (1 - 2 * 0.381966)))
        return min(max(place * (starts + 2 * margin) // 2**64 - margin, 0), starts - 1)

    generator = np.random.default_rng(0)
    for size in (1, 2, 5, 16, 512):
        num_tokens = np.concatenate([np.arange(1, 3 * size + 9), generator.integers(1, 4097, 50), [10**6, 2**29]])
        windows = generator.integers(0, 2**63, len(num_tokens))
        for seed, epoch in ((0, 0), (3, 1), (2**40, 10**6)):
            starts = crop_starts(seed, epoch, windows, num_tokens, size)
            pairs = zip(windows.tolist(), num_tokens.tolist(), strict=True)
            assert starts.tolist() == [one(seed, epoch, window, count, size) for window, count in pairs]


def test_a_row_gives_another_crop_each_epoch_and_rows_differ():
    starts = np.array([[crop_start(0, epoch, window, 4096, 512) for epoch in range(40)] for window in range(60)])
    assert (starts[:, 1:] != starts[:, :-1]).all()
    assert len(np.unique(starts[:, 0])) > 40
    assert starts.min() == 0 and starts.max() == 4096 - 512
    assert (starts != np.array([[crop_start(1, e, w, 4096, 512) for e in range(40)] for w in range(60)])).mean() > 0.7


@pytest.mark.parametrize("window_size", [1, 2, 5, 16, 100])
def test_crops_of_epochs_that_follow_each_other_differ_for_every_longer_window(window_size):
    for num_tokens in {
        window_size + n for n in (1, 2, 3, 4, 5, 10, 30, window_size // 2, window_size, 5 * window_size)
    }:
        if num_tokens == window_size:
            continue
        starts = np.array([[crop_start(0, e, w, num_tokens, window_size) for e in range(200)] for w in range(8)])
        assert (starts[:, 1:] != starts[:, :-1]).all(), num_tokens
        assert starts.min() == 0 and starts.max() == num_tokens - window_size
        floor = min(1 / 3, window_size / (num_tokens + window_size - 1))
        assert (starts == 0).mean() > 0.8 * floor and (starts == num_tokens - window_size).mean() > 0.8 * floor


def test_crops_show_the_ends_of_a_window_as_often_as_its_middle():
    seen = np.zeros(1024)
    for window in range(20):
        for epoch in range(100):
            start = crop_start(0, epoch, window, 1024, 128)
            seen[start : start + 128] += 1
    floor = 2000 * 128 / (1024 + 127)
    assert seen.min() > 0.8 * floor
    assert seen.max() < 2.5 * floor


def test_a_short_window_is_taken_whole(dataset):
    crops = [crop for batch in order_of(dataset) for crop in batch]
    assert all(crop.length == min(16, dataset.num_tokens[crop.window]) for crop in crops)
    assert all(crop.start == 0 for crop in crops if dataset.num_tokens[crop.window] <= 16)
    assert all(crop.start + crop.length <= dataset.num_tokens[crop.window] for crop in crops)


def test_tiles_cover_every_token_once(dataset):
    seen = [np.zeros(n, int) for n in dataset.num_tokens]
    crops = tiles(dataset.num_tokens, 16)
    for rank in range(3):
        for batch in batches_of(crops, 4, rank, 3):
            for crop in batch:
                seen[crop.window][crop.start : crop.start + crop.length] += 1
    assert all((count == 1).all() for count in seen)
    assert {crop.window for crop in tiles(dataset.num_tokens, 16, max_windows=3)} == {0, 4, 8}


def test_steps_visit_every_window_as_often_as_asked():
    assert steps_for_epochs(100, 64, 1) == 2
    assert steps_for_epochs(128, 64, 1) == 2
    assert steps_for_epochs(100, 64, 0.5) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda row: row.update(num_tokens=row["num_tokens"] + 1), "num_tokens gives 8"),
        (lambda row: row["valid_entries"].pop(), "valid_entries gives 6"),
        (lambda row: row.update(segment_length=[1, 1]), "segment_length gives 2"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused_by_model_and_row(tmp_path, damage, message):
    def edit(row):
        if row["num_tokens"] == 7:
            damage(row)

    rows = load_windows(str(write_dataset(tmp_path / "damaged", LENGTHS, edit=edit)))["train"]
    with pytest.raises(DatasetError, match=rf"row 1 \(model 'train/model-0'\).*{message}"):
        WindowDataset(rows, pad_to=16)


def test_a_missing_column_is_refused_by_name(rows):
    with pytest.raises(DatasetError, match="column 'segment_layer' is missing"):
        WindowDataset(rows.remove_columns("segment_layer"), pad_to=16)


def test_a_dataset_written_again_under_the_same_name_is_read_anew(tmp_path):
    windows = []
    for seed in range(2):
        folder = write_dataset(tmp_path / str(seed) / "same-name", LENGTHS, seed=seed)
        windows.append(WindowDataset(load_windows(str(folder))["train"]).window(0)[0])
    assert not np.array_equal(*windows)


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="neither a folder nor a dataset id"):
        load_windows(str(tmp_path / "nothing"))
    with pytest.raises(DatasetError, match="hf-wsl tokenize"):
        load_windows(str(tmp_path))


def test_a_truncated_file_is_refused_with_the_dataset_named(tmp_path):
    folder = write_dataset(tmp_path / "truncated", LENGTHS)
    file = next(folder.glob("windows/train-*.parquet"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DatasetError, match="truncated' cannot be read"):
        load_windows(str(folder))
