"""The pretraining command: `accelerate launch -m trainers.pretrain --config tiny --dataset DIR --output_dir OUT`.

Light to import: `--help` and wrong options need neither torch nor transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from hf_wsl.command_line import parse, run_command, set_log_level

from .pretraining.pretrain_options import PretrainOptions


PROGRAM = "hf-wsl pretrain"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command with these arguments (`sys.argv` by default) and returns the run's facts (see `pretrain`)."""
    options = parse(PretrainOptions, sys.argv[1:] if argv is None else argv, program=PROGRAM)
    set_log_level()
    return pretrain(options)


def pretrain(options: PretrainOptions) -> dict[str, Any]:
    """See `trainers.pretraining.pretrain_run.pretrain`."""
    from .pretraining import pretrain_run

    return pretrain_run.pretrain(options)


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that decide what a training computes."""
    from .pretraining import pretrain_run

    return pretrain_run.versions()


def run(argv: Sequence[str] | None = None) -> int:
    """`main` for a shell, see `run_command`."""
    return run_command(PretrainOptions, train, argv, program=PROGRAM)


def train(options: PretrainOptions) -> None:
    """`pretrain` for a command that prints nothing."""
    pretrain(options)


if __name__ == "__main__":
    sys.exit(run())
