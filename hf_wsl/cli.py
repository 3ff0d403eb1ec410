"""The `hf-wsl` command. Thin: every command reads its options and calls one function of the packages.

The other packages are imported inside the commands: the library itself never depends on them.
"""

import dataclasses
import inspect
import logging
import os
import platform
import sys
import typing
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer


app = typer.Typer(
    help="Weight-space learning on public models: collect, tokenize, pretrain, embed, generate, publish.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file of these options; the command line outranks it.")
]


@app.callback()
def log_level(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log warnings only, show no progress bars.")] = False,
) -> None:
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr)
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    for package in ("modeling_wsl", "datasets_scripts", "trainers", "hub_cards"):
        logging.getLogger(package).setLevel(level)
    if quiet:
        import datasets
        import huggingface_hub
        import transformers

        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
        transformers.logging.disable_progress_bar()
        transformers.logging.set_verbosity_error()


def options_of(module: str, name: str) -> typing.Callable[[typing.Callable], typing.Callable]:
    """Gives a command one option per field of a config dataclass, described by the field's own help text.

    Options that are not given arrive as None, so that a YAML file can set them.
    """

    def with_options(command: typing.Callable) -> typing.Callable:
        config = getattr(__import__(module, fromlist=[name]), name)
        hints = typing.get_type_hints(config)
        own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
        for field in dataclasses.fields(config):
            choices = field.metadata.get("choices")
            is_list = hints[field.name] is list  # text with commas here
            option = typer.Option(
                help=field.metadata["help"] + ("" if is_list else f" [default: {field.default}]"),
                metavar="|".join(choices) if choices else None,
                show_default=False,
            )
            kind = Annotated[(str if is_list else hints[field.name]) | None, option]
            own.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
        command.__signature__ = inspect.Signature(own)
        return command

    return with_options


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for everything that the run makes.")] = Path("quickstart"),
    seed: Annotated[int, typer.Option(help="Of every random step.")] = 0,
) -> None:
    """The whole chain on scikit-learn's digits, without network, and a report of it.

    Example: hf-wsl quickstart --output quickstart
    """
    from trainers.quickstart.quickstart import quickstart as run

    run(output, seed=seed)
    typer.echo(f"Report: {output / 'report.html'}")


@app.command()
@options_of("datasets_scripts.tokenize_config", "TokenizeConfig")
def tokenize(
    sources: Annotated[list[str], typer.Argument(help="Models, folders of models, Hub ids, or lists of these.")],
    output: Annotated[Path, typer.Option(help="Folder of the dataset.")],
    config: ConfigFile = None,
    **options: Any,
) -> None:
    """Turn models into a Parquet dataset of their weights. Run it again to go on after an interruption.

    Example: hf-wsl tokenize models/ --output tokens --num-workers 2
    """
    from datasets_scripts.tokenize import tokenize as run
    from datasets_scripts.tokenize_config import TokenizeConfig

    from .options import build, read_yaml

    given = ("command line", {name: value for name, value in options.items() if value is not None})
    from_file = (str(config), read_yaml(config) if config else {})
    report = run(sources, output, build(TokenizeConfig, from_file, given))
    typer.echo(
        f"{report.output}: {report.accepted} models, {report.num_tokens:,} tokens in {report.num_windows:,} windows, "
        f"{report.padding:.3%} padding; {report.refused} models refused (reasons: config `models`, split `refused`)"
    )


@app.command()
@options_of("datasets_scripts.collect.config", "CollectConfig")
def collect(
    output: Annotated[Path, typer.Option(help="Folder of the dataset; on a file system that all ranks see.")],
    models: Annotated[
        list[str] | None, typer.Argument(help="Hub ids (org/name@revision) or lists of them, instead of a query.")
    ] = None,
    config: ConfigFile = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would take; read no weights.")] = False,
    ranks: Annotated[int, typer.Option(help="Run on datatrove, with so many shares of the models; 0 = here.")] = 0,
    executor: Annotated[str, typer.Option(help="Of the ranks.", metavar="local|slurm|ray")] = "local",
    executor_options: Annotated[
        Path | None, typer.Option(help="YAML file of further arguments of datatrove's executor: workers, time ...")
    ] = None,
    **options: Any,
) -> None:
    """Collect models of the Hub into a tokenized dataset. Run it again to go on after an interruption.

    Example: hf-wsl collect --output tokens --num-train 2000 --num-validation 200 --num-workers 4
    """
    from datasets_scripts.collect.collect import collect as run
    from datasets_scripts.collect.config import CollectConfig
    from datasets_scripts.collect.plan import plan_collection

    from .options import build, read_yaml

    given = ("command line", {name: value for name, value in options.items() if value is not None})
    from_file = (str(config), read_yaml(config) if config else {})
    built = build(CollectConfig, from_file, given)
    if dry_run:
        typer.echo("\n".join(plan_collection(built, models or ()).lines()))
        return
    if ranks:
        from datasets_scripts.collect.ranks import collect_with_ranks

        report = collect_with_ranks(
            output,
            built,
            models or (),
            ranks=ranks,
            executor=executor,
            options=read_yaml(executor_options) if executor_options else None,
        )
        if report is None:
            typer.echo(f"{output}: ranks are still to end; the last job, or this command again, makes the dataset")
            return
    else:
        report = run(output, built, models or ())
    table = ", ".join(f"{number} {outcome}" for outcome, number in report.outcomes.items())
    totals = report.counts
    typer.echo(f"{report.output}: {table}")
    typer.echo(
        f"{totals['accepted']} models, {totals['num_tokens']:,} tokens in {totals['num_windows']:,} windows, "
        f"{totals['padding']:.3%} padding"
    )


@app.command(context_settings=PASS_ON, add_help_option=False)
def zoo(context: typer.Context) -> None:
    """Train a zoo of small models over a grid of settings; `hf-wsl zoo --help` lists all options.

    Example: hf-wsl zoo --data.images mnist --data.channels 1 --seeds 200 --epochs 10 --output_dir zoo
    """
    from trainers.zoo.build_zoo import build_zoo
    from trainers.zoo.zoo_config import ZooConfig

    report = build_zoo(ZooConfig.from_command_line(context.args))
    typer.echo(
        f"{report.output}: {report.members} members, {report.checkpoints} checkpoints; "
        f"{len(report.diverged)} members diverged"
    )


@app.command(context_settings=PASS_ON, add_help_option=False)
def pretrain(context: typer.Context) -> None:
    """Train a backbone on a tokenized dataset; `hf-wsl pretrain --help` lists all options.

    Example: hf-wsl pretrain --config tiny --dataset tokens --output_dir backbone
    """
    from trainers.pretrain import run

    raise typer.Exit(run(context.args))


@app.command(context_settings=PASS_ON, add_help_option=False)
def finetune(context: typer.Context) -> None:
    """Fine-tune a generated, trained or new model on images or text; `hf-wsl finetune --help` lists all options.

    Example: hf-wsl finetune --model generated/000 --data.images images/ --data.image_size 32 --output_dir tuned
    """
    from trainers.finetune import run

    raise typer.Exit(run(context.args))


@app.command(context_settings=PASS_ON, add_help_option=False)
def probe(context: typer.Context) -> None:
    """Predict properties of models from their weights, beside baselines; `hf-wsl probe --help` lists all options.

    Example: hf-wsl probe --models zoo --target test_accuracy,epoch --backbones backbone --output_dir probe
    """
    from trainers.probing.probe import probe as run
    from trainers.probing.probe_config import ProbeConfig

    config = ProbeConfig.from_command_line(context.args)
    results = run(config)
    embeddings = f"{len(results['sizes'])} embeddings of {results['models']['count']} models"
    typer.echo(f"{Path(config.output_dir) / 'probe.md'}: {embeddings}, {len(results['skipped'])} left out")


@app.command(context_settings=PASS_ON, add_help_option=False)
def evaluate(context: typer.Context) -> None:
    """Compare generated weights with every control; `hf-wsl evaluate --help` lists all options.

    Example: hf-wsl evaluate --backbone backbone --target resnet18 --anchors anchor --data.images DIR --output_dir OUT
    """
    from trainers.evaluation.evaluate import evaluate as run
    from trainers.evaluation.evaluate_config import EvaluateConfig

    config = EvaluateConfig.from_command_line(context.args)
    results = run(config)
    typer.echo(f"{Path(config.output_dir) / 'evaluation.md'}: {len(results['arms'])} arms")


@app.command()
@options_of("datasets_scripts.embedding.embed_config", "EmbedConfig")
def embed(
    method: Annotated[
        str,
        typer.Argument(
            help="A backbone (folder or Hub id), or one of: statistics, pooled-statistics, spectral-norms, "
            "random-projection, pca."
        ),
    ],
    sources: Annotated[
        list[str], typer.Argument(help="Models, folders of models, Hub ids (org/name@revision), or lists of these.")
    ],
    output: Annotated[Path, typer.Option(dir_okay=False, help="Parquet file: model_id, revision, embedding, x, y.")],
    config: ConfigFile = None,
    **options: Any,
) -> None:
    """Embed models by their weights.

    Example: hf-wsl embed backbone models/ --output embeddings.parquet
    """
    from datasets_scripts.embedding import EmbedConfig
    from datasets_scripts.embedding import embed as run

    from .options import build, read_yaml

    given = ("command line", {name: value for name, value in options.items() if value is not None})
    from_file = (str(config), read_yaml(config) if config else {})
    report = run(method, sources, output, build(EmbedConfig, from_file, given))
    typer.echo(f"{output}: {report.rows} models embedded, {len(report.refused)} could not be read")


@app.command("inspect")
def inspect_command(
    model: Annotated[str, typer.Argument(help="Weight file, folder or Hub id (org/name@revision) of one model.")],
    backbone: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a WSL model: what is left of each layer after it.")
    ] = None,
    table: Annotated[Path | None, typer.Option(help="Of `hf-wsl embed`: which of its models are nearest.")] = None,
    output: Annotated[Path | None, typer.Option(dir_okay=False, help="Write an HTML page too: page.html.")] = None,
) -> None:
    """What is in a model: its layers, their distributions, what is odd about them.

    Example: hf-wsl inspect models/resnet18 --backbone backbone --table embeddings.parquet --output page.html
    """
    from datasets_scripts.inspection.model_inspection import inspect_model
    from datasets_scripts.inspection.page import write_page
    from datasets_scripts.inspection.report import text_report

    inspection = inspect_model(model, backbone, table)
    typer.echo(text_report(inspection))
    if output is not None:
        write_page(inspection, output)
        typer.echo(f"\nPage: {output}")


@app.command()
@options_of("datasets_scripts.search.search_config", "SearchConfig")
def search(
    table: Annotated[Path, typer.Argument(help="Parquet file that `hf-wsl embed` wrote.")],
    query: Annotated[
        str | None, typer.Argument(help="A model_id of the table, or a model: path or Hub id (org/name@revision).")
    ] = None,
    config: ConfigFile = None,
    **options: Any,
) -> None:
    """Find the models of a table whose weights are most alike, copies among them, or who descends from whom.

    Example: hf-wsl search embeddings.parquet org/some-model --top 10
    """
    from datasets_scripts.search.search import search as run
    from datasets_scripts.search.search_config import SearchConfig

    from .options import build, read_yaml

    given = ("command line", {name: value for name, value in options.items() if value is not None})
    from_file = (str(config), read_yaml(config) if config else {})
    typer.echo("\n".join(run(table, query, build(SearchConfig, from_file, given))))


@app.command()
def prior(
    backbone: Annotated[Path, typer.Argument(help="Folder of a backbone; gets latent_prior.safetensors.")],
    dataset: Annotated[str, typer.Option(help="Folder or Hub id of the tokenized dataset that it was trained on.")],
    dataset_revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a dataset on the Hub.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to fit on, about.")] = 1_000_000,
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.")] = 8,
) -> None:
    """Fit what models are drawn from that have no trained anchor; `hf-wsl pretrain` does it at its end.

    Example: hf-wsl prior backbone --dataset tokens
    """
    from modeling_wsl.generation.latent_prior import PRIOR_FILE
    from trainers.pretraining.fit_prior import fit_and_save_prior

    options = {"dataset_revision": dataset_revision, "max_tokens": max_tokens, "batch_size": batch_size}
    fitted = fit_and_save_prior(backbone, dataset, **options)
    typer.echo(f"{backbone / PRIOR_FILE}: fitted on {fitted.num_tokens:,} tokens")


@app.command()
def generate(
    backbone: Annotated[str, typer.Argument(help="Folder or Hub id of a WSL model.")],
    target: Annotated[
        str, typer.Argument(help="timm name, or folder or Hub id (org/name@revision) of a transformers or timm model.")
    ],
    output: Annotated[Path, typer.Option(help="Folder; every model gets a folder of its own in it.")],
    anchors: Annotated[
        list[str] | None,
        typer.Option(
            help="Trained model of that architecture (org/name@revision); repeat for several. None: from the prior."
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="How to draw; by default from the anchors' density, or without anchors from the prior.",
            metavar="density|interpolation|prior",
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Models to generate.")] = 1,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    bandwidth: Annotated[float, typer.Option(help="Of the kernel density on the anchors' latents.")] = 0.2,
    noise: Annotated[
        str, typer.Option(help="One draw for all tokens, or one for each.", metavar="shared|independent")
    ] = "shared",
    num_classes: Annotated[int | None, typer.Option(help="Of the target, where other than the anchors'.")] = None,
    in_channels: Annotated[
        int | None, typer.Option(help="Of its images, where they differ from the anchors'.")
    ] = None,
    stem: Annotated[
        str, typer.Option(help="What becomes of a stem for other channels.", metavar="adapt|initialize")
    ] = "adapt",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a backbone on the Hub.")] = None,
) -> None:
    """Generate models of an architecture from trained anchors, or without any.

    Example: hf-wsl generate backbone resnet18 --anchors models/resnet18 --output generated --num-samples 5
    """
    from modeling_wsl.pipelines import load_pipeline

    draws = {"method": method, "num_samples": num_samples, "seed": seed, "bandwidth": bandwidth, "noise": noise}
    shapes = {"num_classes": num_classes, "in_channels": in_channels, "stem": stem}
    generator = load_pipeline("weight-generation", backbone, revision=revision)
    for index, model in enumerate(generator(target, anchors=anchors or (), **shapes, **draws)):
        folder = output / f"{index:03d}"
        model.save_pretrained(folder)
        typer.echo(f"{folder}")


@app.command()
def reproduce(
    tables: Annotated[
        list[str] | None,
        typer.Argument(
            help="table1, 2, 6 to 12, figure2 to 6, 8, populations, codes, or all; speed prints what the scripts "
            "under benchmarks/ have measured."
        ),
    ] = None,
    scale: Annotated[str, typer.Option(help="paper, small, or a YAML file like theirs.")] = "small",
    images: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH of a data set of images, a folder or a Hub id; repeat.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="NAME=PATH of a text, a file or a Hub id; repeat.")] = None,
    models: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH of trained models, a folder of folders or a list; repeat.")
    ] = None,
    work_dir: Annotated[
        Path, typer.Option(help="Folder for all that is trained; what lies there is not done again.")
    ] = Path("reproduce"),
    results: Annotated[Path, typer.Option(help="Folder of the results' JSON and pictures.")] = Path("results"),
    page: Annotated[Path | None, typer.Option(help="Write the results page too: RESULTS.md.")] = None,
    num_workers: Annotated[int, typer.Option(help="Processes; with a GPU, 1.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")] = False,
) -> None:
    """Run tables and figures of the paper again, with every control. Run it again to go on.

    Example: hf-wsl reproduce table7 --images cifar10=data/cifar10 --models public_models=models --page RESULTS.md
    """
    from trainers.reproduction.speed import SPEED, speed_table

    if SPEED in (tables or ()):
        typer.echo(speed_table(results))
        tables = [table for table in tables if table != SPEED]
        if not tables and page is None:
            return

    from trainers.reproduction.reproduce import parse_given, plan_lines
    from trainers.reproduction.reproduce import reproduce as run
    from trainers.reproduction.results_page import write_page

    given = parse_given(images or (), text or (), models or ())
    if dry_run:
        typer.echo("\n".join(plan_lines(tables or ["all"], scale, given, work_dir)))
        return
    if not tables and page is None:
        raise typer.BadParameter("name tables (or all), or give --page to write the page alone")
    for path in run(tables, scale, given, work_dir, results, num_workers) if tables else ():
        typer.echo(path)
    if page is not None:
        typer.echo(write_page(results, page))


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="Of a tokenized dataset, a backbone or a generated model.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name on the Hub; made where it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Offer a pull request instead.")] = False,
    license: Annotated[
        str | None, typer.Option(help="To publish a model under, as the Hub spells it, where none follows from facts.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Put a dataset, backbone or generated model on the Hub, with a card made of facts. Run it again to go on.

    Example: hf-wsl publish backbone org/hf-wsl-tiny --dry-run
    """
    from hub_cards.publish import publish as run
    from hub_cards.publish_plan import PublishPlan

    def confirm(plan: PublishPlan) -> bool:
        typer.echo("\n".join(plan.lines()))
        return not dry_run and (yes or plan.does_nothing or typer.confirm("Do this?"))

    options = {"private": private, "revision": revision, "create_pr": create_pr, "license": license}
    result = run(folder, repo_id, **options, message=message, confirm=confirm)
    if result is not None:
        done = f"{len(result.sent)} files sent" if result.sent else "nothing had changed"
        typer.echo(f"{result.pull_request_url or result.commit_url} ({done})")


@app.command()
def env() -> None:
    """Print the versions that a bug report needs.

    Example: hf-wsl env
    """
    import torch

    packages = (
        "hf-wsl torch torchvision transformers datasets accelerate huggingface_hub safetensors timm peft evaluate"
    )
    typer.echo(f"platform: {platform.platform()}\npython: {platform.python_version()}")
    for package in packages.split():
        typer.echo(f"{package}: {installed_version(package)}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    typer.echo(f"cuda device: {device}\nthreads: {torch.get_num_threads()}")


def installed_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Runs the command; an error that a user can mend is one line on stderr (with `HF_WSL_TRACEBACK=1`, all of it)."""
    from .errors import USER_ERRORS, one_line

    try:
        app()
    except USER_ERRORS as error:
        if os.environ.get("HF_WSL_TRACEBACK") == "1":
            raise
        sys.exit(f"error: {one_line(error)}")


if __name__ == "__main__":
    main()
