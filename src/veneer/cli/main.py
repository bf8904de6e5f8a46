"""The `veneer` command: its verbs, and how errors reach people."""

import sys
from typing import NoReturn

import typer

from veneer.cli import check, combine, convert, demo, evaluate, extract, generate, merge, resize, show, train
from veneer.cli.output import print_error
from veneer.errors import VeneerError

_INTERRUPTED = 130

app = typer.Typer(
    name="veneer",
    help="LoRA adapters for PyTorch models: train them, prove what they do, work on them, use them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Start with: veneer demo",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train", epilog=train.EXAMPLE)(train.train)
app.command("eval", epilog=evaluate.EXAMPLE)(evaluate.evaluate)
app.command("generate", epilog=generate.EXAMPLE)(generate.generate)
app.command("show", epilog=show.EXAMPLE)(show.show)
app.command("convert", epilog=convert.EXAMPLE)(convert.convert)
app.command("check", epilog=check.EXAMPLE)(check.check)
app.command("combine", epilog=combine.EXAMPLE)(combine.combine)
app.command("resize", epilog=resize.EXAMPLE)(resize.resize)
app.command("merge", epilog=merge.EXAMPLE)(merge.merge)
app.command("extract", epilog=extract.EXAMPLE)(extract.extract)
app.command("demo", epilog=demo.EXAMPLE)(demo.demo)


def main() -> None:
    """Run the command; what a user did wrong is one clear message on standard error and exit code 2.

    With --json a command that fails prints an object of one key, `error`, on standard output besides.
    """
    as_json = "--json" in sys.argv[1:]
    try:
        code = app(standalone_mode=not as_json)  # with --json, what was typed wrong comes back here
        sys.exit(code)
    except VeneerError as error:
        _fail(error, error.exit_code, error, as_json=as_json)
    except typer.TyperException as error:
        _fail(error, error.exit_code, VeneerError(error.format_message()), as_json=as_json)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone: nobody is left to be told
        sys.exit(1)
    except OSError as error:  # a full disk, a folder without permission: the system's own words say it best
        _fail(error, 1, VeneerError(str(error)), as_json=as_json)
    except MemoryError as error:  # where nothing could be cut smaller; what was committed stands
        _fail(error, 1, VeneerError("memory does not suffice; what was committed before stands"), as_json=as_json)
    except SystemExit as ended:
        if ended.code == _INTERRUPTED:  # typer has turned Ctrl-C into this, without a word
            print("interrupted", file=sys.stderr)
            if as_json:
                print_error(KeyboardInterrupt(), _INTERRUPTED, "interrupted")
        raise
    except Exception as error:  # ours to mend, so the traceback is shown
        if as_json:
            print_error(error, 1, str(error))
        raise


def _fail(error: Exception, exit_code: int, told: VeneerError, *, as_json: bool) -> NoReturn:
    """Say why a command failed, to people and, where they asked, to machines; and end."""
    print(f"error: {told}", file=sys.stderr)
    if as_json:
        print_error(error, exit_code, told.message, told.problems)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
