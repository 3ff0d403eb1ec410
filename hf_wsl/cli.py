"""The `hf-wsl` command: a table of commands, and for each of them what it prints.

`command_line.py` reads the arguments. All else is imported when its turn comes: help and errors need none of it.
"""

from __future__ import annotations

import platform
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command_line import run_command, terminal_width
from .errors import run_for_shell
from .options import PRECISION_HELP, PRECISIONS, ConfigError, argument, nearest, option, part_of, read_yaml


if TYPE_CHECKING:
    from datasets_scripts.collect.config import CollectOptions
    from datasets_scripts.embedding.embed_config import EmbedOptions
    from datasets_scripts.search.search_config import CompareOptions, ScanOptions, SearchOptions
    from datasets_scripts.tokenize_config import TokenizeOptions
    from trainers.evaluation.evaluate_config import EvaluateConfig
    from trainers.generation.generate_options import GenerateOptions
    from trainers.probing.probe_config import ProbeConfig
    from trainers.zoo.zoo_config import ZooConfig


# Building data


@dataclass(frozen=True)
class QuickstartOptions:
    """The command line of `hf-wsl quickstart`."""

    EXAMPLE = "hf-wsl quickstart --output_dir quickstart"

    output_dir: Path = option(
        Path("quickstart"), "Folder for everything that the run makes.", metavar="DIR", was=("output",)
    )
    seed: int = option(0, "Of every random step.")
    overwrite_output_dir: bool = option(False, "Delete the quickstart that output_dir holds, and begin anew.")


def quickstart(options: QuickstartOptions) -> Iterator[str]:
    from trainers.quickstart.quickstart import quickstart as run

    run(options.output_dir, seed=options.seed, overwrite=options.overwrite_output_dir)
    yield f"Report: {options.output_dir / 'report.html'}"


def tokenize(options: TokenizeOptions) -> Iterator[str]:
    from datasets_scripts.tokenize import tokenize as run
    from datasets_scripts.tokenize_config import TokenizeConfig

    config = part_of(options, TokenizeConfig)
    report = run(options.sources, options.output_dir, config, overwrite=options.overwrite_output_dir)
    yield (
        f"{report.output}: {report.accepted} models, {report.num_tokens:,} tokens in {report.num_windows:,} windows, "
        f"{report.padding:.3%} padding; {report.refused} models refused (reasons: config `models`, split `refused`)"
    )


def collect(options: CollectOptions) -> Iterator[str]:
    from datasets_scripts.collect.collect import collect as run
    from datasets_scripts.collect.config import CollectConfig
    from datasets_scripts.collect.plan import plan_collection

    config = part_of(options, CollectConfig)
    if options.dry_run:
        yield from plan_collection(config, options.models).lines()
        return
    if options.ranks:
        from datasets_scripts.collect.ranks import collect_with_ranks

        report = collect_with_ranks(
            options.output_dir,
            config,
            options.models,
            ranks=options.ranks,
            executor=options.executor,
            options=read_yaml(file, "--executor_options") if (file := options.executor_options) else None,
        )
        if report is None:
            yield (
                f"{options.output_dir}: ranks are still to end; the last job, or this command again, makes the dataset"
            )
            return
    else:
        report = run(options.output_dir, config, options.models, overwrite=options.overwrite_output_dir)
    table = ", ".join(f"{number} {outcome}" for outcome, number in report.outcomes.items())
    yield f"{report.output}: {table}"
    yield (
        f"{report.accepted} models, {report.num_tokens:,} tokens in {report.num_windows:,} windows, "
        f"{report.padding:.3%} padding"
    )


def zoo(options: ZooConfig) -> Iterator[str]:
    from trainers.zoo.build_zoo import build_zoo

    report = build_zoo(options)
    yield (
        f"{report.output}: {report.members} members, {report.checkpoints} checkpoints; "
        f"{len(report.diverged)} members diverged"
    )


# Looking at models


def embed(options: EmbedOptions) -> Iterator[str]:
    from datasets_scripts.embedding import EmbedConfig
    from datasets_scripts.embedding import embed as run

    report = run(options.method, options.sources, options.output_file, part_of(options, EmbedConfig))
    yield f"{options.output_file}: {report.rows} models embedded, {len(report.refused)} could not be read"
    yield from (f"  {model_id}: {reason}" for model_id, reason in report.refused.items())


def search(options: SearchOptions) -> list[str]:
    from datasets_scripts.search.search import search as run
    from datasets_scripts.search.search_config import SearchConfig

    return run(options.table, options.query, part_of(options, SearchConfig))


def compare(options: CompareOptions) -> Iterator[str]:
    from datasets_scripts.search.compare import compare as run
    from datasets_scripts.search.compare import write_comparison

    comparison = run(options.first, options.second, table=options.table, allow_nonfinite=options.allow_nonfinite)
    yield from comparison.lines()
    if options.output_file is not None:
        write_comparison(comparison, options.output_file)
        yield f"{options.output_file}: the comparison"


def scan(options: ScanOptions) -> Iterator[str]:
    from datasets_scripts.search.scan import scan as run

    matches = run(options.model, options.table, top=options.top, allow_nonfinite=options.allow_nonfinite)
    copies = [match for match in matches if match.kind != "neighbor"]
    yield f"{options.model}: {len(copies) or 'no'} {'copy' if len(copies) == 1 else 'copies'} in the table"
    yield from (match.line() for match in copies)
    yield "Nearest of the others, by their profile:"
    yield from (match.line() for match in matches if match.kind == "neighbor")


@dataclass(frozen=True)
class InspectOptions:
    """The command line of `hf-wsl inspect`."""

    EXAMPLE = "hf-wsl inspect models/resnet18 --backbone backbone --table embeddings.parquet --output_file page.html"

    model: str = argument(
        "Weight file, folder or Hub id of one model, or a part of it (org/name:subfolder#key@revision, file.pt#ema)."
    )
    backbone: str | None = option(None, "Folder or Hub id of a WSL model: what is left of each layer after it.")
    table: Path | None = option(None, "Of `hf-wsl embed`: which of its models are nearest.", metavar="FILE")
    output_file: Path | None = option(
        None, "Write an HTML page too: page.html.", metavar="FILE", was=("output_dir",), also=("output",)
    )
    overwrite_output_file: bool = option(False, "Replace a file that is there.")
    precision: str = option("auto", PRECISION_HELP, PRECISIONS)


def inspect(options: InspectOptions) -> Iterator[str]:
    if options.table is not None and not options.table.is_file():
        raise ConfigError(f"option 'table': there is no file {options.table}; `hf-wsl embed` writes one")

    from datasets_scripts.inspection.model_inspection import inspect_model
    from datasets_scripts.inspection.page import write_page
    from datasets_scripts.inspection.report import text_report

    inspection = inspect_model(options.model, options.backbone, options.table, options.precision)
    yield text_report(inspection)
    if options.output_file is not None:
        write_page(inspection, options.output_file)
        yield f"\nPage: {options.output_file}"


def probe(options: ProbeConfig) -> Iterator[str]:
    from trainers.probing.probe import probe as run
    from trainers.probing.probe_report import printed_lines

    yield from printed_lines(run(options))


# Making models


def generate(options: GenerateOptions) -> Iterator[str]:
    from trainers.generation.generate import generate as run

    yield from run(options)


def evaluate(options: EvaluateConfig) -> Iterator[str]:
    from trainers.evaluation.evaluate import evaluate as run

    results = run(options)
    yield f"{Path(options.output_dir) / 'evaluation.md'}: {len(results['arms'])} arms"


# The paper, the Hub, this machine


@dataclass(frozen=True)
class ReproduceOptions:
    """The command line of `hf-wsl reproduce`."""

    EXAMPLE = "hf-wsl reproduce table7 --images cifar10=data/cifar10 --models public_models=models --page RESULTS.md"

    tables: list = argument(
        "table1, 2, 6 to 12, figure2 to 6, 8, populations, codes, or all; donors: weights for other sizes; speed "
        "prints what the scripts under benchmarks/ have measured.",
        [],
    )
    scale: str = option("small", "paper, small, or a YAML file like theirs.")
    images: list = option([], "Data sets of images, folders or Hub ids.", metavar="NAME=PATH,...")
    text: list = option([], "Texts, files or Hub ids.", metavar="NAME=PATH,...")
    models: list = option([], "Trained models, folders of folders or lists.", metavar="NAME=PATH,...")
    work_dir: Path = option(
        Path("reproduce"), "Folder for all that is trained; what lies there is not done again.", metavar="DIR"
    )
    output_dir: Path = option(
        Path("results"), "Folder of the results' JSON and pictures.", metavar="DIR", was=("results",)
    )
    page: Path | None = option(None, "Write the results page too: RESULTS.md.", metavar="FILE")
    num_workers: int = option(1, "Processes; with a GPU, 1.")
    dry_run: bool = option(False, "Print what would be done, and do nothing.")

    def __post_init__(self) -> None:
        if not self.tables and self.page is None and not self.dry_run:
            raise ConfigError("name tables (or all), or give --page to write the page alone")


def reproduce(options: ReproduceOptions) -> Iterator[str]:
    from trainers.reproduction.speed import SPEED, speed_table

    tables = [table for table in options.tables if table not in (SPEED, "donors")]
    if SPEED in options.tables:
        yield speed_table(options.output_dir)
        if not tables and options.page is None:
            return

    from trainers.reproduction.reproduce import parse_given, plan_lines
    from trainers.reproduction.reproduce import reproduce as run
    from trainers.reproduction.results_page import write_page

    given = parse_given(options.images, options.text, options.models)
    if "donors" in options.tables and not options.dry_run:
        from trainers.reproduction.donors import reproduce_donors

        if "cifar10" not in given.images:
            raise ConfigError("donors are of CIFAR-10: give its folder, --images cifar10=FOLDER")
        models = given.models.get("public_models")
        places = Path(given.images["cifar10"]), models and Path(models), options.work_dir, options.output_dir
        yield str(reproduce_donors(*places))
        if not tables and options.page is None:
            return
    if options.dry_run:
        yield from plan_lines(tables or ["all"], options.scale, given, options.work_dir)
        return
    if tables:
        done = run(tables, options.scale, given, options.work_dir, options.output_dir, options.num_workers)
        yield from map(str, done)
    if options.page is not None:
        yield str(write_page(options.output_dir, options.page))


@dataclass(frozen=True)
class PublishOptions:
    """The command line of `hf-wsl publish`."""

    EXAMPLE = "hf-wsl publish backbone org/hf-wsl-tiny --dry_run"

    folder: Path = argument("Of a tokenized dataset, a backbone or a generated model.")
    repo_id: str = argument("owner/name on the Hub; made where it does not exist.")
    private: bool = option(False, "Make a new repository private.")
    revision: str | None = option(None, "Branch to commit to.")
    create_pr: bool = option(False, "Offer a pull request instead.")
    license: str | None = option(
        None, "To publish a model under, as the Hub spells it, where none follows from facts."
    )
    message: str | None = option(None, "Of the commit.")
    dry_run: bool = option(False, "Print what would be done, and do nothing.")
    yes: bool = option(False, "Do not ask.", short="y")


def publish(options: PublishOptions) -> Iterator[str]:
    from hub_cards.publish import publish as run
    from hub_cards.upload import PublishPlan

    def confirm(plan: PublishPlan) -> bool:
        sys.stdout.write("\n".join(plan.lines()) + "\n")
        return not options.dry_run and (options.yes or plan.does_nothing or _agrees("Do this?"))

    names = ("private", "revision", "create_pr", "license", "message")
    settings = {name: getattr(options, name) for name in names}
    result = run(options.folder, options.repo_id, **settings, confirm=confirm)
    if result is not None:
        done = f"{len(result.sent)} files sent" if result.sent else "nothing had changed"
        yield f"{result.pull_request_url or result.commit_url} ({done})"


def _agrees(question: str) -> bool:
    """The answer of whoever sits there; without one, no."""
    sys.stdout.write(f"{question} [y/N]: ")
    sys.stdout.flush()
    answer = sys.stdin.readline()
    if not answer:
        raise ConfigError("nobody answers here; add --yes to go on without a question")
    return answer.strip().lower() in ("y", "yes")


@dataclass(frozen=True)
class EnvOptions:
    """The command line of `hf-wsl env`."""

    EXAMPLE = "hf-wsl env"


def env(options: EnvOptions) -> Iterator[str]:
    import torch

    packages = (
        "hf-wsl torch torchvision transformers datasets accelerate huggingface_hub safetensors timm peft evaluate"
    )
    yield f"platform: {platform.platform()}"
    yield f"python: {platform.python_version()}"
    for package in packages.split():
        yield f"{package}: {installed_version(package)}"
    yield f"cuda device: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}"
    yield f"threads: {torch.get_num_threads()}"


def installed_version(package: str) -> str:
    """The version of an installed package, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


# The table


@dataclass(frozen=True)
class Command:
    """A command: its name, a line about it, its options (a dataclass, or "module:name" of one) and its function, which
    takes them and gives lines to print."""

    name: str
    summary: str
    options: type | str
    function: Callable[[Any], Any] | str


COMMANDS = (
    Command("quickstart", "Go the way once on small data, offline, and report it.", QuickstartOptions, quickstart),
    Command(
        "collect",
        "Collect models of the Hub into a tokenized dataset. Run it again to go on after an interruption.",
        "datasets_scripts.collect.config:CollectOptions",
        collect,
    ),
    Command(
        "tokenize",
        "Turn models into a Parquet dataset of their weights. Run it again to go on after an interruption.",
        "datasets_scripts.tokenize_config:TokenizeOptions",
        tokenize,
    ),
    Command("zoo", "Train a zoo of small models over a grid of settings.", "trainers.zoo.zoo_config:ZooConfig", zoo),
    Command(
        "pretrain",
        "Train a backbone on a tokenized dataset.",
        "trainers.pretraining.pretrain_options:PretrainOptions",
        "trainers.pretrain:train",
    ),
    Command("embed", "Embed models by their weights.", "datasets_scripts.embedding.embed_config:EmbedOptions", embed),
    Command(
        "compare",
        "Tell what one model is to another: the same, a copy, a fine-tune, permuted, unrelated; with the evidence.",
        "datasets_scripts.search.search_config:CompareOptions",
        compare,
    ),
    Command(
        "scan",
        "Look a model up in a table of fingerprints: whose copy it is, and what it is like.",
        "datasets_scripts.search.search_config:ScanOptions",
        scan,
    ),
    Command(
        "search",
        "Find the models of a table whose weights are most alike, copies among them, or who descends from whom.",
        "datasets_scripts.search.search_config:SearchOptions",
        search,
    ),
    Command("inspect", "Show a model's layers, their values, and what is odd about them.", InspectOptions, inspect),
    Command(
        "probe",
        "Predict properties of models from their weights, beside baselines.",
        "trainers.probing.probe_config:ProbeConfig",
        probe,
    ),
    Command(
        "generate",
        "Generate models: around trained anchors of the same architecture, or from donors of other sizes.",
        "trainers.generation.generate_options:GenerateOptions",
        generate,
    ),
    Command(
        "finetune",
        "Fine-tune a generated, trained or new model on images or text.",
        "trainers.finetuning.finetune_options:FinetuneCommandOptions",
        "trainers.finetune:train",
    ),
    Command(
        "evaluate",
        "Compare generated weights with every control, on one architecture and one dataset.",
        "trainers.evaluation.evaluate_config:EvaluateConfig",
        evaluate,
    ),
    Command(
        "reproduce",
        "Run tables and figures of the paper again, with every control. Run it again to go on.",
        ReproduceOptions,
        reproduce,
    ),
    Command(
        "publish",
        "Put a dataset, backbone or generated model on the Hub, with a card made of facts. Run it again to go on.",
        PublishOptions,
        publish,
    ),
    Command("env", "Print the versions that a bug report needs.", EnvOptions, env),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `hf-wsl` with these arguments (by default those of the process).

    Returns:
        The exit code; 1 after an error that a user can mend, which is one line on stderr. With `HF_WSL_TRACEBACK=1`
        it is raised instead.
    """
    rest = list(sys.argv[1:] if argv is None else argv)
    levels = []
    while rest and rest[0] in ("-v", "--verbose", "-q", "--quiet"):
        levels.append(rest.pop(0))
    if not rest or rest[0] in ("-h", "--help"):
        sys.stdout.write(_overview())
        return 0
    if rest[0] == "--version":
        sys.stdout.write(f"hf-wsl {installed_version('hf-wsl')}\n")
        return 0
    name = rest.pop(0)
    command = next((command for command in COMMANDS if command.name == name), None)
    if command is None:
        return run_for_shell(lambda: _refuse(name))
    return run_command(
        command.options, command.function, [*levels, *rest], program=f"hf-wsl {name}", summary=command.summary
    )


def _refuse(name: str) -> None:
    kind, known = "command", [command.name for command in COMMANDS]
    if name.startswith("-"):
        kind, known = "option", ["--version", "--verbose", "--quiet", "--help"]
    raise ConfigError(f"unknown {kind} '{name}'.{nearest(name, known)} `hf-wsl --help` lists all.")


def _overview() -> str:
    """The text of `hf-wsl --help`, wrapped to the terminal."""
    about = "Weight-space learning on public models: collect, tokenize, pretrain, embed, generate, publish."
    general = {
        "-v, --verbose": "Log more.",
        "-q, --quiet": "Log warnings only, and show no progress bars.",
        "--version": "Print the version.",
        "-h, --help": "Show this help; `hf-wsl COMMAND --help` shows the options of a command.",
    }
    lines = ["usage: hf-wsl [-v | -q] COMMAND ...", "", *textwrap.wrap(about, terminal_width()), "", "commands:"]
    lines += _two_columns({command.name: command.summary for command in COMMANDS})
    lines += ["", "options:", *_two_columns(general), "", "Example:", f"  {QuickstartOptions.EXAMPLE}"]
    return "\n".join(lines) + "\n"


def _two_columns(rows: Mapping[str, str]) -> list[str]:
    indent = max(map(len, rows)) + 4
    return [
        line
        for name, text in rows.items()
        for line in textwrap.wrap(
            text, terminal_width(), initial_indent=f"  {name}".ljust(indent), subsequent_indent=" " * indent
        )
    ]


if __name__ == "__main__":
    sys.exit(main())
