"""`hf-wsl search`: neighbors in a table of embeddings."""

import json

import numpy as np
import pytest
import torch
from command_line import hf_wsl
from search_fixtures import write_model, write_population

from datasets_scripts.embedding import EmbedConfig, EmbeddingTable, embed
from datasets_scripts.search import nearest as nearest_module
from datasets_scripts.search.nearest import METRICS, FeatureSpace, nearest, nearest_of_other_groups, pairs_within
from datasets_scripts.search.search import search
from datasets_scripts.search.search_config import SearchConfig
from hf_wsl.options import ConfigError
from modeling_wsl import WSLConfig, WSLFeatureExtractor, WSLModel


def table_of(embeddings: np.ndarray) -> EmbeddingTable:
    return EmbeddingTable([f"m{i}" for i in range(len(embeddings))], embeddings.astype(np.float32))


def random_table(n: int = 200, d: int = 7, seed: int = 0) -> EmbeddingTable:
    draw = np.random.default_rng(seed)
    embeddings = draw.normal(3, 1, (n, d)) * draw.uniform(0.1, 10, d)
    embeddings[n // 2 :: 7] = embeddings[0]  # ties
    return table_of(embeddings)


def plain_nearest(table, query, k, metric, standardize):
    rows, query = table.embeddings.astype(np.float64), query.astype(np.float64)
    if standardize:
        center, scale = rows.mean(0), rows.std(0)
        rows, query = (rows - center) / scale, (query - center) / scale
    if metric == "euclidean":
        distances = [np.sqrt(((row - query) ** 2).sum()) for row in rows]
    else:
        distances = [1 - row @ query / np.linalg.norm(row) / np.linalg.norm(query) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (round(distances[i], 12), i))[:k]
    return order, [distances[i] for i in order]


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("index", ["exact", "faiss"])
def test_neighbors_are_those_of_a_plain_loop(metric, standardize, index, monkeypatch):
    if index == "faiss":
        pytest.importorskip("faiss")
    monkeypatch.setattr(nearest_module, "BLOCK_ENTRIES", 1000)  # several blocks
    table, queries = random_table(), random_table(seed=1).embeddings[:30]
    indices, distances = nearest(table, queries, 6, metric, standardize=standardize, index=index)
    assert indices.dtype == np.int64 and distances.dtype == np.float32
    for query, found, distance in zip(queries, indices, distances, strict=True):
        expected, values = plain_nearest(table, query, 6, metric, standardize)
        assert found.tolist() == expected
        np.testing.assert_allclose(distance, values, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("metric", METRICS)
def test_equal_rows_are_at_distance_zero_in_the_order_of_the_table(metric):
    table = random_table()
    twins = [0, *range(100, 200, 7)]
    indices, distances = nearest(table, table.embeddings[:1], len(twins), metric)
    assert indices[0].tolist() == twins and not distances.any()
    indices, _ = nearest(table, table.embeddings[:1], 3, metric, exclude=np.array([0]))
    assert indices[0].tolist() == twins[1:4]


def test_a_query_of_the_table_is_not_its_own_neighbor():
    table = random_table(50)
    indices, distances = nearest(table, table.embeddings, 100, exclude=np.arange(50))
    assert indices.shape == (50, 49)
    assert all(sorted([*row, own]) == list(range(50)) for own, row in enumerate(indices.tolist()))
    assert (np.diff(distances, axis=1) >= 0).all()


def test_constant_features_and_rows_without_direction_are_compared_too():
    table = table_of(np.array([[1.0, 5], [2, 5], [3, 5]]))
    indices, distances = nearest(table, np.array([[3.0, 5]]), 3, "euclidean")
    assert indices.tolist() == [[2, 1, 0]] and np.isfinite(distances).all()
    _, distances = nearest(table, np.array([[2.0, 5]]), 3, "cosine")  # the mean: all zeros once standardized
    assert distances.tolist() == [[0, 1, 1]]


def test_pairs_and_strangers_are_those_of_a_plain_loop(monkeypatch):
    monkeypatch.setattr(nearest_module, "BLOCK_ENTRIES", 600)
    table = random_table(90)
    rows = FeatureSpace.of(table.embeddings, "euclidean").features(table.embeddings)
    squared = ((rows[:, None] - rows) ** 2).sum(-1)
    limit = float(np.quantile(squared, 0.1))
    found = {(int(i), int(j)) for a, b in pairs_within(rows, limit) for i, j in zip(a, b, strict=True)}
    assert found == {(i, j) for i in range(90) for j in range(i + 1, 90) if squared[i, j] <= limit}
    groups = np.arange(90) % 4
    other = np.where(groups[:, None] == groups, np.inf, squared)
    np.testing.assert_allclose(nearest_of_other_groups(rows, groups.tolist()), other.min(1))
    assert np.isinf(nearest_of_other_groups(rows, [0] * 90)).all()


def test_what_cannot_be_searched_is_refused_with_the_reason():
    table = random_table(10)
    query = table.embeddings[:1]
    for options, message in (
        ({"metric": "manhattan"}, "choose cosine or euclidean"),
        ({"index": "annoy"}, "choose exact, faiss"),
        ({"k": 0}, "at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            nearest(table, query, **{"k": 2, **options})
    with pytest.raises(ConfigError, match="3 features and the table 7"):
        nearest(table, np.ones((1, 3)), 2)
    with pytest.raises(ValueError, match="query's embedding holds NaN"):
        nearest(table, query * np.nan, 2)
    table.embeddings[4, 2] = np.inf
    with pytest.raises(ValueError, match="embedding of m4 holds NaN or infinity"):
        nearest(table, query, 2)


def test_approximate_indexes_of_faiss_are_named_by_their_factory():
    pytest.importorskip("faiss")
    table = random_table(300)
    exact, _ = nearest(table, table.embeddings[:20], 5)
    found, _ = nearest(table, table.embeddings[:20], 5, index="faiss:HNSW16")
    assert (found == exact).mean() > 0.9
    with pytest.raises(ConfigError, match="faiss knows no index 'Nonsense'"):
        nearest(table, table.embeddings[:1], 5, index="faiss:Nonsense")
    with pytest.raises(ConfigError, match="faiss cannot make the index 'IVF64,Flat' of 20 embeddings"):
        nearest(random_table(20), table.embeddings[:1], 5, index="faiss:IVF64,Flat")


@pytest.fixture(scope="module")
def population(tmp_path_factory):
    return write_population(tmp_path_factory.mktemp("population") / "models")


def test_a_row_of_the_table_and_a_path_to_the_same_model_have_the_same_neighbors(population, tmp_path):
    table, output = tmp_path / "table.parquet", tmp_path / "found.json"
    embed("pooled-statistics", [population], table)
    options = ["--top", "3", "--metric", "euclidean", "--output_file", str(output)]
    result = hf_wsl("search", table, "owner03--net", *options)
    assert result.exit_code == 0, result.output
    by_row = json.loads(output.read_text())
    assert [row["rank"] for row in by_row] == [1, 2, 3] and "owner03--net" not in [row["model_id"] for row in by_row]
    assert all(row["model_id"] in result.output for row in by_row)
    by_path = search(table, str(population / "owner03--net"), SearchConfig(top=4, metric="euclidean"))
    assert by_path[0].split()[1:] == ["0", "owner03--net"]
    assert [line.split()[2] for line in by_path[1:]] == [row["model_id"] for row in by_row]


@pytest.mark.parametrize("untrained", [False, True])
def test_a_query_is_embedded_by_the_backbone_and_settings_of_the_table(population, tmp_path, untrained):
    config = WSLConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, latent_size=16, window_size=32)
    WSLModel(config).save_pretrained(tmp_path / "backbone")
    WSLFeatureExtractor().save_pretrained(tmp_path / "backbone")
    settings = EmbedConfig(pooling="moments", halo=3, untrained=untrained, seed=5)
    embed(tmp_path / "backbone", [population], tmp_path / "table.parquet", settings)
    lines = search(tmp_path / "table.parquet", str(population / "owner07--net"), SearchConfig(top=2))
    assert lines[0].split()[2] == "owner07--net" and float(lines[0].split()[1]) < 1e-6
    torch.manual_seed(1)
    WSLModel(config).save_pretrained(tmp_path / "backbone")
    with pytest.raises(ValueError, match="was changed since this table was made"):
        search(tmp_path / "table.parquet", str(population / "owner07--net"), SearchConfig())


def test_a_table_names_local_paths_that_hold_in_any_working_folder(population, tmp_path, monkeypatch):
    monkeypatch.chdir(population.parent)
    embed("pca", [population], tmp_path / "pca.parquet", EmbedConfig(latent_size=8, fit_on=[population.name]))
    monkeypatch.chdir(tmp_path)
    lines = search(tmp_path / "pca.parquet", str(population / "owner07--net"), SearchConfig(top=1))
    assert lines[0].split()[2] == "owner07--net"


def test_a_table_whose_method_depends_on_its_models_says_what_it_needs(population, tmp_path):
    query = str(population / "owner07--net")
    embed("pca", [population], tmp_path / "pca.parquet", EmbedConfig(latent_size=8))
    with pytest.raises(ValueError, match="fitted on the models in it. Name them with --models"):
        search(tmp_path / "pca.parquet", query, SearchConfig())
    lines = search(tmp_path / "pca.parquet", query, SearchConfig(top=1, models=[str(population)]))
    assert lines[0].split()[2] == "owner07--net"
    with pytest.raises(ValueError, match="all 16: owner00--net is not among those named"):
        search(tmp_path / "pca.parquet", query, SearchConfig(models=[query]))
    write_model(tmp_path / "other", {f"{i}.weight": torch.eye(9) for i in range(3)})
    embed("spectral-norms", [population, tmp_path / "other"], tmp_path / "spectral.parquet")
    with pytest.raises(ValueError, match="pooled_over_tensors=true, and these models alone give false"):
        search(tmp_path / "spectral.parquet", query, SearchConfig())


def test_an_unknown_query_is_refused_with_the_closest_row(population, tmp_path):
    embed("pooled-statistics", [population], tmp_path / "table.parquet")
    with pytest.raises(ValueError, match="no model_id of the table. Did you mean 'owner03--net'"):
        search(tmp_path / "table.parquet", "owner03--nett", SearchConfig())
    with pytest.raises(ConfigError, match="holds 16 models; search for one"):
        search(tmp_path / "table.parquet", str(population), SearchConfig())
    with pytest.raises(ConfigError, match="name one model to search for"):
        search(tmp_path / "table.parquet", None, SearchConfig())
    with pytest.raises(ConfigError, match="name one model to search for"):
        search(tmp_path / "table.parquet", "owner03--net", SearchConfig(duplicates=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"duplicates": True, "lineage": True}, "choose one of"),
        ({"lineage": True}, "name the models of the table with --models"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SearchConfig(**options)
