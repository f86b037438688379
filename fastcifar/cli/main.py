"""The command line. Nothing heavy is imported before a command needs it: `fastcifar --help` answers at once."""

import os
import sys
from typing import Annotated

import typer

from fastcifar import __version__
from fastcifar.cli import augment, data
from fastcifar.cli.bench import bench
from fastcifar.cli.compare import compare
from fastcifar.cli.doctor import doctor
from fastcifar.cli.ensemble import ensemble
from fastcifar.cli.evaluate import evaluate
from fastcifar.cli.export import export
from fastcifar.cli.ladder import ladder
from fastcifar.cli.models import models
from fastcifar.cli.plan import plan
from fastcifar.cli.predict import predict
from fastcifar.cli.push import push
from fastcifar.cli.recipes import recipes, show
from fastcifar.cli.report import report
from fastcifar.cli.run_command import run
from fastcifar.cli.schema import schema
from fastcifar.cli.stack import stack
from fastcifar.cli.sweep import sweep
from fastcifar.errors import UserError
from fastcifar.interrupt import Interrupted, handled

app = typer.Typer(
    name="fastcifar",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def fastcifar(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """From a recipe file to a trained, evaluated and explained CIFAR-10 model."""


TRAIN = (run, recipes, show, plan, ladder, sweep)
EXPLAIN = (report, compare, evaluate, ensemble, stack, predict, export, push)
ABOUT = (models, bench, doctor, schema)
for panel, commands in (("Train", TRAIN), ("Explain and combine", EXPLAIN), ("About this machine", ABOUT)):
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.add_typer(data.app, name="data", rich_help_panel="Train")
app.add_typer(augment.app, name="augment", rich_help_panel="Train")


def refuse_empty(words: list[str]) -> None:
    """Refuse an argument of nothing: an unset shell variable, which as a path would mean the current folder.

    Raises:
        UserError: with the option that it belongs to.
    """
    for before, word in zip(["", *words], words, strict=False):
        option = before if word == "" else word
        if word == "" or (word.startswith("--") and word.find("=") == len(word) - 1):
            raise UserError(f"{option.rstrip('=') or 'an argument'}: is empty; name what you mean, or leave it away")


def main() -> None:
    """Run the command line; a `UserError` ends it with one message and status 2, a signal with 128 + its number."""
    try:
        refuse_empty(sys.argv[1:])
        with handled("stopped"):
            app()
    except UserError as error:
        print(f"fastcifar: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as error:
        print(f"fastcifar: {error}", file=sys.stderr)
        sys.exit(error.status)
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)


if __name__ == "__main__":
    main()
