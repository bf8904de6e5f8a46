"""`veneer train`."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

import veneer
from veneer.cli.output import (
    Json,
    Set,
    SkipBadRows,
    log_to_stderr,
    num_bad_rows,
    print_bad_rows,
    print_facts,
    print_result,
    size,
)
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.train.loop import TrainResult

EXAMPLE = "Example: veneer train examples/run.yaml --set train.epochs=2 --out runs/again"


def train(
    run_file: Annotated[str, typer.Argument(metavar="RUN.yaml", help="What to train, on what, and how.")],
    settings: Set = None,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Run folder; the file's `out` without it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="With --resume: go on although settings, rows, base or versions have changed."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    skip_bad_rows: SkipBadRows = False,
    as_json: Json = False,
) -> None:
    """Train an adapter, and write a run folder: adapter, checkpoints, metrics, loss.png.

    A run file holds base, storage (plain, int8, nf4), dtype, adapter (rank, alpha, target_modules, ...), data (train,
    eval), train (epochs, learning_rate, tokens_per_step, max_length, eval_every, ...), seed and out; --set changes any
    of them.
    """
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other; choose one")
    if force and not resume:
        raise ConfigError("--force goes with --resume: it goes on with a run although something has changed")
    log_to_stderr()
    overrides = [*(settings or ()), *([f"out={out}"] if out is not None else ())]
    if skip_bad_rows:
        overrides.append("data.skip_bad_rows=true")
    run = veneer.read_run_file(run_file, overrides)
    result = veneer.run(run, existing="resume" if resume else "overwrite" if overwrite else "refuse", force=force)
    print_bad_rows(result.bad_rows)
    if as_json:
        print_result("train", {"run_file": run_file}, _as_json(result), out=result.folder)
        return
    evaluation: dict[str, str] = {}
    if result.eval_loss is not None and result.eval_loss_before is not None:
        evaluation = {"evaluation loss": f"{result.eval_loss_before:.4f} before, {result.eval_loss:.4f} after"}
    print_facts(
        {
            "adapter": result.folder / "adapter",
            "digest": result.adapter.digest,
            "steps": f"{result.steps} ({result.tokens:,} tokens in {result.seconds:.0f} s)",
            "last training loss": f"{result.loss:.4f}",
            **evaluation,
            **_noteworthy(result),
            "speed": f"{result.tokens_per_second:,.0f} tokens per second",
            "peak memory": size(result.peak_rss_bytes),
            "adapter size": size(result.adapter.num_bytes),
        }
    )
    command = f"veneer generate {run.base} --adapter {result.folder / 'adapter'}{run.base_options} --prompt '...'"
    print(f"Try it: {command}", file=sys.stderr)


def _as_json(result: "TrainResult") -> dict[str, Any]:
    """Return what a run came to as plain values."""
    return {
        "adapter": str(result.folder / "adapter"),
        "digest": result.adapter.digest,
        "num_steps": result.steps,
        "loss": result.loss,
        "eval_loss_before": result.eval_loss_before,
        "eval_loss": result.eval_loss,
        "num_tokens": result.tokens,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "peak_rss_bytes": result.peak_rss_bytes,
        "num_bytes": result.adapter.num_bytes,
        **num_bad_rows(result.bad_rows),
        "never_trained": result.never_trained,
        "untrained": list(result.untrained),
        "unmoved": result.unmoved,
        "spikes": list(result.spikes),
        "token_limit": result.token_limit,
        "exact": not result.inexact,
        "inexact": list(result.inexact),
    }


def _noteworthy(result: "TrainResult") -> dict[str, str]:
    """Return a line for each thing that a loss does not show."""
    count, layers, lines = len(result.untrained), len(result.adapter.modules), {}
    if result.never_trained:
        lines["never trained"] = f"the update of all {layers} layers is still zero: the adapter changes nothing"
    elif count:
        lines["never trained"] = f"{count} of {layers} layers, such as {result.untrained[0]}"
    if result.unmoved:
        lines["loss unmoved"] = "it is still the base's"
    if result.spikes:
        lines["loss spikes"] = f"{len(result.spikes)} steps, such as {result.spikes[0]}; metrics.jsonl names their rows"
    if result.token_limit is not None:
        lines["memory"] = f"micro-batches were cut to {result.token_limit:,} tokens"
    if result.inexact:
        lines["not exact"] = f"gone on with by force, {len(result.inexact)} differences"
    return lines
