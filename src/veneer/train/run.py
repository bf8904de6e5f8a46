"""Whole runs: from a configuration, or for a model that has an adapter attached already."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapter import AdapterMetadata
from veneer.base.activation import activation_start
from veneer.base.load import DTYPES, load_config, load_model, load_tokenizer, num_positions, quantise_base
from veneer.base.source import Source, find_source
from veneer.config import DataConfig, LoRAConfig, RunConfig, TrainConfig
from veneer.data.encode import EncodedRow, template_digest
from veneer.errors import ConfigError, DataError, InterruptedRunError
from veneer.nn.attach import attach, attachment_of, set_metadata
from veneer.nn.plan import plan_of
from veneer.storage.int8 import Int8Linear
from veneer.storage.nf4 import NF4Linear
from veneer.train.folder import Existing, alone_in, begin_run_folder, check_run_folder
from veneer.train.initialise import Seen, check_initialisation, needs_look, observe
from veneer.train.interrupt import StopFlag, stop_behind, stop_flag
from veneer.train.loop import TrainResult, check_trainable, train_adapter
from veneer.train.made_with import made_with
from veneer.train.prepare import PreparedData, prepare_data, read_data

log = logging.getLogger("veneer")


def run(config: RunConfig, *, existing: Existing = "refuse", force: bool = False) -> TrainResult:
    """Train an adapter as a run file says: check settings, folder and rows, load the base, attach, train, commit.

    Args:
        config: The run.
        existing: What to do where the run folder exists.
        force: Resume although settings, rows, base or versions have changed; the run folder and the model card say so.

    Raises:
        VeneerError: Of the kind that fits; everything about settings, folder, rows and base's name before the model is
            loaded.
        InterruptedRunError: If SIGINT or SIGTERM came: what was done is committed.

    Example:
        run(read_run_file("examples/run.yaml")).eval_loss
    """
    _check_force(existing, force)
    with _stoppable(config.out) as stop:
        check_initialisation(config.adapter, config.storage)
        check_run_folder(config.out, existing)
        read = read_data(config.data, check=stop.check)  # before the base is looked for: that may take half a minute
        source = find_source(config.base)
        tokenizer = load_tokenizer(source)
        longest = _longest(config.train, load_config(source))
        data = prepare_data(config.data, read, tokenizer, longest, check=stop.check)
        check_invocation(config.adapter, data.train.rows)
        model, (adapter, observed) = _load(source, data, config)
        metadata = AdapterMetadata(
            base=source.name,
            task_type="CAUSAL_LM",
            row_format=data.row_format,
            template_digest=template_digest(tokenizer),
        )
        attach(model, adapter, seed=config.seed, metadata=metadata, observed=observed)
        observed.clear()  # full weights or gradients, as large as the model
        return _train(model, data, config, existing, force, stop)


def _load(source: Source, data: PreparedData, config: RunConfig) -> tuple[PreTrainedModel, Seen]:
    """Load the base as it is to be stored, and what the adapter's initialisation sees of it before."""
    if not needs_look(config.adapter):
        return load_model(source, dtype=config.dtype, storage=config.storage), (config.adapter, {})
    model, budget = load_model(source, dtype=config.dtype), config.train.tokens_per_micro_batch
    seen = observe(model, config.adapter, data.train.rows, seed=config.seed, tokens_per_batch=budget)
    quantise_base(model, config.storage)
    return model, seen


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: str | DataConfig,
    out: str,
    config: TrainConfig | None = None,
    seed: int = 0,
    existing: Existing = "refuse",
    force: bool = False,
) -> TrainResult:
    """Train the adapter that is attached to a model, and write a run folder.

    Args:
        model: A model with an adapter attached; the adapter stays attached, trained.
        tokenizer: The model's tokenizer.
        data: Training rows, or where training and evaluation rows lie.
        out: The run folder to write.
        config: How to train.
        seed: Fixes the order of the rows, and dropout.
        existing: What to do where the run folder exists.
        force: As in `run`.

    Raises:
        AttachError: If no adapter is attached.
        VeneerError: As `run`.

    Example:
        model, tokenizer = load_base("smollm2")
        attach(model, LoRAConfig(rank=16))
        result = finetune(model, tokenizer, data="chat.jsonl", out="runs/a")
    """
    _check_force(existing, force)
    with _stoppable(out) as stop:
        attachment = attachment_of(model)
        check_run_folder(out, existing)
        base = attachment.metadata.base or str(model.name_or_path) or type(model).__name__
        settings = RunConfig(
            base=base,
            storage=_storage_of(model),
            dtype=_dtype_of(model),
            adapter=attachment.config,
            data=DataConfig(train=data) if isinstance(data, str) else data,
            train=config or TrainConfig(),
            seed=seed,
            out=out,
        )
        read, longest = read_data(settings.data, check=stop.check), _longest(settings.train, model.config)
        prepared = prepare_data(settings.data, read, tokenizer, longest, check=stop.check)
        check_invocation(attachment.config, prepared.train.rows)
        set_metadata(model, base=base, row_format=prepared.row_format, template_digest=template_digest(tokenizer))
        return _train(model, prepared, settings, existing, force, stop)


@contextmanager
def _stoppable(out: str) -> Iterator[StopFlag]:
    """Turn a signal anywhere within the block into an error that says how the run folder was left."""
    with stop_flag() as stop:
        try:
            yield stop
        except BaseException as error:
            request = None if isinstance(error, InterruptedRunError) else stop_behind(error, stop)
            if request is None:
                raise
            left = f"{out} is in good order, go on with --resume" if stop.began else "nothing was written or changed"
            raise InterruptedRunError(
                f"stopped by {request} before the first step; {left}", exit_code=request.exit_code
            ) from None


def _check_force(existing: Existing, force: bool) -> None:
    if force and existing != "resume":
        raise ConfigError("force goes with resume: it goes on with a run although something has changed")


def _storage_of(model: nn.Module) -> Literal["plain", "int8", "nf4"]:
    """Return how a model's linear layers are stored, as `load_base` was asked for it."""
    kinds = {type(module) for module in model.modules()}
    return "nf4" if NF4Linear in kinds else "int8" if Int8Linear in kinds else "plain"


def _dtype_of(model: PreTrainedModel) -> Literal["auto", "float32", "bfloat16", "float16"]:
    """Return what a model computes in, as `load_base` chose it or was asked for it; else `auto`."""
    name = next((name for name, dtype in DTYPES.items() if dtype == model.dtype), "auto")
    return cast(Literal["auto", "float32", "bfloat16", "float16"], name)


def check_invocation(config: LoRAConfig, rows: Sequence[EncodedRow]) -> None:
    """Raise where an activated adapter would be silent in every row: it would train to the end and learn nothing.

    Raises:
        DataError: If no row holds the invocation before its last supervised token.
    """
    wanted = config.invocation_tokens
    if not wanted:
        return
    starts = (activation_start(row.token_ids.tolist(), wanted) for row in rows)
    if not any(start is not None and start + 1 < len(row.token_ids) for row, start in zip(rows, starts, strict=True)):
        raise DataError(
            f"invocation_tokens={list(wanted)} stands before an answer in none of {len(rows)} training rows, so the "
            "adapter would be silent in all of them; check the tokens, or put the invocation into the prompts"
        )


def _longest(train: TrainConfig, base: PreTrainedConfig) -> int:
    """Return how long a row may be: learned positions end somewhere, and beyond them lies an IndexError."""
    return min(train.max_length, num_positions(base) or train.max_length)


def _train(
    model: PreTrainedModel, data: PreparedData, config: RunConfig, existing: Existing, force: bool, stop: StopFlag
) -> TrainResult:
    check_trainable(model)
    planned = plan_of(model)
    with ExitStack() as stack:
        with stop.held():
            depends_on = made_with(model, data, config)
            stack.enter_context(alone_in(Path(config.out)))
            folder, inexact = begin_run_folder(config, planned.to_json(), depends_on, existing, force=force)
            stop.began = True
        for line in inexact:
            log.warning("not the run that was begun: %s", line)
        log.info(
            "%d rows, %d tokens an epoch, %d supervised; %d of %d parameters train",
            *(len(data.train.rows), data.train.num_tokens, data.train.num_supervised),
            *(planned.num_parameters, planned.base_parameters),
        )
        return train_adapter(model, data, config, folder, stop, inexact)
