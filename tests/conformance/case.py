"""The parts of the conformance table: a file of a kind that people have, and what the reader has to make of it."""

import importlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from modeling_wsl import WSLFeatureExtractor
from modeling_wsl.checkpoints.canonical import canonical, canonical_sha256
from modeling_wsl.checkpoints.checkpoint import Checkpoint, open_checkpoint
from modeling_wsl.checkpoints.errors import CheckpointError


HERE = Path(__file__).parent
FIXTURES = HERE.parent / "fixtures" / "checkpoints"
State = dict[str, torch.Tensor]
Outcome = Literal["read", "dequantized", "refused"]
# A path or reference for `open_checkpoint`, below the folder that was given; and the state dict that must come out of
# it, None where the file is refused or nothing but the file itself can tell.
Made = tuple[Any, State | None]


@dataclass(frozen=True)
class Case:
    """A row of the table.

    A module `*_cases.py` of this folder lists its cases in `CASES`. Where the packages of `needs` are not installed,
    the files that `make_fixtures.py` wrote are taken, and without these the case is left out.

    Attributes:
        name: unlike all others; also the name of its folder of committed files.
        kind: rows of one kind stand together ("Quantized weights").
        layout: what the file is, in a few words.
        maker: the package that writes it (its version is read when it does), or words ("by hand").
        make: writes the files into an empty folder; gives the source and its truth. Same bytes at every call.
        outcome: "read" bit for bit, "dequantized" within `bound`, or "refused".
        says: words that the reader must say: in the reason of a refusal, in `stored_as`, in `constants` or `ignored`.
        bound: largest difference from the truth, relative to the largest entry of the tensor.
        options: of `open_checkpoint`.
        needs: modules without which it cannot be made.
        reads_with: modules without which it cannot be read: the case is left out.
        same_as: gives the plain network that the file holds in another spelling: both must have one canonical digest,
            or, with a `bound`, canonical views that differ by no more.
    """

    name: str
    kind: str
    layout: str
    maker: str
    make: Callable[[Path], Made]
    outcome: Outcome = "read"
    says: tuple[str, ...] = ()
    bound: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    reads_with: tuple[str, ...] = ()
    same_as: Callable[[], Any] | None = None

    @property
    def fixture(self) -> Path:
        return FIXTURES / self.name

    @property
    def can_be_made(self) -> bool:
        return all(util.find_spec(module) for module in self.needs)

    def prepare(self, folder: Path, *, anew: bool) -> tuple[Any, State | None, str]:
        """The source, its truth and its maker.

        Args:
            folder: an empty one.
            anew: make the files even where committed ones are there, if that can be done.
        """
        if self.can_be_made and (anew or not self.fixture.is_dir()):
            return *self.make(folder), with_version(self.maker)
        facts = json.loads((self.fixture / "made.json").read_text())
        truth = self.fixture / "truth.safetensors"
        source = str(self.fixture / "files") + facts["source"]
        return source, load_file(truth) if truth.exists() else None, facts["maker"]

    def keep(self) -> None:
        """Writes the files into the repository, for machines that lack the packages of `needs`."""
        files = self.fixture / "files"
        files.mkdir(parents=True)
        source, truth = self.make(files)
        if truth is not None:
            save_file(
                {name: tensor.contiguous().clone() for name, tensor in truth.items()}, files / "../truth.safetensors"
            )
        facts = {"maker": with_version(self.maker), "source": str(source).removeprefix(str(files))}
        (self.fixture / "made.json").write_text(json.dumps(facts) + "\n")


@dataclass(frozen=True)
class Report:
    """How the reader took a case.

    Attributes:
        outcome: as in `Case`, or "failed": another error than a refusal.
        says: the reason of the refusal, or what the reader says about the file beside its tensors.
        error: largest relative difference from the truth, 0.0 where every bit is the same, None without a truth.
        problem: how this differs from what the case asks for; empty if it does not.
    """

    outcome: str
    says: str
    error: float | None
    problem: str


def try_case(case: Case, source: Any, truth: State | None) -> Report:
    """Opens a source, tokenizes and decodes it, and compares that with the truth."""
    try:
        with open_checkpoint(source, **case.options) as checkpoint:
            extractor = WSLFeatureExtractor()
            batch = extractor(checkpoint)
            state = extractor.decode(batch["tokens"], batch["manifest"])
            schemes = sorted(set(checkpoint.stored_as.values()))
            constants = f"constants: {', '.join(sorted(checkpoint.constants))}" if checkpoint.constants else ""
            says = "; ".join(filter(None, [*schemes, constants, *checkpoint.ignored]))
            outcome = "dequantized" if schemes else "read"
            identity = same_network_as(checkpoint, case) if case.same_as else ""
    except CheckpointError as error:
        outcome, says, state, identity = "refused", error.reason, {}, ""
    except Exception as error:  # a row like any other: the table shows it
        outcome, says, state, identity = "failed", f"{type(error).__name__}: {error}"[:300], {}, ""
    problems = [f"is {outcome} ({says or 'without a word'}), not {case.outcome}"] * (outcome != case.outcome)
    problems += [f"does not say {words!r} but {says!r}" for words in case.says if words not in says]
    if identity.startswith("not"):
        problems.append(f"is {identity}")
    says = "; ".join(filter(None, [says, identity]))
    difference = None
    if state and truth is not None:
        difference, problem = compare(state, truth)
        problems += [problem] * bool(problem)
        if difference is not None and difference > case.bound:
            problems.append(f"differs by {difference:.2g} of the largest entry, more than {case.bound:.2g}")
    elif state and case.outcome != "refused":
        problems.append("has no truth to be compared with")
    return Report(outcome, says, difference, "; ".join(problems))


def same_network_as(checkpoint: Checkpoint, case: Case) -> str:
    """Words on whether a file holds the network that `case.same_as` gives."""
    with open_checkpoint(case.same_as()) as plain:
        if canonical_sha256(checkpoint) == canonical_sha256(plain):
            return "the same network as the plain file"
        views = [canonical(model) for model in (checkpoint, plain)]
        if case.bound and list(views[0].tensors) == list(views[1].tensors):
            pairs = [[view.read(name).double() for view in views] for name in views[0].tensors]
            difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
            if difference <= case.bound:
                return f"the network of the plain file, within {case.bound:.0g}"
    return "not the network of the plain file"


def compare(state: State, truth: State) -> tuple[float | None, str]:
    """The largest relative difference (0.0: the same bits), or None and how names, shapes or dtypes differ."""
    if set(state) != set(truth):
        lost, added = sorted(set(truth) - set(state)), sorted(set(state) - set(truth))
        return None, f"lacks {lost[:3]}, has {added[:3]} beyond the truth"
    largest = 0.0
    for name, expected in truth.items():
        tensor = state[name]
        if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
            return None, f"{name} is {tensor.dtype} {list(tensor.shape)}, not {expected.dtype} {list(expected.shape)}"
        if not same_bits(tensor, expected):
            wide, other = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (tensor, expected))
            scale = float(other.abs().max()) or 1.0
            # Another NaN or zero of another sign is a difference too.
            largest = max(largest, float((wide - other).abs().max()) / scale, torch.finfo(torch.float64).tiny)
    return largest, ""


def same_bits(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    first, second = (t.resolve_conj().contiguous().reshape(-1).view(torch.uint8) for t in (tensor, other))
    return torch.equal(first, second)


@cache
def distributions_of_modules() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()  # reads the files of every installed package: half a second


def with_version(maker: str) -> str:
    """The name and version of a package, or the words as they are; `tensorflow` may come as `tensorflow-cpu`."""
    for name in (maker, *distributions_of_modules().get(maker, ())):
        try:
            return f"{maker} {metadata.version(name)}"
        except (metadata.PackageNotFoundError, ValueError):
            continue
    return maker


def all_cases() -> list[Case]:
    """The cases of all modules `*_cases.py`, those of one kind together, plain ones first."""
    modules = sorted((path.stem for path in HERE.glob("*_cases.py")), key=lambda name: (name != "plain_cases", name))
    cases = [case for name in modules for case in importlib.import_module(name).CASES]
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), sorted({name for name in names if names.count(name) > 1})
    kinds = list(dict.fromkeys(case.kind for case in cases))
    return sorted(cases, key=lambda case: kinds.index(case.kind))


def available() -> list[Case]:
    def readable(case: Case) -> bool:
        return all(util.find_spec(module) for module in case.reads_with)

    return [case for case in all_cases() if readable(case) and (case.can_be_made or case.fixture.is_dir())]


def weights(*, dtype: torch.dtype = torch.float32, width: int = 24) -> State:
    """A small network's tensors in state-dict order, which no sort gives, of one dtype."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "stem.weight": (width, 3, 3, 3),
        "stem.bias": (width,),
        "blocks.10.weight": (2 * width, width),
        "blocks.2.weight": (width, 2 * width),
        "blocks.2.bias": (width,),
        "head.weight": (10, width),
    }
    return {name: (torch.randn(shape, generator=generator) * 0.1).to(dtype) for name, shape in shapes.items()}


def in_new_folder(function: Callable[[Path], Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return function(Path(folder))
