"""Pickles: weights are read past all that would need code, and nothing of it is run, however the file is made."""

import argparse
import collections
import dataclasses
import enum
import os
import pathlib
import pickle
import resource
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from hostile_pickles import all_pickles, write_archive
from torch import nn

from modeling_wsl.checkpoints.checkpoint import CheckpointError, open_checkpoint


HOSTILE = all_pickles(pathlib.Path("marker"))  # for the names; the marker of each test is another
MAX_SECONDS, MAX_MEGABYTES = 30, 1500  # far above what any takes, far below what one that is believed would


class Phase(enum.Enum):
    TRAIN = 1


@dataclasses.dataclass
class Settings:
    lr: float = 1e-3


class OwnModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = network()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.arange(3))
        self.register_buffer("mask", torch.ones(2, 2), persistent=False)
        self.tied = self.body[0]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))


def same(state: dict, expected: dict) -> bool:
    return list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in expected)


STATE = network().state_dict()
GENERATOR = np.random.Generator(np.random.MT19937(0))
BESIDE = {
    "a number of numpy": {"best": np.float64(71.2), "epoch": 3},
    "arguments": {"args": argparse.Namespace(lr=1e-3)},
    "paths": {"out": pathlib.PurePosixPath("/x")},
    "an enumeration and a set": {"phase": Phase.TRAIN, "names": {"a", "b"}},
    "a dataclass": {"config": Settings()},
    "a loss module": {"hyper_parameters": {"loss": nn.MSELoss()}},
    "a default mapping": {"seen": collections.defaultdict(int, a=1), "order": collections.Counter("aab")},
    "the state of random generators": {"numpy": GENERATOR.bit_generator.state, "torch": torch.get_rng_state()},
    "an array": {"history": np.arange(5.0)},
    "an optimizer": {"optimizer": torch.optim.Adam(network().parameters()).state_dict()},
    "an optimizer that was pickled whole": {"solver": torch.optim.SGD(network().parameters(), 0.1)},
    "devices, dtypes and sizes": {"device": torch.device("cpu"), "dtype": torch.float16, "size": torch.Size([3])},
}
SAVES = {
    "zip": lambda content, path: torch.save(content, path),
    "legacy": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content)),
    "protocol 0": lambda content, path: path.write_bytes(pickle.dumps(content, 0)),
    "protocol 5": lambda content, path: torch.save(content, path, pickle_protocol=5),
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("save", SAVES)
def test_weights_are_read_beside_whatever_lies_beside_them(save, beside, tmp_path):
    SAVES[save]({"state_dict": STATE, **BESIDE[beside]}, tmp_path / "model.pt")
    with open_checkpoint(tmp_path / "model.pt") as checkpoint:
        assert same(checkpoint.state_dict(), STATE)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize(
    "wrap", [lambda m: m, lambda m: {"epoch": -1, "model": m, "ema": None}], ids=["bare", "nested"]
)
def test_a_pickled_module_is_read_as_its_state_dict(save, wrap, tmp_path):
    model = OwnModel()
    SAVES[save](wrap(model), tmp_path / "model.pt")
    with open_checkpoint(tmp_path / "model.pt") as checkpoint:
        state, expected = checkpoint.state_dict(), model.state_dict()
        assert {n for n in expected if not n.startswith("tied.")} == set(state)
        assert all(torch.equal(state[name], expected[name]) for name in state)


def test_what_was_not_read_is_listed(tmp_path):
    content = {"state_dict": STATE, "args": argparse.Namespace(), "lr": 0.1, "config": {"phase": Phase.TRAIN}}
    content |= {"optimizer": torch.optim.SGD(network().parameters(), 0.1, momentum=0.9).state_dict()}
    torch.save(content, tmp_path / "model.pt")
    assert open_checkpoint(tmp_path / "model.pt").ignored == (
        "args: argparse.Namespace",
        f"config.phase: {Phase.__module__}.Phase",
        "optimizer: state of an optimizer",
    )


@pytest.mark.parametrize("save", SAVES)
def test_arrays_of_numpy_are_tensors_of_the_same_bits(save, tmp_path):
    arrays = {
        "a.weight": np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32),
        "b.weight": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "c.weight": np.arange(6, dtype=">f4").reshape(2, 3),
        "d.steps": np.array([1, 2], np.int64),
        "e.half": np.ones(3, np.float16),
        "f.empty": np.zeros((0, 3)),
    }
    SAVES[save](arrays, tmp_path / "arrays.pkl")
    with open_checkpoint(tmp_path / "arrays.pkl") as checkpoint:
        state = checkpoint.state_dict()
        assert list(state) == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(state[name].numpy(), array)
            assert state[name].numpy().dtype == array.dtype.newbyteorder("=")


@pytest.mark.parametrize("save", SAVES)
def test_every_dtype_views_and_ties_are_read_as_they_were(save, tmp_path):
    base = torch.arange(24.0)
    state = {"a.view": base[4:16].reshape(3, 4).T, "b.base": base, "c.scalar": torch.tensor(2.0)}
    state |= {
        f"d.{dtype}": torch.ones(5).to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.int8, torch.bool)
    }
    state |= {"e.float8": torch.ones(4).to(torch.float8_e4m3fn), "f.complex": torch.ones(2, dtype=torch.complex64)}
    state |= {"g.alias": state["b.base"], "h.weight": nn.Parameter(torch.ones(3)), "i.empty": torch.empty(0, 4)}
    SAVES[save](state, tmp_path / "model.pt")
    with open_checkpoint(tmp_path / "model.pt") as checkpoint:
        read = checkpoint.state_dict()
        assert list(read) == list(state) and checkpoint.tied == {"g.alias": "b.base"}
        for name, tensor in state.items():
            assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
            assert torch.equal(read[name].float(), tensor.detach().float()) or tensor.is_complex()


def test_a_parameter_with_attributes_is_a_tensor(tmp_path):
    weight = nn.Parameter(torch.randn(4, 3))
    weight.tensor_parallel = True

    torch.save({"a.weight": weight}, tmp_path / "m.pt")
    assert torch.equal(open_checkpoint(tmp_path / "m.pt").read("a.weight"), weight)


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.quantize_per_tensor(torch.randn(3, 3), 0.1, 0, torch.qint8), "qint8"),
        (torch.quantize_per_channel(torch.randn(3, 3), torch.ones(3), torch.zeros(3), 0, torch.quint8), "quint8"),
        (torch.empty(3, 3, device="meta"), "meta"),
    ],
)
def test_tensors_that_are_stored_in_another_way_are_refused_by_it(tensor, kind, tmp_path):
    torch.save({"a.weight": torch.ones(3, 3), "b.weight": tensor}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=f"tensor 'b.weight' is stored as .*{kind}"):
        open_checkpoint(tmp_path / "m.pt")
    torch.save({"b.weight": tensor}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=kind):
        open_checkpoint(tmp_path / "m.pt")


def test_packed_parameters_of_a_quantized_module_are_refused(tmp_path):
    model = torch.ao.quantization.quantize_dynamic(network().eval(), {nn.Linear}, dtype=torch.qint8)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="packs qint8 of torch.ao.quantization"):
        open_checkpoint(tmp_path / "m.pt")


def test_opening_a_file_reads_its_pickle_alone(tmp_path):
    torch.save({"w.weight": torch.zeros(5000, 5000)}, tmp_path / "large.pt")  # 100 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open_checkpoint(tmp_path / "large.pt") as checkpoint:
        assert checkpoint.read("w.weight")[7, 7] == 0
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 60  # Linux counts kilobytes


class Holder:
    def __init__(self, **held):
        self.__dict__.update(held)


@dataclasses.dataclass
class TrainState:
    weights: dict
    step: int = 3


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state, model: Holder(model=model, lr=0.1),
        lambda state, model: argparse.Namespace(model=state, lr=0.1),
        lambda state, model: TrainState(state),
        lambda state, model: {"state_dict": state, "hyper_parameters": {"loss": nn.CrossEntropyLoss(torch.ones(4))}},
        lambda state, model: {"state_dict": state, "hyper_parameters": {"backbone": model}},
        lambda state, model: {"state_dict": state, "criterion": nn.BCEWithLogitsLoss(pos_weight=torch.ones(4))},
    ],
    ids=["an object", "a namespace", "a dataclass", "class weights", "a network among settings", "a loss"],
)
def test_the_weights_of_an_object_are_read_and_those_of_losses_and_settings_passed_over(wrap, tmp_path):
    torch.save(wrap(STATE, network()), tmp_path / "model.pt")
    with open_checkpoint(tmp_path / "model.pt") as checkpoint:
        assert same(checkpoint.state_dict(), STATE)


def test_an_array_that_torch_has_no_dtype_for_is_never_left_out_of_a_model(tmp_path):
    arrays = {"a.weight": np.ones((9, 9), np.float32), "classes": np.array(["cat"])}
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(arrays))
    assert open_checkpoint(tmp_path / "m.pkl").ignored == ("classes: numpy.ndarray",)
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(arrays | {"b.weight": np.ones((9, 9), np.longdouble)}))
    with pytest.raises(CheckpointError, match="tensor 'b.weight' is an array of NumPy that torch has no dtype for"):
        open_checkpoint(tmp_path / "m.pkl")


def test_an_object_that_is_no_network_is_refused_by_its_class(tmp_path):
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(Holder(coef_=np.ones((9, 9)), intercept_=np.ones(9))))
    with pytest.raises(CheckpointError, match="Holder without floating-point tensors"):
        open_checkpoint(tmp_path / "m.pkl")


def test_a_model_whose_tensors_are_all_empty_is_said_to_be_so(tmp_path):
    torch.save({"a.weight": torch.empty(0, 3), "b.weight": torch.empty(0, 4)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="all its 2 tensors are empty"):
        open_checkpoint(tmp_path / "m.pt")


# --- hostile files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_runs_nothing_and_ends_soon(name, tmp_path):
    marker = tmp_path / "marker"
    data = all_pickles(marker)[name]
    loaded, start = set(sys.modules), time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    places = [write_archive(tmp_path / "model.pt", data), tmp_path / "model.pkl", tmp_path / "nested.pt"]
    places[1].write_bytes(data)
    write_archive(places[2], b"\x80\x04}X\x05\x00\x00\x00model" + data.removeprefix(b"\x80\x04")[:-1] + b"s.")
    for path in places:
        with pytest.raises(CheckpointError, match="model|nested"):
            open_checkpoint(path)
    assert not marker.exists()
    assert not {m for m in set(sys.modules) - loaded if m.startswith(("webbrowser", "runpy", "antigravity"))}
    assert time.monotonic() - start < MAX_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MAX_MEGABYTES


def test_weights_beside_code_are_read_and_the_code_is_named(tmp_path):
    marker = tmp_path / "marker"

    class Exploit:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    torch.save({"state_dict": STATE, "hook": Exploit()}, tmp_path / "model.pt")
    with open_checkpoint(tmp_path / "model.pt") as checkpoint:
        assert same(checkpoint.state_dict(), STATE) and checkpoint.ignored == ("hook: posix.system",)
    assert not marker.exists()


@pytest.mark.parametrize("save", ["zip", "legacy", "pickle"])
def test_a_file_that_is_cut_anywhere_is_refused_or_reads_as_it_was(save, tmp_path):
    SAVES[save]({"a.weight": torch.arange(6.0), "b.weight": np.arange(3.0)}, tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    for end in range(1, len(good), 7):
        (tmp_path / "bad.pt").write_bytes(good[:end])
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path / "bad.pt")


@pytest.mark.parametrize("save", ["zip", "legacy", "pickle"])
def test_a_changed_byte_is_refused_or_harmless(save, tmp_path):
    SAVES[save]({"a.weight": torch.arange(6.0), "b.weight": np.arange(3.0)}, tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    for at in range(0, len(good), 3):
        (tmp_path / "bad.pt").write_bytes(good[:at] + bytes([good[at] ^ 0x41]) + good[at + 1 :])
        try:
            with open_checkpoint(tmp_path / "bad.pt", allow_nonfinite=True) as checkpoint:
                checkpoint.state_dict()
        except CheckpointError as error:
            assert "bad.pt" in str(error)


def test_a_zip_bomb_is_refused_without_unpacking_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(50_000_000))
    with pytest.raises(CheckpointError, match="records are compressed"):
        open_checkpoint(tmp_path / "bomb.pt")
