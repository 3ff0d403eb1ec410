"""The table of embeddings: what it holds after a round trip, and what it refuses."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datasets_scripts.embedding import EmbeddingTable
from datasets_scripts.embedding.embedding_table import principal_map


@pytest.fixture
def table():
    rows = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    layers = [{"0": row[:3], "1": row[3:]} for row in rows]
    return EmbeddingTable(list("abcd"), rows, [None, "f00", None, None], None, {"method": "pca"}, layers)


def test_a_table_comes_back_as_it_was_written(table, tmp_path):
    table.write(tmp_path / "table.parquet")
    found = EmbeddingTable.read(tmp_path / "table.parquet")
    assert (found.model_ids, found.revisions, found.made_by) == (table.model_ids, table.revisions, table.made_by)
    assert found.embeddings.dtype == found.points.dtype == np.float32
    np.testing.assert_array_equal(found.embeddings, table.embeddings)
    np.testing.assert_array_equal(found.points, table.points)
    np.testing.assert_array_equal(found.layers[2]["1"], table.layers[2]["1"])
    schema = pq.read_schema(tmp_path / "table.parquet")
    assert schema.names == ["model_id", "revision", "embedding", "x", "y", "layers"]
    assert schema.field("embedding").type == pa.list_(pa.float32(), 6)


def test_selected_rows_come_in_the_order_asked_for_and_missing_ones_are_named(table):
    found = table.select(["d", "b"])
    np.testing.assert_array_equal(found.embeddings, table.embeddings[[3, 1]])
    np.testing.assert_array_equal(found.points, table.points[[3, 1]])
    assert found.revisions == [None, "f00"] and list(found.layers[1]) == ["0", "1"]
    with pytest.raises(ValueError, match="no row for 'e', 'g'"):
        table.select(["a", "e", "g"])


def test_what_is_no_table_is_refused_by_name(table, tmp_path):
    with pytest.raises(ValueError, match="no such table"):
        EmbeddingTable.read(tmp_path / "nowhere.parquet")
    (tmp_path / "text.parquet").write_text("model_id,embedding\n")
    with pytest.raises(ValueError, match="not a Parquet table"):
        EmbeddingTable.read(tmp_path / "text.parquet")
    pq.write_table(pa.table({"model_id": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="columns are missing: embedding, revision, x, y"):
        EmbeddingTable.read(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="'a' stands twice"):
        EmbeddingTable(["a", "a"], table.embeddings[:2])
    with pytest.raises(ValueError, match="for 3 models"):
        EmbeddingTable(["a", "b", "c"], table.embeddings[:2])


def test_a_map_of_equal_embeddings_is_a_point_and_its_signs_are_fixed(table):
    rows = table.embeddings
    assert (principal_map(rows[:1].repeat(3, 0)) == 0).all()
    assert principal_map(rows).shape == (4, 2)
    assert (principal_map(rows) == principal_map(rows.copy())).all()
    assert principal_map(rows[:1]).tolist() == [[0, 0]]


@pytest.mark.parametrize("shape", [(30, 5), (5, 30), (6, 1), (2, 9)])
def test_a_map_is_that_of_a_singular_value_decomposition(shape):
    rows = np.random.default_rng(1).standard_normal(shape)
    centered = rows - rows.mean(0)
    directions = np.linalg.svd(centered, full_matrices=False)[2][:2]
    signs = np.sign(directions[np.arange(len(directions)), np.abs(directions).argmax(1)])
    expected = np.zeros((len(rows), 2))
    expected[:, : len(directions)] = centered @ (directions * signs[:, None]).T
    np.testing.assert_allclose(principal_map(rows), expected, atol=1e-5)
