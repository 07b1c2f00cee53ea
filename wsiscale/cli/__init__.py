"""argv -> one public function -> text or JSON. JSON on stdout; progress, logs and errors on stderr.

Exit codes: 0 done, 1 failed, 2 usage, 3 abstained (or nothing to work on: no tissue), 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

# Before anything imports torch: spinning OpenMP threads next to any other busy process cost up to 90x.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer

from wsiscale.cli import cohorts, models, slides, stores
from wsiscale.cli.options import ABSTAINED, DONE, FAILED, INTERRUPTED, USAGE, fail
from wsiscale.errors import NoTissueError, OptionError, WsiscaleError
from wsiscale.memory import keep_memory


def _print_version(asked: bool) -> None:
    if asked:
        print("wsiscale", version("wsiscale"))
        raise typer.Exit


app = typer.Typer(
    name="wsiscale",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for verb in (
    *(slides.info, slides.mpp, slides.tissue, slides.estimate, slides.stack, slides.tile),
    *(cohorts.run,),
    *(models.profile, models.calibrate, models.probe, models.cards),
    *(stores.verify, stores.export, stores.report, stores.doctor),
):
    app.command()(verb)


@app.callback()
def _about(
    _: Annotated[
        bool, typer.Option("--version", help="print the version and leave", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Find the magnification at which a network works best on a slide, and write the slide's tissue at it."""


def run() -> None:
    """The `wsiscale` command."""
    keep_memory()
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code. Expected errors are one line on stderr; bugs keep their traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    command = typer.main.get_command(app)
    try:
        code = command.main(list(argv) if argv is not None else None, prog_name="wsiscale", standalone_mode=False)
    except OptionError as error:
        return fail(str(error), USAGE)
    except NoTissueError as error:
        return fail(str(error), ABSTAINED)
    except WsiscaleError as error:
        return fail(str(error), FAILED)
    except typer.Abort:
        code = INTERRUPTED
    except BrokenPipeError:
        # `wsiscale info slide | head`: the reader has gone, and there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if (usage := getattr(error, "format_message", None)) is not None:  # click's own: unknown option, missing argument
            return fail(usage() or "see wsiscale --help", getattr(error, "exit_code", USAGE))
        raise
    if code == INTERRUPTED:  # typer's answer to Ctrl-C
        return fail("interrupted", INTERRUPTED)
    return code if isinstance(code, int) else DONE
