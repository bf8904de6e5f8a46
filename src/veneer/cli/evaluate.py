"""`veneer eval`."""

from dataclasses import asdict
from typing import Annotated

import typer

import veneer
from veneer.cli.models import open_base, sampling_from
from veneer.cli.output import (
    AdapterFolder,
    AnyBase,
    Dtype,
    Json,
    Set,
    SkipBadRows,
    Storage,
    answers_bar,
    log_to_stderr,
    num_bad_rows,
    print_bad_rows,
    print_facts,
    print_result,
    print_table,
)
from veneer.scoring.scores import check_scores

EXAMPLE = "Example: veneer eval smollm2 valid.jsonl --adapter runs/tickets/adapter --score exact_match"


def evaluate(
    base: Annotated[str, typer.Argument(help="Hub id, directory, .gguf file or embedded model.")],
    data: Annotated[
        str, typer.Argument(metavar="ROWS", help="Rows: .jsonl, .csv, .parquet, .arrow, or a datasets folder.")
    ],
    adapter: AdapterFolder = None,
    any_base: AnyBase = False,
    storage: Storage = None,
    dtype: Dtype = None,
    scores: Annotated[
        list[str] | None,
        typer.Option("--score", metavar="NAME", help="exact_match, json, accuracy, bleu or chrf; may be repeated."),
    ] = None,
    settings: Set = None,
    skip_bad_rows: SkipBadRows = False,
    examples: Annotated[int, typer.Option(min=0, help="How many answers to print.")] = 0,
    as_json: Json = False,
) -> None:
    """Measure a model on rows: loss and perplexity, and scores of what it answers.

    Settings of generation: max_new_tokens, temperature, top_p, seed.
    """
    log_to_stderr()
    sampling = sampling_from(settings)
    check_scores(scores or ())
    read = veneer.check_rows(data, skip_bad_rows=skip_bad_rows)  # before the base is looked for: that may take a while
    opened = open_base(base, adapter, any_base, storage, dtype)
    rows = veneer.prepare_evaluation(
        opened.tokenizer, read, scores=scores or (), positions=opened.positions, skip_bad_rows=skip_bad_rows
    )
    model = opened.model()
    with answers_bar(len(rows.prompts)) as on_done:
        found = veneer.evaluate(model, opened.tokenizer, rows, sampling=sampling, on_done=on_done)
    print_bad_rows(found.bad_rows)
    if as_json:
        told = asdict(found) | {"answers": [asdict(answer) for answer in found.answers[:examples]]}
        inputs = {"base": base, "data": data, "adapter": adapter}
        print_result("eval", inputs, {"digest": opened.digest} | told | num_bad_rows(found.bad_rows))
        return
    print_facts(
        {
            "rows": found.num_rows,
            "supervised tokens": f"{found.num_supervised:,}",
            "loss": f"{found.loss:.4f}",
            "perplexity": f"{found.perplexity:.4g}",
            **{name: f"{value:.4f}" for name, value in found.scores.items()},
        }
    )
    shown = [{"prompt": a.prompt, "expected": a.expected, "got": a.got} for a in found.answers[:examples]]
    if shown:
        print_table("", shown, fold=("prompt", "expected", "got"))
