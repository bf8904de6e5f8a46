"""The training loop, from the first row to the committed adapter."""

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from veneer.base.batching import find_way
from veneer.config import RunConfig, TrainConfig
from veneer.data.batches import Step, epoch_steps
from veneer.data.encode import EncodedRows
from veneer.errors import InterruptedRunError, NonFiniteError, NotEnoughMemoryError
from veneer.files.peft import adapter_to_files, save_adapter
from veneer.nn.attach import Attachment, attachment_of, current_adapter
from veneer.scoring.loss import Loss, evaluate_loss
from veneer.train.checkpoint import TrainState, check_room, load_checkpoint
from veneer.train.finish import BEST, TrainResult, finish
from veneer.train.folder import CHECKPOINTS, Metrics
from veneer.train.interrupt import StopFlag, stop_behind
from veneer.train.keeping import forget_checkpoints_after, newest_checkpoint
from veneer.train.memory import DoesNotFit, cut, is_out_of_memory, release_memory
from veneer.train.optimizer import FlatAdamW, check_one_dtype
from veneer.train.prefix_cache import prefix_caches
from veneer.train.prepare import PreparedData
from veneer.train.progress import Progress, progress_bar
from veneer.train.randomness import draw_from, own_generators
from veneer.train.report import draw_losses
from veneer.train.running import Running, position_of
from veneer.train.schedule import learning_rate
from veneer.train.step import StepLoss, peak_rss_bytes, step_gradient
from veneer.train.ways import computing

__all__ = ["TrainResult", "check_trainable", "train_adapter"]

log = logging.getLogger("veneer")

Found = TypeVar("Found")


def check_trainable(model: PreTrainedModel) -> None:
    """Prove that the attached adapter can be trained and saved, before any folder is touched.

    Raises:
        BaseModelError: If the model can take neither ragged nor padded batches.
        ConfigError: If what trains is of several dtypes.
        AdapterError: If PEFT's layout cannot hold the adapter.
    """
    find_way(model)
    check_one_dtype(_trainable(attachment_of(model)))
    adapter_to_files(current_adapter(model))


def train_adapter(
    model: PreTrainedModel,
    data: PreparedData,
    config: RunConfig,
    folder: Path,
    stop: StopFlag,
    inexact: list[str],
) -> TrainResult:
    """Train the attached adapter, from where the run folder stands, and commit it.

    Args:
        model: The model with the adapter attached.
        data: The run's rows.
        config: The run.
        folder: The run folder; its newest sound checkpoint is gone on from.
        stop: Whether the run was asked to stop.
        inexact: Why the run is not the one that was begun.

    Raises:
        NonFiniteError: If loss or gradient are not finite; checkpoints stand, nothing was updated.
        NotEnoughMemoryError: If a single row does not fit into memory.
        InterruptedRunError: If the run was asked to stop; a checkpoint was committed.
    """
    schedule = list(_schedule(data.train, config.train, config.seed))
    with own_generators(), progress_bar(len(schedule)) as progress:
        run = _go_on(model, data, config, folder, schedule, stop, progress)
        run.state.inexact = inexact
        model.train()
        try:
            with computing(model, config.train) as run.way:
                if run.state.step < len(schedule) and not run.way.padded:
                    steps = [step for _, step in schedule]
                    run.recalls = prefix_caches(model, data, steps, config.train, folder)
                _all_steps(run)
            model.eval()
            result = finish(run)
            _draw(run)
        except NonFiniteError as error:
            _draw(run)
            raise _with_rows(run, error) from None
        except BaseException as error:
            request = stop_behind(error, stop)
            if request is None:
                raise
            log.warning("%s: committing; once more to leave at once", request)
            run.commit()
            _draw(run)
            raise InterruptedRunError(
                f"stopped by {request} after step {run.state.step} of {len(schedule)}; {folder} is in good order, "
                "go on with --resume",
                exit_code=request.exit_code,
            ) from None
        finally:
            model.eval()
            run.optimizer.zero_grad()
    return result


def _go_on(
    model: PreTrainedModel,
    data: PreparedData,
    config: RunConfig,
    folder: Path,
    schedule: list[tuple[float, Step]],
    stop: StopFlag,
    progress: Progress,
) -> Running:
    """Return the run as its newest sound checkpoint left it, or as it begins; forget what lies behind that."""
    attachment = attachment_of(model)
    optimizer, state, metrics = _optimizer(attachment, config.train), TrainState(), Metrics(folder)
    newest, damaged = newest_checkpoint(folder / CHECKPOINTS)
    for line in damaged:
        log.warning("a damaged checkpoint is passed over: %s", line)
    if newest is not None:
        state = load_checkpoint(newest, attachment, optimizer)
        log.info("going on from %s", newest)
    with stop.held():
        forget_checkpoints_after(folder / CHECKPOINTS, state.step if newest is not None else -1)
        metrics.forget_after(state.step, state.evaluated)
    if newest is None:
        check_room(folder / CHECKPOINTS, current_adapter(model), config.train.keep_checkpoints)
    saved = position_of(state)
    return Running(model, data, config, folder, schedule, metrics, optimizer, state, saved, stop, progress)


def _trainable(attachment: Attachment) -> dict[str, nn.Parameter]:
    """Return what trains by its name; a frozen `lora_A` (LoRA-FA) does not."""
    return {name: one for name, one in attachment.parameters().items() if one.requires_grad}


def _optimizer(attachment: Attachment, settings: TrainConfig) -> FlatAdamW:
    """Return the optimiser: each `lora_B` at its own rate, decay for the factors alone."""
    parameters = _trainable(attachment)
    paths = {target.path: target.kind.form for target in attachment.targets}
    factors = {f"{path}.{name}" for path in paths for name in ("lora_A", "lora_B")}
    raised = (f"{path}.lora_B" for path, form in paths.items() if form != "embedding")
    return FlatAdamW(
        parameters,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        rates=dict.fromkeys(raised, settings.lora_plus_ratio),
        undecayed=parameters.keys() - factors,
    )


def _all_steps(run: Running) -> None:
    """Do what is left: before each step the evaluation and the checkpoint that are due after the one before."""
    state, settings = run.state, run.config.train
    while True:
        epoch = run.schedule[state.step - 1][0] if state.step else 0.0
        last = state.step == len(run.schedule)
        due = state.step % settings.eval_every == 0 if settings.eval_every else epoch.is_integer()
        if (due or last) and state.evaluated < state.step and not _is_out_of_patience(run):
            _evaluate(run, epoch)
        if _is_out_of_patience(run) and not last:
            log.info("stopped early after step %d: no better evaluation in %d", state.step, settings.patience)
            last = True
        if last or (state.step and state.step % settings.checkpoint_every == 0):
            with run.stop.held():
                run.commit()
        if last:
            return
        _step(run)


def _step(run: Running) -> None:
    """Do the next step: its gradient, which may be asked to stop, and the update with all that is counted."""
    state, rows = run.state, run.data.train.rows
    epoch, planned = run.schedule[state.step]
    start = time.perf_counter()

    def gradient() -> StepLoss:
        step = cut(planned, run.lengths, state.token_limit)
        begin = partial(_begin, run, state.step + 1)
        return step_gradient(run.model, rows, step, begin, recall=run.recalls.train, way=run.way)

    found = _fitting(run, gradient)
    with run.stop.held():
        number = state.step + 1
        rate = learning_rate(run.config.train, number, len(run.schedule))
        norm = run.optimizer.step(rate)
        seconds = time.perf_counter() - start
        line: dict[str, Any] = {
            "step": number,
            "epoch": round(epoch, 4),
            "loss": found.loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens": found.tokens,
            "supervised_tokens": found.supervised,
            "tokens_per_second": found.tokens / seconds,
            "peak_rss_bytes": peak_rss_bytes(),
        }
        if cut(planned, run.lengths, state.token_limit) != planned:
            line["cut_to_tokens"] = state.token_limit
        if state.trend.is_spike(found.loss):
            sources = [rows[index].source for micro in planned for index in micro]
            line["spike"] = {"deviations": round(state.trend.deviation(found.loss), 1), "rows": sources}
            state.spikes.append(number)
        if number == 1 and norm == 0:
            log.warning("step 1: no gradient reaches the adapter; unless that changes, nothing will be trained")
        state.step, state.loss = number, found.loss
        state.tokens += found.tokens
        state.seconds += seconds
        state.trend = state.trend.after(found.loss)
        run.metrics.write(line)
        run.progress.step(line)


def _begin(run: Running, number: int, place: int) -> None:
    """Begin a micro-batch of a step."""
    run.stop.check()
    draw_from(run.config.seed, number, place)


def _evaluate(run: Running, epoch: float) -> None:
    """Evaluate where there are rows to, and remember the best."""
    if run.data.eval is None:
        return
    state, settings, rows = run.state, run.config.train, run.data.eval.rows

    def measure() -> Loss:
        budget = min(settings.tokens_per_micro_batch, state.token_limit or settings.tokens_per_micro_batch)
        recall, check = run.recalls.eval, run.stop.check
        try:
            return evaluate_loss(run.model, rows, tokens_per_batch=budget, recall=recall, way=run.way, check=check)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            longest = max(len(row.token_ids) for row in rows)
            smaller = budget // 2 if budget > longest else None
            raise DoesNotFit(f"an evaluation in batches of {budget:,} tokens", smaller, str(error)) from None

    loss = _fitting(run, measure)
    with run.stop.held():
        state.evaluated, state.eval_loss = state.step, loss.mean
        if state.step == 0:  # the adapter's start, to compare with; the best is sought among trained ones
            state.eval_loss_before = loss.mean
        elif state.best_eval_loss is None or loss.mean < state.best_eval_loss:
            state.best_eval_loss, state.stale_evaluations = loss.mean, 0
            if settings.patience is not None:
                save_adapter(current_adapter(run.model), run.folder / CHECKPOINTS / BEST, replace=True)
        else:
            state.stale_evaluations += 1
        run.metrics.write({"step": state.step, "epoch": round(epoch, 4), "eval_loss": loss.mean})
        run.progress.evaluated(loss.mean)


def _fitting(run: Running, attempt: Callable[[], Found]) -> Found:
    """Return what an attempt gives; where memory does not suffice, attempt it anew with smaller micro-batches."""
    while True:
        try:
            return attempt()
        except DoesNotFit as error:
            failed = (error.what, error.smaller, error.said, error.rows)
        # Here the exception is gone, and with it every tensor that its frames held.
        what, smaller, said, sources = failed
        run.optimizer.zero_grad()
        release_memory()
        if smaller is None:
            raise NotEnoughMemoryError(
                f"step {run.state.step + 1}: memory does not suffice for {what}, and it cannot be cut: {said}; set "
                f"train.checkpoint_activations, a smaller train.max_length, or storage: nf4; checkpoints stand in "
                f"{run.folder}",
                sources,
            )
        log.warning("memory does not suffice for %s; cut to %s tokens from here on: %s", what, f"{smaller:,}", said)
        with run.stop.held():
            run.state.token_limit = smaller
            run.commit()  # before anything depends on it


def _is_out_of_patience(run: Running) -> bool:
    patience = run.config.train.patience
    return patience is not None and run.state.stale_evaluations >= patience


def _with_rows(run: Running, error: NonFiniteError) -> NonFiniteError:
    """Return the error with the step, and with the rows of it beside the tensors."""
    rows = run.data.train.rows
    problems = list(error.problems)
    sources = [rows[index].source for micro in run.schedule[run.state.step][1] for index in micro]
    if not set(problems) & set(sources):  # those of the micro-batch are named where it is known
        problems += sources
    return NonFiniteError(
        f"step {run.state.step + 1}: {error.message}; the update was not applied, checkpoints stand in {run.folder}",
        problems,
    )


def _draw(run: Running) -> None:
    """Draw the picture; one that cannot be drawn stops nothing."""
    try:
        draw_losses(run.metrics.read(), run.folder)
    except (OSError, ValueError) as error:
        log.warning("the picture of the losses could not be drawn: %s", error)


def _schedule(rows: EncodedRows, config: TrainConfig, seed: int) -> Iterator[tuple[float, Step]]:
    """Yield every step of the run, with the epochs that are done after it."""
    lengths = [int(length) for length in rows.lengths]
    steps = (
        (epoch + (place + 1) / len(of_epoch), step)
        for epoch in range(config.epochs)
        for of_epoch in [
            epoch_steps(
                lengths,
                seed=seed,
                epoch=epoch,
                tokens_per_step=config.tokens_per_step,
                tokens_per_micro_batch=config.tokens_per_micro_batch,
            )
        ]
        for place, step in enumerate(of_epoch)
    )
    return islice(steps, config.max_steps)
