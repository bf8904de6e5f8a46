"""`veneer demo`."""

from typing import Annotated

import typer

import veneer
from veneer.cli.output import Json, log_to_stderr, print_facts, print_result, print_table, size

EXAMPLE = "Example: veneer demo --json"


def demo(
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for the rows and the run.")] = "runs/demo",
    seed: Annotated[int, typer.Option(min=0, help="Fixes the rows and the training.")] = 0,
    as_json: Json = False,
) -> None:
    """Teach a small model a real task in a few minutes, and measure that it learned.

    SmolLM2-135M reads dates as people of twelve languages write them; scored on rows it never saw.
    """
    log_to_stderr()
    result = veneer.run_demo(out, seed=seed)
    if as_json:
        print_result("demo", {}, result.to_json(), out=out)
        return
    print_facts(
        {
            "task": result.task,
            "held-out rows": result.rows,
            "base model": f"{result.base_score:.1%} exact",
            "with the adapter": f"{result.adapter_score:.1%} exact",
            "trained on": f"{result.train_rows:,} rows in {result.seconds:.0f} s",
            "speed": f"{result.tokens_per_second:,.0f} tokens per second",
            "peak memory": size(result.peak_rss_bytes),
            "adapter size": f"{size(result.adapter_bytes)}, {result.trainable_share:.2%} of the parameters",
            "adapter": f"{result.folder}/adapter",
        }
    )
    rows = [
        {
            "written": one.prompt,
            "expected": one.expected,
            "base model": " ".join(one.base.split()),  # one line each; --json has them as they are
            "with the adapter": " ".join(one.adapter.split()),
        }
        for one in result.examples
    ]
    print_table("The first five held-out rows", rows, fold=("base model", "with the adapter"))
