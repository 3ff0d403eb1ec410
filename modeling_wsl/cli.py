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
            option = typer.Option(
                help=f"{field.metadata['help']} [default: {field.default}]",
                metavar="|".join(choices) if choices else None,
                show_default=False,
            )
            kind = Annotated[hints[field.name] | None, option]
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
    from trainers.quickstart import quickstart as run

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
    from datasets_scripts.config_sources import build, read_yaml
    from datasets_scripts.tokenize import tokenize as run
    from datasets_scripts.tokenize_config import TokenizeConfig

    given = ("command line", {name: value for name, value in options.items() if value is not None})
    from_file = (str(config), read_yaml(config) if config else {})
    report = run(sources, output, build(TokenizeConfig, from_file, given))
    typer.echo(
        f"{report.output}: {report.accepted} models, {report.num_tokens:,} tokens in {report.num_windows:,} windows, "
        f"{report.padding:.3%} padding; {report.refused} models refused (reasons: config `models`, split `refused`)"
    )


@app.command()
@options_of("datasets_scripts.collect_config", "CollectConfig")
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
    from datasets_scripts.collect import collect as run
    from datasets_scripts.collect_config import CollectConfig
    from datasets_scripts.collect_plan import plan_collection
    from datasets_scripts.config_sources import build, read_yaml

    given = ("command line", {name: value for name, value in options.items() if value is not None})
    from_file = (str(config), read_yaml(config) if config else {})
    built = build(CollectConfig, from_file, given)
    if dry_run:
        typer.echo("\n".join(plan_collection(built, models or ()).lines()))
        return
    if ranks:
        from datasets_scripts.collect_ranks import collect_with_ranks

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
def pretrain(context: typer.Context) -> None:
    """Train a backbone on a tokenized dataset; `hf-wsl pretrain --help` lists all options.

    Example: hf-wsl pretrain --config tiny --dataset tokens --output_dir backbone
    """
    from trainers.pretrain import run

    raise typer.Exit(run(context.args))


@app.command()
def embed(
    backbone: Annotated[str, typer.Argument(help="Folder or Hub id of a WSL model.")],
    sources: Annotated[
        list[str], typer.Argument(help="Models, folders of models, Hub ids (org/name@revision), or lists of these.")
    ],
    output: Annotated[Path, typer.Option(help="Parquet file: model_id, revision, embedding, x, y.")],
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.")] = 8,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a backbone on the Hub.")] = None,
) -> None:
    """Embed models by their weights.

    Example: hf-wsl embed backbone models/ --output embeddings.parquet
    """
    from datasets_scripts.embed import embed as run

    rows, refused = run(backbone, sources, output, batch_size, revision)
    typer.echo(f"{output}: {rows} models embedded, {len(refused)} could not be read")


@app.command()
def generate(
    backbone: Annotated[str, typer.Argument(help="Folder or Hub id of a WSL model.")],
    target: Annotated[
        str, typer.Argument(help="timm name, or folder or Hub id (org/name@revision) of a transformers or timm model.")
    ],
    anchors: Annotated[
        list[str], typer.Option(help="Trained model of that architecture (org/name@revision); repeat for several.")
    ],
    output: Annotated[Path, typer.Option(help="Folder; every model gets a folder of its own in it.")],
    num_samples: Annotated[int, typer.Option(help="Models to generate.")] = 1,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    bandwidth: Annotated[float, typer.Option(help="Of the kernel density on the anchors' latents.")] = 0.2,
    noise: Annotated[
        str, typer.Option(help="One draw for all tokens, or one for each.", metavar="shared|independent")
    ] = "shared",
    num_classes: Annotated[int | None, typer.Option(help="Of the target, where it differs from the anchors'.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a backbone on the Hub.")] = None,
) -> None:
    """Generate models of an architecture from trained anchors.

    Example: hf-wsl generate backbone resnet18 --anchors models/resnet18 --output generated --num-samples 5
    """
    from .pipelines import load_pipeline

    draws = {"num_samples": num_samples, "seed": seed, "bandwidth": bandwidth, "noise": noise}
    generator = load_pipeline("weight-generation", backbone, revision=revision)
    for index, model in enumerate(generator(target, anchors=anchors, num_classes=num_classes, **draws)):
        folder = output / f"{index:03d}"
        model.save_pretrained(folder)
        typer.echo(f"{folder}")


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="Of a tokenized dataset, a backbone or a generated model.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name on the Hub; made where it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Offer a pull request instead.")] = False,
    licence: Annotated[
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

    options = {"private": private, "revision": revision, "create_pr": create_pr, "licence": licence}
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
    from datasets_scripts.errors import USER_ERRORS, one_line

    try:
        app()
    except USER_ERRORS as error:
        if os.environ.get("HF_WSL_TRACEBACK") == "1":
            raise
        sys.exit(f"error: {one_line(error)}")


if __name__ == "__main__":
    main()
