"""The training loop, from the first row to the committed adapter."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapter import Adapter
from veneer.base.batching import Way, find_way
from veneer.config import RunConfig, TrainConfig
from veneer.data.batches import Step, epoch_steps
from veneer.data.encode import EncodedRows
from veneer.errors import InterruptedRunError, NonFiniteError, OutputError
from veneer.files.peft import adapter_to_files, load_adapter, save_adapter
from veneer.nn.attach import Attachment, attachment_of, current_adapter
from veneer.scoring.loss import evaluate_loss
from veneer.train.checkpoint import (
    TrainState,
    checkpoints,
    forget_checkpoints_after,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from veneer.train.folder import ADAPTER, CHECKPOINTS, Metrics
from veneer.train.interrupt import StopFlag, StopRequested, stop_flag
from veneer.train.optimizer import FlatAdamW, check_one_dtype
from veneer.train.prefix_cache import Recalls, prefix_caches
from veneer.train.prepare import PreparedData
from veneer.train.progress import Progress, progress_bar
from veneer.train.report import draw_losses, model_card, untrained
from veneer.train.schedule import learning_rate
from veneer.train.step import peak_rss_bytes, train_step
from veneer.train.ways import computing

log = logging.getLogger("veneer")

BEST = "best"


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

    @property
    def never_trained(self) -> bool:
        """Whether no layer has been changed by the training."""
        return bool(self.untrained) and len(self.untrained) == len(self.adapter.modules)

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on per second spent in steps."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class _Run:
    """The parts of a run that its functions share; every one of them is named in `train_adapter`."""

    model: PreTrainedModel
    data: PreparedData
    config: RunConfig
    folder: Path
    metrics: Metrics
    optimizer: FlatAdamW
    state: TrainState
    stop: StopFlag
    progress: Progress
    recalls: Recalls = field(default_factory=Recalls)
    way: Way = field(default_factory=Way)


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


def train_adapter(model: PreTrainedModel, data: PreparedData, config: RunConfig, folder: Path) -> TrainResult:
    """Train the attached adapter, from where the run folder stands, and commit it.

    Args:
        model: The model with the adapter attached.
        data: The run's rows.
        config: The run.
        folder: The run folder; its newest sound checkpoint is gone on from.

    Raises:
        NonFiniteError: If loss or gradient are not finite; checkpoints stand, nothing was updated.
        InterruptedRunError: If the run was asked to stop; a checkpoint was committed.
    """
    schedule = list(_schedule(data.train, config.train, config.seed))
    attachment = attachment_of(model)
    optimizer = _optimizer(attachment, config.train)
    metrics = Metrics(folder)
    with _own_random_state(config.seed), stop_flag() as stop, progress_bar(len(schedule)) as progress:
        state = TrainState()
        newest, damaged = newest_checkpoint(folder / CHECKPOINTS)
        for line in damaged:
            log.warning("a damaged checkpoint is passed over: %s", line)
        if newest is not None:
            state, random_state = load_checkpoint(newest, attachment, optimizer)
            torch.set_rng_state(random_state)
            log.info("going on from %s", newest)
        forget_checkpoints_after(folder / CHECKPOINTS, state.step)
        metrics.forget_after(state.step if newest is not None else -1)
        run = _Run(model, data, config, folder, metrics, optimizer, state, stop, progress)
        model.train()
        try:
            with computing(model, config.train) as run.way:
                if state.step < len(schedule) and not run.way.padded:
                    run.recalls = prefix_caches(model, data, [step for _, step in schedule], config.train, folder)
                _all_steps(run, schedule)
        finally:
            model.eval()
            draw_losses(metrics.read(), folder)
    return _finish(run)


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


def _all_steps(run: _Run, schedule: list[tuple[float, Step]]) -> None:
    """Do the steps that are left, with evaluations and checkpoints in between."""
    state, settings = run.state, run.config.train
    random_state = torch.get_rng_state()
    if _is_out_of_patience(run):
        return  # a run that stopped early is finished
    try:
        if state.step == 0:
            _evaluate(run, epoch=0.0)
        for number, (epoch, step) in enumerate(schedule[state.step :], start=state.step + 1):
            random_state = torch.get_rng_state()
            run.stop.check()
            rate = learning_rate(settings, number, len(schedule))
            figures = train_step(
                *(run.model, run.optimizer, run.data.train.rows, step, rate, run.stop.check),
                recall=run.recalls.train,
                way=run.way,
            )
            random_state = torch.get_rng_state()
            if number == 1 and figures["grad_norm"] == 0:
                log.warning("step 1: no gradient reaches the adapter; unless that changes, nothing will be trained")
            state.step = number
            state.tokens += figures["tokens"]
            state.seconds += figures.pop("seconds")
            line = {"step": number, "epoch": round(epoch, 4), **figures}
            run.metrics.write(line)
            run.progress.step(line)
            last = number == len(schedule)
            due = number % settings.eval_every == 0 if settings.eval_every else epoch.is_integer()
            if due or last:
                _evaluate(run, epoch)
                if _is_out_of_patience(run):
                    log.info("stopped early after step %d: no better evaluation in %d", number, settings.patience)
                    last = True
            if last or number % settings.checkpoint_every == 0:
                _checkpoint(run, random_state)
            if last:
                break
    except StopRequested as request:
        run.optimizer.zero_grad()
        if state.step and not _is_saved(run):
            _checkpoint(run, random_state)
        raise InterruptedRunError(
            f"stopped by {request} after step {state.step} of {len(schedule)}; {run.folder} is in good order, "
            "go on with --resume"
        ) from None
    except NonFiniteError as error:
        rows = run.data.train.rows
        sources = [rows[index].source for micro in schedule[state.step][1] for index in micro]
        raise NonFiniteError(
            f"step {state.step + 1}: {error.message}; the update was not applied, checkpoints stand in {run.folder}",
            error.problems or sources,
        ) from None


def _evaluate(run: _Run, epoch: float) -> None:
    """Evaluate where there are rows to, and remember the best."""
    if run.data.eval is None:
        return
    state, patience = run.state, run.config.train.patience
    settings = run.config.train
    loss = evaluate_loss(
        *(run.model, run.data.eval.rows),
        tokens_per_batch=settings.tokens_per_micro_batch,
        recall=run.recalls.eval,
        way=run.way,
    )
    run.metrics.write({"step": state.step, "epoch": round(epoch, 4), "eval_loss": loss.mean})
    run.progress.evaluated(loss.mean)
    if state.step == 0:
        return  # the adapter's start, to compare with; the best is sought among trained ones
    if state.best_eval_loss is None or loss.mean < state.best_eval_loss:
        state.best_eval_loss, state.stale_evaluations = loss.mean, 0
        if patience is not None:
            save_adapter(current_adapter(run.model), run.folder / CHECKPOINTS / BEST, replace=True)
    else:
        state.stale_evaluations += 1


def _is_out_of_patience(run: _Run) -> bool:
    patience = run.config.train.patience
    return patience is not None and run.state.stale_evaluations >= patience


def _checkpoint(run: _Run, random_state: Tensor) -> None:
    folder, keep = run.folder / CHECKPOINTS, run.config.train.keep_checkpoints
    save_checkpoint(folder, current_adapter(run.model), run.optimizer, run.state, random_state, keep)


def _is_saved(run: _Run) -> bool:
    saved = checkpoints(run.folder / CHECKPOINTS)
    return bool(saved) and saved[-1].name == f"step-{run.state.step:06d}"


def _finish(run: _Run) -> TrainResult:
    """Commit the adapter: the last one, or the best one where the run was told to be patient."""
    lines = run.metrics.read()
    best = run.folder / CHECKPOINTS / BEST
    take_best = run.config.train.patience is not None
    adapter = load_adapter(best) if take_best else current_adapter(run.model)
    last = next((line["loss"] for line in reversed(lines) if "loss" in line), None)
    if last is None:
        raise OutputError(f"{run.metrics.path} holds no step: it was removed or damaged; put it back, or start anew")
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    result = TrainResult(
        adapter=adapter,
        folder=run.folder,
        steps=run.state.step,
        loss=last,
        eval_loss_before=evaluations[0] if evaluations else None,
        eval_loss=(run.state.best_eval_loss if take_best else evaluations[-1]) if evaluations else None,
        tokens=run.state.tokens,
        seconds=run.state.seconds,
        peak_rss_bytes=peak_rss_bytes(),
        bad_rows=run.data.bad,
        untrained=untrained(adapter),
    )
    if result.never_trained:
        log.warning("never trained: every layer's update is still zero, as it began")
    elif result.untrained:
        layers = ", ".join(result.untrained[:5])
        log.warning("%d of %d layers never trained: %s", len(result.untrained), len(adapter.modules), layers)
    card = model_card(adapter, run.config, run.data, result.eval_loss_before, result.eval_loss)
    save_adapter(adapter, run.folder / ADAPTER, card=card, replace=True)
    return result


def _schedule(rows: EncodedRows, config: TrainConfig, seed: int) -> Iterator[tuple[float, Step]]:
    """Yield every step of the run, with the epochs that are done after it."""
    lengths = [len(row.token_ids) for row in rows.rows]
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


@contextmanager
def _own_random_state(seed: int) -> Iterator[None]:
    """Draw from a generator seeded for the run within the block; the caller's random state is as before."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
