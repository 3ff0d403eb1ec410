"""Lab zoos: their files, their properties, and runs that are stopped or go wrong."""

import dataclasses
import functools
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from command_line import hf_wsl
from image_fixtures import image_rows, write_parquet
from interrupted_runs import hashes, run_and_die
from safetensors.torch import load_file

from datasets_scripts.model_facts import find_facts
from datasets_scripts.sources import expand_sources
from hf_wsl.errors import RunError
from hf_wsl.options import ConfigError
from hf_wsl.run_folder import RunFolder
from trainers.data.images.image_data import ImageExamples
from trainers.zoo import build_zoo as building
from trainers.zoo.build_zoo import build_zoo
from trainers.zoo.members import stacks_of, zoo_members
from trainers.zoo.networks import load_member
from trainers.zoo.zoo_config import ZooConfig
from trainers.zoo.zoo_images import zoo_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "colors"
    return write_parquet(folder, train=image_rows(60), validation=image_rows(12, 60), test=image_rows(24, 80))


def settings(images, output, **options):
    options = {"learning_rates": ["1e-2"], "epochs": 2, "batch_size": 10, "stack_size": 2, **options}
    return ZooConfig(data={"images": str(images), "image_size": 20}, output_dir=str(output), **options)


@pytest.fixture(scope="module")
def zoo(images, tmp_path_factory):
    """Six members in four stacks, the third learning rate too high for any network."""
    folder = tmp_path_factory.mktemp("zoo") / "zoo"
    rates = {"learning_rates": ["1e-2", "3e-3", "1e38"], "optimizers": ["sgd"], "activations": ["relu", "tanh"]}
    config = settings(images, folder, **rates, checkpoint_epochs=["0", "2"], tokenize=True)
    return config, build_zoo(config)


def test_every_checkpoint_has_a_folder_and_a_row_with_the_same_properties(zoo):
    config, report = zoo
    rows = pq.read_table(report.output / "properties.parquet").to_pylist()
    models = expand_sources([report.output / "models"])
    assert [row["model_id"] for row in rows] == [model.model_id for model in models]
    assert (report.members, report.checkpoints) == (len({row["member"] for row in rows}), len(rows))
    for row in rows:
        folder = report.output / "models" / row["model_id"]
        assert json.loads((folder / "properties.json").read_text()) == row
        assert row["generalization_gap"] == row["train_accuracy"] - row["test_accuracy"]
        assert (row["epoch"], row["num_parameters"]) == (int(folder.name.removeprefix("epoch_")), 2077)


def test_a_loaded_member_reaches_what_its_properties_say(zoo):
    config, report = zoo
    images = zoo_images(config.data_config)
    for row in pq.read_table(report.output / "properties.parquet").to_pylist():
        with torch.no_grad():
            logits = load_member(report.output / "models" / row["model_id"])(images.pixels["test"])
        labels = images.labels["test"]
        loss = torch.nn.functional.cross_entropy(logits, labels).item()
        assert row["test_loss"] == pytest.approx(loss, rel=1e-4)
        assert row["test_accuracy"] == pytest.approx(
            (logits.argmax(1) == labels).double().mean().item(), abs=1.01 / 24
        )


def test_members_that_diverge_are_listed_with_the_reason_and_have_no_checkpoints(zoo):
    config, report = zoo
    wild = [member.name for member in zoo_members(config) if member.learning_rate == 1e38]
    assert list(report.diverged) == wild
    assert all("not finite" in reason for reason in report.diverged.values())
    assert json.loads((report.output / "diverged.json").read_text()) == report.diverged
    assert not set(wild) & {path.name for path in (report.output / "models").iterdir()}


def test_a_zoo_that_diverges_as_a_whole_is_an_error(images, tmp_path):
    config = settings(images, tmp_path / "wild", learning_rates=["1e38"], optimizers=["sgd"], epochs=1)
    with pytest.raises(RunError, match="1 of 1 members diverged"):
        build_zoo(config)


FIVE = {"seeds": 5, "epochs": 1, "dropouts": ["0.2"], "checkpoint_epochs": ["0", "1"]}


@pytest.mark.slow  # two processes import torch
def test_two_workers_make_the_same_bytes_as_one(images, tmp_path):
    build_zoo(settings(images, tmp_path / "one", **FIVE))
    build_zoo(settings(images, tmp_path / "two", **FIVE, num_workers=2))
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_a_run_that_was_killed_goes_on_at_the_next_stack_and_ends_with_the_same_bytes(images, tmp_path):
    whole, stopped = (settings(images, tmp_path / name, **FIVE) for name in ("whole", "killed"))
    build_zoo(whole)
    assert run_and_die(functools.partial(build_zoo, stopped), 8, [(building, "save_network")])
    assert len(list((tmp_path / "killed" / "stacks").iterdir())) == 1
    kept = tmp_path / "killed" / "models" / "member_0000" / "epoch_001" / "model.safetensors"
    before = kept.stat().st_mtime_ns
    build_zoo(stopped)
    assert kept.stat().st_mtime_ns == before
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "killed")


def test_the_tokenized_zoo_has_splits_by_member_and_properties_in_the_order_of_its_models(zoo):
    config, report = zoo
    splits = {row["model_id"]: row["split"] for row in pq.read_table(report.output / "properties.parquet").to_pylist()}
    models = datasets.load_dataset(str(report.output / "tokens"), "models")
    properties = datasets.load_dataset(str(report.output / "tokens"), "properties")
    windows = datasets.load_dataset(str(report.output / "tokens"), "windows")
    assert set(models) == set(properties) == set(windows) == set(splits.values())
    for split in models:
        assert models[split]["model_id"][:] == properties[split]["model_id"][:] == windows[split]["model_id"][:]
        assert {splits[model_id] for model_id in models[split]["model_id"]} == {split}
    assert sum(len(rows) for rows in models.values()) == report.checkpoints
    manifest = json.loads(models["train"][0]["manifest"])
    assert [layer[0] for layer in manifest["layers"]] == ["conv1", "conv2", "conv3", "fc1", "fc2"]


def test_a_finished_zoo_is_not_made_again_and_one_of_other_settings_is_refused(zoo):
    config, report = zoo
    before = hashes(report.output)
    assert build_zoo(config) == report
    assert hashes(report.output) == before
    with pytest.raises(ValueError, match="batch_size was 10, now 5"):
        build_zoo(ZooConfig(**{**vars(config), "batch_size": 5}))


def test_a_zoo_of_other_settings_is_overwritten_on_request(images, tmp_path):
    first = settings(images, tmp_path / "zoo", epochs=1, seeds=2)
    build_zoo(first)
    other = dataclasses.replace(first, seeds=1, overwrite_output_dir=True)
    assert build_zoo(other).members == 1
    assert [path.name for path in (tmp_path / "zoo" / "models").iterdir()] == ["member_0000"]


def test_members_are_split_70_15_15_and_share_no_seed(images):
    members = zoo_members(
        settings(images, "zoo", seeds=10, learning_rates=["1e-3", "1e-2"], weight_decays=["0", "1e-4"])
    )
    counts = [sum(member.split == split for member in members) for split in ("train", "validation", "test")]
    assert counts == [28, 6, 6]
    assert len({member.seed for member in members}) == 40


def test_random_members_are_distinct_draws_of_the_grid_that_follow_from_the_seed(images):
    options = {"learning_rates": ["1e-3", "1e-2"], "activations": ["relu", "tanh", "gelu"], "dropouts": ["0", "0.3"]}

    def draw(seed):
        config = settings(images, "zoo", **options, sampling="random", num_members=9, seed=seed)
        return [(member.learning_rate, member.activation, member.dropout) for member in zoo_members(config)]

    assert len(set(draw(0))) == 9
    assert draw(0) == draw(0) != draw(1)


def test_a_stack_holds_members_that_differ_in_numbers_alone(images):
    config = settings(images, "zoo", seeds=3, optimizers=["sgd", "adam"], dropouts=["0", "0.1", "0.2"], stack_size=4)
    stacks = stacks_of(zoo_members(config), config)
    assert sorted(len(stack) for stack in stacks) == [2, 2, 3, 3, 4, 4]
    for stack in stacks:
        assert len({(member.optimizer, member.activation, member.dropout > 0) for member in stack}) == 1


def test_children_start_from_the_last_checkpoint_of_their_parent_and_stay_in_its_split(zoo, images, tmp_path):
    _, report = zoo
    config = settings(
        images, tmp_path / "children", parents=str(report.output), learning_rates=["1e-30"], seeds=2, epochs=1
    )
    children = build_zoo(config)
    rows = pq.read_table(children.output / "properties.parquet").to_pylist()
    parents = {row["model_id"]: row for row in pq.read_table(report.output / "properties.parquet").to_pylist()}
    assert len(rows) == 2 * report.members
    for row in rows:
        parent = parents[row["parent"]]
        assert parent["epoch"] == 2
        assert (row["split"], row["activation"]) == (parent["split"], parent["activation"])
        own = load_file(children.output / "models" / row["model_id"] / "model.safetensors")
        inherited = load_file(report.output / "models" / row["parent"] / "model.safetensors")
        assert all(torch.allclose(own[name], inherited[name], atol=1e-6) for name in own)


def test_a_resnet_is_trained_by_itself_with_its_running_statistics(images, tmp_path):
    config = settings(images, tmp_path / "zoo", architecture="resnet18_slim", epochs=1, seeds=2, augment=True)
    report = build_zoo(config)
    network = load_member(report.output / "models" / "member_0001" / "epoch_001")
    assert not torch.equal(network.bn1.running_mean, torch.zeros(16))
    assert network.bn1.num_batches_tracked == 6
    test, labels = (
        part["test"] for part in (zoo_images(config.data_config).pixels, zoo_images(config.data_config).labels)
    )
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(network(test), labels).item()
    row = pq.read_table(report.output / "properties.parquet").to_pylist()[1]
    assert row["test_loss"] == pytest.approx(loss, rel=1e-4)


def test_the_command_reads_its_options_from_a_file_and_the_command_line(images, tmp_path):
    (tmp_path / "zoo.yaml").write_text(f"data: {{images: {images}, image_size: 20}}\nlearning_rates: [1e-3, 1e-2]\n")
    arguments = ["zoo", "--config", str(tmp_path / "zoo.yaml"), "--epochs", "1", "--output_dir", str(tmp_path / "zoo")]
    result = hf_wsl(*arguments)
    assert result.exit_code == 0, result.output
    assert "2 members, 2 checkpoints; 0 members diverged" in result.output


@pytest.mark.parametrize("architecture", ["small_cnn", "resnet18_slim"])
def test_a_member_has_the_license_of_its_zoo_and_preprocessing_of_its_channels(images, tmp_path, caplog, architecture):
    for license in ("", "cc0-1.0"):
        config = settings(images, tmp_path / f"zoo{license}", architecture=architecture, license=license, epochs=0)
        config = dataclasses.replace(config, checkpoint_epochs=["0"])
        report = build_zoo(config)
        (model,) = expand_sources([report.output / "models"])
        content = json.loads((model.path / "config.json").read_text())
        assert find_facts(model, content, "timm", None).license == (license or None)
        assert content["pretrained_cfg"]["input_size"] == [3, 20, 20] and len(content["pretrained_cfg"]["mean"]) == 3
    assert "Pretrained" not in caplog.text and "pretrained configuration" not in caplog.text


def test_settings_are_those_of_before_without_a_license_and_name_parents_by_their_whole_path(
    images, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert settings(images, "zoo").settings()["parents"] == "" and "license" not in settings(images, "zoo").settings()
    assert settings(images, "zoo", license="mit").settings()["license"] == "mit"
    assert settings(images, "zoo", parents="first").settings()["parents"] == str(tmp_path / "first")


def test_the_last_checkpoint_of_a_parent_is_that_of_the_highest_epoch(images, tmp_path):
    config = settings(images, tmp_path / "parents")
    with RunFolder(tmp_path / "parents").open(config.settings()):
        pass
    ids = {f"member_0000/epoch_{epoch}": epoch for epoch in (1000, 998, 999)}
    same = {"member": "member_0000", "activation": "relu", "initialization": "default", "split": "test"}
    rows = [{"model_id": model_id, "epoch": epoch, **same} for model_id, epoch in ids.items()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "parents" / "properties.parquet")
    (child,) = zoo_members(settings(images, tmp_path / "zoo", parents=str(tmp_path / "parents")))
    assert child.parent == "member_0000/epoch_1000"


def test_images_that_do_not_fit_into_memory_are_refused_before_they_are_decoded(images, monkeypatch):
    config = ZooConfig(data={"images": str(images), "image_size": 2000}, output_dir="zoo").data_config
    monkeypatch.setattr(ImageExamples, "pixels", None)  # calling it would be an error
    with pytest.raises(ConfigError, match=r"GB in every process .* Lower --data.max_train .* --data.image_size"):
        zoo_images(config)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"optimizers": ["lion"]}, "option 'optimizers' names 'lion'; choose among sgd, adam, adamw"),
        ({"learning_rates": ["0"]}, "option 'learning_rates' has 0.0, which is out of range"),
        ({"dropouts": ["1"]}, "option 'dropouts' has 1.0, which is out of range"),
        ({"weight_decays": []}, "option 'weight_decays' is empty"),
        ({"checkpoint_epochs": ["3"]}, "option 'checkpoint_epochs' has 3, out of 2 epochs"),
        ({"checkpoint_epochs": ["0"], "parents": "zoo"}, "epoch 0 of a fine-tuned member would be its parent"),
        ({"activations": ["tanh"], "parents": "zoo"}, "option 'activations' is given, but members with parents"),
        ({"num_members": 3}, "option 'num_members' is of sampling random"),
        ({"sampling": "random"}, "option 'num_members' is 0; it must be at least 1"),
        ({"tokens": {"token_sise": 3}}, "unknown option 'token_sise'. Did you mean 'token_size'"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(images, options, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        settings(images, "zoo", **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"architecture": "resnet1800"}, "'resnet1800', which is neither small_cnn, resnet18_slim nor of timm"),
        ({"activations": ["rely"]}, "cannot be built"),
        ({"sampling": "random", "num_members": 3}, "the grid has 1 combinations"),
        ({"parents": "nowhere"}, "holds no finished zoo"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_written(images, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        build_zoo(settings(images, tmp_path / "zoo", **options))
    assert not (tmp_path / "zoo").exists()
