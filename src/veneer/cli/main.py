"""The `veneer` command: its verbs, and how errors reach people."""

import sys

import typer

from veneer.cli import check, combine, convert, demo, evaluate, extract, generate, merge, resize, show, train
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
    """Run the command; what a user did wrong is one clear message on standard error and exit code 2."""
    try:
        app()
    except VeneerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone: nobody is left to be told
        sys.exit(1)
    except OSError as error:  # a full disk, a folder without permission: the system's own words say it best
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except MemoryError:  # where nothing could be cut smaller; what was committed stands
        print("error: memory does not suffice; what was committed before stands", file=sys.stderr)
        sys.exit(1)
    except SystemExit as ended:
        if ended.code == _INTERRUPTED:  # typer has turned Ctrl-C into this, without a word
            print("interrupted", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
