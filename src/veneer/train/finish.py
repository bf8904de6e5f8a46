"""The end of a run: the adapter committed, what it came to, and what was silent about it."""

import logging
from dataclasses import dataclass
from pathlib import Path

from veneer.adapter import Adapter
from veneer.errors import BaseModelError
from veneer.files.peft import load_adapter, save_adapter
from veneer.nn.attach import current_adapter, disabled
from veneer.scoring.loss import evaluate_loss
from veneer.train.folder import ADAPTER, CHECKPOINTS
from veneer.train.report import model_card, untrained
from veneer.train.running import Running
from veneer.train.step import peak_rss_bytes

log = logging.getLogger("veneer")

BEST = "best"

_STILL = 1e-4
"""A loss that has moved by less than this share of itself has not moved."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Args:
        adapter: The adapter as it was saved.
        folder: The run folder.
        steps: Optimiser steps done.
        loss: Training loss of the last step.
        eval_loss_before: Evaluation loss before the first step, None without evaluation rows.
        eval_loss: Evaluation loss of the adapter.
        tokens: Tokens trained on.
        seconds: Seconds spent in steps.
        peak_rss_bytes: Most memory that the process held.
        bad_rows: "file:line: what is wrong" for every row left out.
        untrained: Paths of the layers whose update is still zero, as it began; all of them where nothing trained.
        unmoved: Whether the loss is still the base's: on the evaluation rows, or without them on rows of the first
            step.
        spikes: Steps whose loss lay far above its running mean; their rows stand in metrics.jsonl.
        token_limit: Most tokens of a micro-batch, where memory did not suffice for the configured budget.
        inexact: Why the run is not the one that was begun, where it was gone on with by force.
    """

    adapter: Adapter
    folder: Path
    steps: int
    loss: float
    eval_loss_before: float | None
    eval_loss: float | None
    tokens: int
    seconds: float
    peak_rss_bytes: int
    bad_rows: tuple[str, ...]
    untrained: tuple[str, ...] = ()
    unmoved: bool = False
    spikes: tuple[int, ...] = ()
    token_limit: int | None = None
    inexact: tuple[str, ...] = ()

    @property
    def never_trained(self) -> bool:
        """Whether no layer has been changed by the training."""
        return bool(self.untrained) and len(self.untrained) == len(self.adapter.modules)

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on per second spent in steps."""
        return self.tokens / self.seconds if self.seconds else 0.0


def finish(run: Running) -> TrainResult:
    """Commit the adapter: the last one, or the best one where the run was told to be patient."""
    state, take_best = run.state, run.config.train.patience is not None
    adapter = load_adapter(run.folder / CHECKPOINTS / BEST) if take_best else current_adapter(run.model)
    eval_loss = state.best_eval_loss if take_best else state.eval_loss
    assert state.loss is not None  # a run has a step
    result = TrainResult(
        adapter=adapter,
        folder=run.folder,
        steps=state.step,
        loss=state.loss,
        eval_loss_before=state.eval_loss_before,
        eval_loss=eval_loss,
        tokens=state.tokens,
        seconds=state.seconds,
        peak_rss_bytes=peak_rss_bytes(),
        bad_rows=run.data.bad,
        untrained=untrained(adapter),
        unmoved=_is_unmoved(run, state.eval_loss_before, eval_loss),
        spikes=tuple(state.spikes),
        token_limit=state.token_limit,
        inexact=tuple(state.inexact),
    )
    _tell(result)
    card = model_card(adapter, run.config, run.data, result.eval_loss_before, result.eval_loss, result.inexact)
    with run.stop.held():
        save_adapter(adapter, run.folder / ADAPTER, card=card, replace=True)
    return result


def _is_unmoved(run: Running, before: float | None, after: float | None) -> bool:
    """Tell whether the loss is the base's still; without evaluation rows, by two forwards of a few training rows."""
    if before is None or after is None:
        rows = [run.data.train.rows[number] for number in run.schedule[0][1][0]]
        try:
            after = evaluate_loss(run.model, rows, way=run.way, check=run.stop.check).mean
            with disabled(run.model):
                before = evaluate_loss(run.model, rows, way=run.way, check=run.stop.check).mean
        except (BaseModelError, MemoryError, RuntimeError) as error:  # the run is done, whatever becomes of this
            log.warning("whether the loss has moved from the base's could not be told: %s", error)
            return False
    return abs(after - before) <= _STILL * abs(before)


def _tell(result: TrainResult) -> None:
    """Say what nobody would see in a loss that looks well."""
    if result.never_trained:
        log.warning("never trained: every layer's update is still zero, as it began")
    elif result.untrained:
        layers = ", ".join(result.untrained[:5])
        log.warning("%d of %d layers never trained: %s", len(result.untrained), len(result.adapter.modules), layers)
    if result.unmoved and not result.never_trained:
        log.warning("the loss is still the base's: the adapter changes next to nothing; look at the learning rate")
    if result.spikes:
        steps = ", ".join(str(number) for number in result.spikes[:10])
        log.warning("the loss spiked in %d steps: %s; metrics.jsonl names their rows", len(result.spikes), steps)
    if result.token_limit is not None:
        log.warning(
            "memory sufficed for micro-batches of %s tokens alone; set train.tokens_per_micro_batch to that",
            f"{result.token_limit:,}",
        )
    if result.inexact:
        log.warning("this run is not the one that was begun: %s", "; ".join(result.inexact))
