"""Probes on arrays: what they find, what they must not see, and how sure they are."""

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_absolute_error, r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from trainers.finetuning.metrics import R2SpearmanAndMAE, regression_scores
from trainers.probing.group_folds import folds_of_splits, leave_group_out_folds, random_splits
from trainers.probing.probe_embeddings import (
    ProbeFit,
    bootstrap_intervals,
    constant_prediction,
    families_across_owners,
    prepare_task,
    probe_embeddings,
)
from trainers.probing.probes import ALPHAS, PROBES, ridge


GROUPS = np.repeat(np.arange(20), 4)
SPLITS = np.array([("train", "train", "train", "validation", "test")[group % 5] for group in GROUPS])


@pytest.fixture(scope="module")
def embeddings():
    return np.random.default_rng(0).normal(size=(80, 6))


@pytest.mark.parametrize("splits", [SPLITS, None], ids=["splits", "leave-group-out"])
@pytest.mark.parametrize("probe", PROBES)
def test_a_number_that_is_in_the_embeddings_is_found(embeddings, probe, splits):
    target = 3 + embeddings[:, 0] - 2 * embeddings[:, 3]
    found = probe_embeddings(embeddings, target, GROUPS, splits, num_folds=4, probes=[probe], bootstrap=50)[probe]
    low, high = found["intervals"]["r2"]
    assert found["metrics"]["r2"] > 0.9 and found["metrics"]["spearman"] > 0.9
    assert low <= found["metrics"]["r2"] <= high


@pytest.mark.parametrize("probe", PROBES)
def test_a_class_that_is_in_the_embeddings_is_found(embeddings, probe):
    target = np.where(embeddings[:, 1] > 0.5, "relu", np.where(embeddings[:, 1] < -0.5, "tanh", "gelu"))
    found = probe_embeddings(embeddings, target, GROUPS, None, num_folds=4, probes=[probe], bootstrap=20)[probe]
    constant = constant_prediction(prepare_task(target, GROUPS, None, 4), bootstrap=20, confidence=0.9, seed=0)
    assert found["metrics"]["accuracy"] > constant["metrics"]["accuracy"] + 0.2
    assert set(found["metrics"]) == {"accuracy", "macro_f1"}


def test_noise_tells_nothing(embeddings):
    target = np.random.default_rng(1).normal(size=80)
    found = probe_embeddings(embeddings, target, GROUPS, None, num_folds=5, probes=["ridge"], bootstrap=0)["ridge"]
    assert found["metrics"]["r2"] < 0.1 and found["intervals"]["r2"] is None


def test_what_is_common_to_a_group_is_of_no_use_for_another():
    groups = np.repeat(np.arange(20), 4)
    marks = np.eye(20)[groups] + 0.01 * np.random.default_rng(0).normal(size=(80, 20))
    target = np.random.default_rng(2).normal(size=20)[groups]
    by_group = probe_embeddings(marks, target, groups, num_folds=5, probes=["ridge"], bootstrap=0)["ridge"]
    by_model = probe_embeddings(marks, target, np.arange(80), num_folds=5, probes=["ridge"], bootstrap=0)["ridge"]
    assert by_model["metrics"]["r2"] > 0.9 and by_group["metrics"]["r2"] < 0.1


@pytest.mark.parametrize("size", [6, 200])
def test_ridge_is_that_of_a_search_over_single_penalties_also_with_more_numbers_than_models(size):
    generator = np.random.default_rng(3)
    features = generator.normal(size=(80, size))
    target = features[:, :1] + generator.normal(size=(80, 1))
    fold = folds_of_splits(GROUPS, SPLITS)[0]
    ((fit, held),) = fold.choices
    pipelines = [make_pipeline(StandardScaler(), Ridge(alpha)).fit(features[fit], target[fit]) for alpha in ALPHAS]
    errors = [np.sum((p.predict(features[held]).reshape(-1, 1) - target[held]) ** 2) for p in pipelines]
    predicted, chosen = ridge(features, target, fold)
    best = int(np.argmin(errors))
    assert chosen["alpha"] == ALPHAS[best]
    np.testing.assert_allclose(predicted[:, 0], pipelines[best].predict(features[fold.test]).reshape(-1), rtol=1e-6)


def test_test_rows_change_neither_settings_nor_what_is_learned(embeddings):
    target = embeddings[:, 0] + np.random.default_rng(4).normal(size=80)
    test = SPLITS == "test"
    changed, moved = embeddings.copy(), target.copy()
    changed[test], moved[test] = changed[test] * 3 + 1, -moved[test]
    for probe in PROBES:
        one, two = (
            probe_embeddings(features, values, GROUPS, SPLITS, probes=[probe], bootstrap=0)[probe]
            for features, values in ((embeddings, target), (changed, moved))
        )
        assert one["hyperparameters"] == two["hyperparameters"]
        assert one["metrics"] != two["metrics"]


def test_the_same_seed_gives_the_same_figures_and_another_one_a_different_network(embeddings):
    target = embeddings[:, 0] ** 2
    runs = [probe_embeddings(embeddings, target, GROUPS, SPLITS, bootstrap=20, seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0]["mlp"]["metrics"] != runs[2]["mlp"]["metrics"]


@pytest.mark.parametrize("num_folds", [0, 3])
def test_no_group_is_trained_and_tested_on_and_every_row_is_tested_once(num_folds):
    folds = leave_group_out_folds(GROUPS, num_folds)
    assert len(folds) == (num_folds or 20)
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(80))
    for fold in folds:
        assert not set(GROUPS[fold.train]) & set(GROUPS[fold.test])
        for fit, held in fold.choices:
            assert not set(GROUPS[fit]) & set(GROUPS[held]) and not set(held) & set(fold.test)


def test_random_splits_keep_groups_whole_and_fill_each_split():
    splits = random_splits(GROUPS, [0.7, 0.15, 0.15], seed=0)
    counts = {name: len({g for g, s in zip(GROUPS, splits, strict=True) if s == name}) for name in np.unique(splits)}
    assert counts == {"train": 14, "validation": 3, "test": 3}
    assert (splits == random_splits(GROUPS, [0.7, 0.15, 0.15], seed=0)).all()
    assert set(random_splits(np.arange(3), [0.98, 0.01, 0.01], seed=0)) == {"train", "validation", "test"}


def test_without_validation_rows_settings_are_chosen_on_training_groups():
    fold = folds_of_splits(GROUPS, np.where(SPLITS == "validation", "train", SPLITS))[0]
    assert len(fold.choices) == 5
    assert set(np.concatenate([held for _, held in fold.choices])) == set(fold.train)


def test_intervals_come_from_whole_groups():
    references = np.repeat(np.arange(4.0), 50)
    predictions = references + np.repeat([0.0, 0.0, 0.0, 2.0], 50)

    def mean_error(found, wanted):
        return {"mae": float(np.abs(found - wanted).mean())}

    by_group = bootstrap_intervals(mean_error, predictions, references, np.repeat(np.arange(4), 50), 300, 0.95, 0)
    by_row = bootstrap_intervals(mean_error, predictions, references, np.arange(200), 300, 0.95, 0)
    assert by_group["mae"][0] == 0 and by_group["mae"][1] >= 1
    assert by_row["mae"][1] - by_row["mae"][0] < 0.3
    one_group = bootstrap_intervals(mean_error, predictions, references, np.zeros(200), 300, 0.95, 0)
    assert one_group == {"mae": None}


def test_rounds_with_one_value_of_the_target_are_no_part_of_the_interval():
    groups = np.repeat(np.arange(3), 6)
    references = np.array([0.1, 0.7, 0.3])[groups]
    found = bootstrap_intervals(regression_scores, references + 0.05, references, groups, 300, 0.95, 0)
    assert -1 < found["r2"][0] <= found["r2"][1] <= 1


def test_the_nearest_of_another_owner_tells_the_family_where_the_embedding_does():
    owners = np.repeat([f"owner{index}" for index in range(12)], 3)
    families = np.tile(["resnet", "vit", "only here"], 12)
    families[families == "only here"] = [f"family {index}" for index in range(12)]
    telling = (np.unique(families, return_inverse=True)[1][:, None] + np.zeros((36, 4))).astype(np.float32)
    telling += np.random.default_rng(0).normal(size=(36, 4)) / 100
    own = np.unique(owners, return_inverse=True)[1][:, None] * np.ones((36, 4))
    options = {"bootstrap": 50, "confidence": 0.9, "seed": 0}
    found = families_across_owners(owners, families, {"telling": telling, "owner": own}, **options)
    assert (found["count"], found["owners"]) == (24, 12)  # who has no relative elsewhere is not asked
    assert found["results"]["telling"]["metrics"]["share"] == 1
    low, high = found["results"]["owner"]["intervals"]["share"]
    assert low <= found["results"]["owner"]["metrics"]["share"] <= high < 1
    assert families_across_owners(np.full(36, ""), families, {"telling": telling}, **options) == {}


def test_embeddings_that_are_not_finite_are_named(embeddings):
    task = prepare_task(embeddings[:, 0], GROUPS, SPLITS)
    fit = ProbeFit("gap", "mine", embeddings * np.nan, task, ["ridge"], {"bootstrap": 0, "confidence": 0.9, "seed": 0})
    with pytest.raises(ValueError, match="mine, target 'gap': 80 of 80 embeddings are not finite"):
        fit.run()


def test_classes_of_one_group_alone_are_counted_and_not_measured(embeddings):
    target = np.where(GROUPS == 0, "rare", np.where(embeddings[:, 0] > 0, "a", "b"))
    task = prepare_task(target, GROUPS)
    assert sorted(task.unseen) == [0, 1, 2, 3] and len(task.test) == 76
    assert len(task.folds) == 19


@pytest.mark.parametrize(
    "target, groups, splits, message",
    [
        (np.ones(80), GROUPS, SPLITS, "is 1.0 for all 80 models"),
        (np.arange(80.0), GROUPS % 2, None, "needs three groups"),
        (np.arange(80.0), GROUPS, np.where(np.arange(80) % 2, "train", "test"), "is in the splits test and train"),
        (np.arange(80.0), GROUPS, np.full(80, "train"), "'test' has no models"),
        (np.arange(80.0), GROUPS, np.full(80, "dev"), "not 'dev'"),
        (np.where(np.arange(80) == 7, np.nan, 1.0), GROUPS, SPLITS, "not finite"),
        (GROUPS.astype(str), GROUPS, None, "classes and groups are the same"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_reason(embeddings, target, groups, splits, message):
    with pytest.raises(ValueError, match=message):
        probe_embeddings(embeddings, target, groups, splits)


def test_embeddings_that_are_not_finite_or_not_as_many_as_models_are_refused(embeddings):
    broken = embeddings.copy()
    broken[5, 2] = np.inf
    with pytest.raises(ValueError, match="1 of 80 embeddings are not finite"):
        probe_embeddings(broken, embeddings[:, 0], GROUPS, SPLITS)
    with pytest.raises(ValueError, match="79 embeddings do not fit 80 models"):
        probe_embeddings(embeddings[1:], embeddings[:, 0], GROUPS, SPLITS)


def test_a_column_of_equal_numbers_does_no_harm(embeddings):
    features = np.concatenate([embeddings, np.full((80, 1), 7.0)], axis=1)
    for probe in PROBES:
        found = probe_embeddings(features, embeddings[:, 0], GROUPS, SPLITS, probes=[probe], bootstrap=0)[probe]
        assert found["metrics"]["r2"] > 0.9


def test_the_metric_agrees_with_scikit_learn_and_scipy_and_needs_no_hub():
    generator = np.random.default_rng(0)
    references = generator.integers(0, 9, 50).astype(float)
    predictions = references + generator.normal(size=50).round()
    found = R2SpearmanAndMAE(keep_in_memory=True).compute(predictions=predictions, references=references)
    assert found["r2"] == pytest.approx(r2_score(references, predictions))
    assert found["spearman"] == pytest.approx(spearmanr(references, predictions).statistic)
    assert found["kendall"] == pytest.approx(kendalltau(references, predictions).statistic)
    assert found["mae"] == pytest.approx(mean_absolute_error(references, predictions))
