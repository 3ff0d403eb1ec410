"""Zoos of other researchers are read as populations, with what their own files tell of each model."""

import json
import os

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from datasets_scripts.sources import expand_sources
from modeling_wsl.checkpoints.checkpoint import open_checkpoint
from modeling_wsl.checkpoints.errors import CheckpointError
from trainers.probing.labeled_models import read_properties


def network(seed):
    return {"0.weight": torch.randn(9, 8, generator=torch.Generator().manual_seed(seed)), "0.bias": torch.zeros(9)}


def ray_zoo(root):
    """The raw layout of modelzoos.cc: a folder a model, by Ray Tune."""
    for seed in (1, 2):
        trial = root / f"NN_tune_trainable_0000{seed}_seed={seed}"
        trial.mkdir(parents=True)
        settings = {"optim::lr": 0.0003, "seed": seed, "model::nlin": "tanh", "dataset::dump": "/home/x/dataset.pt"}
        (trial / "params.json").write_text(json.dumps(settings | {"cuda": False, "model::use_bias": True}))
        lines = []
        for epoch in (0, 1, 2):
            folder = trial / f"checkpoint_{epoch:06d}"
            folder.mkdir()
            torch.save(network(10 * seed + epoch), folder / "checkpoints")
            torch.save({"state": {}, "param_groups": []}, folder / "optimizer")
            result = {"training_iteration": epoch, "test_acc": 0.1 * epoch, "train_acc": -999 if epoch == 0 else 0.5}
            result |= {"pid": 7, "hostname": "x", "time_this_iter_s": 1.5, "timestamp": 99, "config": settings}
            lines.append(json.dumps(result))
        (trial / "result.json").write_text("\n".join(lines) + '\n{"training_iter')
    (root / "config.json").write_text("{}")
    return root


def test_a_zoo_of_ray_tune_is_a_model_an_epoch_with_its_accuracy(tmp_path):
    models = expand_sources([ray_zoo(tmp_path / "tune_zoo_mnist")])
    assert len(models) == 6 and len({model.model_id for model in models}) == 6
    frame = read_properties("", [str(tmp_path / "tune_zoo_mnist")], models)
    row = frame.loc[models[4].model_id]
    assert row["member"] == "NN_tune_trainable_00002_seed=2" and row["epoch"] == 1
    assert row["test_acc"] == pytest.approx(0.1) and row["optim::lr"] == 0.0003 and row["model::nlin"] == "tanh"
    assert set(frame) == {
        "member",
        "epoch",
        "test_acc",
        "train_acc",
        "optim::lr",
        "seed",
        "model::nlin",
        "model::use_bias",
    }
    assert frame["train_acc"].isna().sum() == 2  # not measured before the first epoch
    with open_checkpoint(models[4].location) as checkpoint:
        assert torch.equal(checkpoint.read("0.weight"), network(21)["0.weight"])


def small_cnn_zoo(folder, rows=3):
    folder.mkdir(parents=True)
    weights = np.random.default_rng(0).normal(size=(rows, 90)).astype(np.float32)
    np.save(folder / "weights.npy", weights)
    shapes = '"(8,)"', '"(3, 3, 1, 8)"', '"(2,)"', '"(4, 2)"'
    names = ("conv2d/bias", 0, 8), ("conv2d/kernel", 8, 80), ("dense/bias", 80, 82), ("dense/kernel", 82, 90)
    lines = [f"sequential/{n}:0,{start},{end},{shape}" for (n, start, end), shape in zip(names, shapes, strict=True)]
    (folder / "layout.csv").write_text("\n".join(["varname,start_idx,end_idx,shape", *lines]))
    metrics = {
        "config.activation": ["relu", "tanh", "relu"],
        "config.learning_rate": [0.1, 0.2, np.nan],
        "modeldir": ["run_a", "run_a", "run_b"],
        "step": [1, 86, 86],
        "test_accuracy": [0.1, 0.7, 0.5],
    }
    pd.DataFrame(metrics).to_csv(folder / "metrics.csv.gz", index=False)
    return weights


def test_the_rows_of_a_small_cnn_zoo_are_models_with_their_metrics(tmp_path):
    weights = small_cnn_zoo(tmp_path / "zoo" / "mnist")
    models = expand_sources([tmp_path / "zoo"])
    assert [model.model_id for model in models] == ["mnist/0", "mnist/1", "mnist/2"]
    assert [m.model_id for m in expand_sources([tmp_path / "zoo" / "mnist"])] == ["0", "1", "2"]
    assert models[1].properties == {
        "member": "run_a", "epoch": 86, "activation": "tanh", "learning_rate": 0.2, "test_accuracy": 0.7,
    }  # fmt: skip
    assert "learning_rate" not in models[2].properties
    assert models[1].path == tmp_path / "zoo" / "mnist" / "weights.npy" and models[1].fingerprint()
    assert models[1].location.endswith("weights.npy#1")
    with open_checkpoint(models[1].path, key="1") as checkpoint:
        kernel = checkpoint.read("sequential/dense/kernel:0")
        assert np.array_equal(kernel.numpy(), weights[1, 82:].reshape(4, 2).T)
    (tmp_path / "zoo" / "mnist" / "metrics.csv.gz").unlink()
    with pytest.raises(CheckpointError, match="lacks metrics.csv.gz"):
        expand_sources([tmp_path / "zoo"])


def test_the_files_of_a_small_transformer_zoo_have_the_row_of_their_metadata(tmp_path):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "metadata").mkdir()
    for name in ("1ab2_75_9512", "3cd4_best_9604"):
        torch.save(network(len(name)), tmp_path / "mnist" / f"{name}.pt")
    rows = {
        "lr": [0.01, 0.02],
        "ckpt_epoch": ["75", "best"],
        "ckpt_file": ["mnist/1ab2_75_9512.pt", "mnist/3cd4_best_9604.pt"],
        "test_top1_accuracy": [0.9512, 0.9604],
    }
    pd.DataFrame(rows).to_csv(tmp_path / "metadata" / "mnist.csv", index=False)
    models = expand_sources([tmp_path])
    assert [model.properties for model in models] == [
        {"member": "1ab2", "epoch": 75, "lr": 0.01, "test_top1_accuracy": 0.9512},
        {"member": "3cd4", "epoch": "best", "lr": 0.02, "test_top1_accuracy": 0.9604},
    ]


def test_the_models_of_model_j_know_their_split_and_what_their_files_tell(tmp_path):
    for split, name in (("train", "models--a--x"), ("val", "models--b--y")):
        cache = tmp_path / "SupViT" / split / name
        for folder in ("refs", "blobs", "snapshots/abc"):
            (cache / folder).mkdir(parents=True)
        (cache / "refs" / "main").write_text("abc")
        told = {"learning_rate": "0.001", "dataset_chosen_targets": "['cat', 'dog']", "list": "[1]"}
        save_file(network(len(split)), cache / "blobs" / "hash", told)
        os.symlink("../../blobs/hash", cache / "snapshots" / "abc" / "model.safetensors")
    models = expand_sources([tmp_path / "SupViT"])
    assert [model.properties["split"] for model in models] == ["train", "validation"]
    assert models[0].properties["learning_rate"] == 0.001 and "list" not in models[0].properties


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_of_model_j_names_models_of_the_hub(suffix, tmp_path):
    path = tmp_path / f"test-00000-of-00001.{suffix}"
    table = pd.DataFrame({"hf_model_id": ["ProbeX/a", "ProbeX/b"], "learning_rate": [0.1, 0.2]})
    table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path)
    models = expand_sources([path])
    assert [(m.model_id, m.path) for m in models] == [("ProbeX/a", None), ("ProbeX/b", None)]
    assert models[1].properties == {"split": "test", "learning_rate": 0.2}
