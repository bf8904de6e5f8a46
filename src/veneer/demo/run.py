"""The demo: a base model that cannot do a task, a few minutes of training, an adapter that can, and the figures."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.base.load import load_base
from veneer.config import LoRAConfig, SamplingConfig, TrainConfig
from veneer.demo.dates import date_rows, to_jsonl
from veneer.errors import OutputError
from veneer.files.commit import commit_file
from veneer.files.filesystem import REAL
from veneer.nn.attach import attach
from veneer.nn.plan import plan
from veneer.scoring.evaluate import Answer, evaluate
from veneer.train.folder import RUN
from veneer.train.run import finetune

log = logging.getLogger("veneer")

BASE = "smollm2"
SCORE = "exact_match"
ADAPTER = LoRAConfig(rank=8, alpha=16)
TRAIN = TrainConfig(learning_rate=2e-3, tokens_per_step=1024, warmup_ratio=0.05, checkpoint_every=50)
SAMPLING = SamplingConfig(max_new_tokens=16)
NUM_TRAIN, NUM_HELD_OUT, NUM_EXAMPLES = 1200, 200, 5


@dataclass(frozen=True)
class DemoExample:
    """One held-out row, answered by both."""

    prompt: str
    expected: str
    base: str
    adapter: str


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured; scores are shares from 0 to 1.

    Args:
        task: What was learned.
        rows: Held-out rows that both were scored on.
        train_rows: Rows trained on.
        base_score: Exact matches of the base.
        adapter_score: Exact matches with the adapter.
        seconds: Seconds of training.
        tokens_per_second: Tokens trained on per second.
        peak_rss_bytes: Most memory that the process held.
        adapter_bytes: Size of the adapter's numbers.
        trainable_share: What trained, as a share of the base's parameters.
        digest: The adapter's identity.
        folder: The run folder.
        examples: Held-out rows side by side.
    """

    task: str
    rows: int
    train_rows: int
    base_score: float
    adapter_score: float
    seconds: float
    tokens_per_second: float
    peak_rss_bytes: int
    adapter_bytes: int
    trainable_share: float
    digest: str
    folder: str
    examples: tuple[DemoExample, ...]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        told = asdict(self)
        renamed = {"num_rows": "rows", "num_train_rows": "train_rows", "num_bytes": "adapter_bytes"}
        adapter = {"adapter": f"{told.pop('folder')}/adapter"}
        return adapter | {new: told.pop(old) for new, old in renamed.items()} | told


def run_demo(out: str = "runs/demo", *, seed: int = 0, num_train: int = NUM_TRAIN) -> DemoResult:
    """Teach SmolLM2-135M to read dates as people of many countries write them, and measure that it learned.

    Rows come from the CLDR patterns in babel. No date and no written string of the held-out rows is trained on.

    Args:
        out: Folder for the rows and the run; an earlier demo in it is replaced.
        seed: Fixes the rows and the training.
        num_train: Rows to train on.

    Raises:
        BaseModelError: If the model is neither installed nor on a hub that can be reached.
        MissingDependencyError: If babel or gguf is not installed.
        OutputError: If the folder holds something else than an earlier demo.

    Cost:
        Five to ten minutes on two cores.

    Example:
        run_demo("runs/demo").adapter_score
    """
    folder = Path(out)
    if folder.exists() and not _is_earlier_demo(folder):
        raise OutputError(f"out: {out!r} exists and is no earlier demo; it is left as it is, choose another --out")
    rows = date_rows(seed, num_train, NUM_HELD_OUT)
    data = folder / "data"
    REAL.make_parents(data)
    held_out, training = data / "heldout.jsonl", data / "train.jsonl"
    commit_file(held_out, to_jsonl(rows.eval).encode())
    commit_file(training, to_jsonl(rows.train).encode())

    model, tokenizer = load_base(BASE)
    planned = plan(model, ADAPTER)
    base_score, before = _score(model, tokenizer, held_out, "the base model")
    attach(model, ADAPTER, seed=seed)
    log.info("training on %d rows", num_train)
    result = finetune(
        model, tokenizer, data=str(training), out=f"{out}/run", config=TRAIN, seed=seed, existing="overwrite"
    )
    adapter_score, after = _score(model, tokenizer, held_out, "the adapter")
    return DemoResult(
        task="dates as written in 12 languages, to YYYY-MM-DD",
        rows=NUM_HELD_OUT,
        train_rows=num_train,
        base_score=base_score,
        adapter_score=adapter_score,
        seconds=result.seconds,
        tokens_per_second=result.tokens_per_second,
        peak_rss_bytes=result.peak_rss_bytes,
        adapter_bytes=result.adapter.num_bytes,
        trainable_share=planned.trainable_share,
        digest=result.adapter.digest,
        folder=str(result.folder),
        examples=_side_by_side(before, after),
    )


def _is_earlier_demo(folder: Path) -> bool:
    """Tell whether a folder is empty, or holds what a demo writes and nothing else, finished or not."""
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - {"data", "run"}:
        return False
    rows = {path.name for path in (folder / "data").glob("*")}
    run = folder / "run"
    return (
        rows <= {"heldout.jsonl", "train.jsonl"}
        and (not rows or len(rows) == 2)
        and (not run.exists() or (run / RUN).is_file())
    )


def _score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Path, who: str
) -> tuple[float, Sequence[Answer]]:
    log.info("scoring %s on %d held-out rows", who, NUM_HELD_OUT)
    found = evaluate(model, tokenizer, str(rows), scores=[SCORE], sampling=SAMPLING)
    return found.scores[SCORE], found.answers


def _side_by_side(before: Sequence[Answer], after: Sequence[Answer]) -> tuple[DemoExample, ...]:
    """Return the first held-out rows: not chosen, so that they show what is usual."""
    return tuple(
        DemoExample(one.prompt, one.expected, one.got, other.got)
        for one, other in list(zip(before, after, strict=True))[:NUM_EXAMPLES]
    )
