import numpy as np
import pytest
import torch
from window_fixtures import write_dataset

from datasets_scripts.embedding.linear_projection import Covariance, random_projection, standardize
from modeling_wsl import WSLConfig, WSLModel
from modeling_wsl.backbone.losses import reconstruction_r2
from modeling_wsl.tokens.manifest import mask_from_valid_entries
from trainers.data.windows.dataset_source import load_windows
from trainers.data.windows.window_data import WindowDataset
from trainers.pretraining.baselines import evaluate, fit_pca


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    lengths = {"train": [60, 41, 25, 90, 33, 70, 52, 48], "validation": [50, 31, 9]}
    folder = write_dataset(tmp_path_factory.mktemp("baselines") / "data", lengths)
    return {name: WindowDataset(rows, split=name) for name, rows in load_windows(str(folder)).items()}


def all_tokens(dataset):
    windows = [dataset.window(row) for row in range(len(dataset))]
    tokens = torch.from_numpy(np.concatenate([tokens for tokens, _ in windows]).astype(np.float32))
    valid = torch.from_numpy(np.concatenate([valid for _, valid in windows]).astype(np.int64))
    return tokens, mask_from_valid_entries(valid, dataset.token_size)


def test_streamed_pca_equals_a_plain_svd(splits):
    standardized, _, _ = standardize(*all_tokens(splits["train"]))
    centered = standardized.double() - standardized.double().mean(0)
    expected = torch.linalg.svd(centered, full_matrices=False).Vh[:6]
    pca = fit_pca(splits["train"], rank=6, max_tokens=10**9)
    overlap = (expected @ pca.components.double().T).abs()
    torch.testing.assert_close(overlap, torch.eye(6, dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(pca.components @ pca.components.T, torch.eye(6), atol=1e-5, rtol=0)


def test_a_sum_of_updates_equals_one_update():
    vectors = torch.randn(300, 7, generator=torch.Generator().manual_seed(0))
    whole, parts = Covariance(7), Covariance(7)
    whole.update(vectors)
    for part in vectors.split(77):
        parts.update(part)
    torch.testing.assert_close(
        whole.principal_components(3).components, parts.principal_components(3).components, atol=1e-5, rtol=0
    )


def test_baselines_are_scored_like_the_backbone(splits):
    pca = fit_pca(splits["train"], rank=6, max_tokens=10**9)
    tokens, mask = all_tokens(splits["validation"])
    standardized, mean, std = standardize(tokens, mask)
    expected = reconstruction_r2(pca.reconstruct(standardized) * std + mean, tokens, mask).item()
    assert evaluate({"PCA": pca}, splits["validation"])["PCA"] == pytest.approx(expected, abs=1e-5)


def test_pca_beats_a_random_projection_which_keeps_its_share_of_directions(splits):
    lines = {"random": random_projection(12, 24, seed=0), "pca": fit_pca(splits["train"], 12, 10**9)}
    scores = evaluate(lines, splits["validation"])
    assert 0.35 < scores["random"] < 0.65
    assert scores["pca"] > 0.9


def test_as_many_components_as_entries_reconstruct_everything(splits):
    scores = evaluate(
        {"pca": fit_pca(splits["train"], 24, 10**9), "random": random_projection(99, 24, 0)}, splits["validation"]
    )
    assert min(scores.values()) > 0.9999


def test_a_random_projection_is_orthonormal_and_follows_its_seed():
    first, again, other = (random_projection(5, 11, seed) for seed in (0, 0, 1))
    torch.testing.assert_close(first.components @ first.components.T, torch.eye(5), atol=1e-6, rtol=0)
    assert torch.equal(first.components, again.components)
    assert not torch.equal(first.components, other.components)


def test_a_subsample_spreads_over_all_windows(splits):
    full = fit_pca(splits["train"], 6, max_tokens=10**9)
    half = fit_pca(splits["train"], 6, max_tokens=210)
    assert torch.linalg.matrix_norm(full.components @ half.components.T) ** 2 > 5.5


@pytest.mark.parametrize("token_standardization", [True, False])
def test_a_linear_path_starts_at_the_score_of_its_pca(splits, token_standardization):
    config = WSLConfig.from_size(
        "nano",
        token_size=24,
        hidden_size=32,
        num_attention_heads=2,
        latent_size=8,
        window_size=16,
        linear_path=True,
        token_standardization=token_standardization,
    )
    pca = fit_pca(splits["train"], 8 - config.num_token_statistics, 10**9, affine=token_standardization)
    model = WSLModel(config).eval()
    model.initialize_linear_path(pca.components, pca.mean)
    tokens, mask = all_tokens(splits["validation"])
    with torch.no_grad():
        reconstruction = model(tokens[None], token_mask=mask[None]).reconstruction[0]
    score = reconstruction_r2(reconstruction, tokens, mask).item()
    if token_standardization:
        assert score == pytest.approx(evaluate({"pca": pca}, splits["validation"])["pca"], abs=1e-4)
    assert score > 0.85


def test_without_a_token_that_varies_there_is_no_pca():
    with pytest.raises(ValueError, match="at least one token"):
        Covariance(4).principal_components(2)
