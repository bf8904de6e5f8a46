"""Whole runs: from a configuration, or for a model that has an adapter attached already."""

import logging
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapter import AdapterMetadata
from veneer.base.load import load_config, load_model, load_tokenizer, num_positions
from veneer.base.source import find_source
from veneer.config import DataConfig, RunConfig, TrainConfig
from veneer.data.encode import template_digest
from veneer.nn.attach import attach, attachment_of, set_metadata
from veneer.nn.plan import plan_of
from veneer.train.folder import Existing, begin_run_folder, check_run_folder
from veneer.train.loop import TrainResult, check_trainable, train_adapter
from veneer.train.prepare import PreparedData, prepare_data, read_data

log = logging.getLogger("veneer")

_MAY_CHANGE: dict[str, Any] = {"out": True, "train": {"checkpoint_every", "keep_checkpoints"}}


def run(config: RunConfig, *, existing: Existing = "refuse") -> TrainResult:
    """Train an adapter as a run file says: check the folder and the rows, load the base, attach, train, commit.

    Args:
        config: The run.
        existing: What to do where the run folder exists.

    Raises:
        VeneerError: Of the kind that fits; everything about folder, rows and base's name before the model is loaded.

    Example:
        run(read_run_file("examples/run.yaml")).eval_loss
    """
    check_run_folder(config.out, existing)
    read = read_data(config.data)  # before the base is looked for: converting a GGUF file takes half a minute
    source = find_source(config.base)
    tokenizer = load_tokenizer(source)
    data = prepare_data(config.data, read, tokenizer, _longest(config.train, load_config(source)))
    model = load_model(source)
    metadata = AdapterMetadata(
        base=source.name,
        task_type="CAUSAL_LM",
        row_format=data.row_format,
        template_digest=template_digest(tokenizer),
    )
    attach(model, config.adapter, seed=config.seed, metadata=metadata)
    return _train(model, data, config, existing)


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: str | DataConfig,
    out: str,
    config: TrainConfig | None = None,
    seed: int = 0,
    existing: Existing = "refuse",
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

    Raises:
        AttachError: If no adapter is attached.
        VeneerError: As `run`.

    Example:
        model, tokenizer = load_base("smollm2")
        attach(model, LoRAConfig(rank=16))
        result = finetune(model, tokenizer, data="chat.jsonl", out="runs/a")
    """
    attachment = attachment_of(model)
    check_run_folder(out, existing)
    base = attachment.metadata.base or str(model.name_or_path) or type(model).__name__
    settings = RunConfig(
        base=base,
        adapter=attachment.config,
        data=DataConfig(train=data) if isinstance(data, str) else data,
        train=config or TrainConfig(),
        seed=seed,
        out=out,
    )
    prepared = prepare_data(settings.data, read_data(settings.data), tokenizer, _longest(settings.train, model.config))
    set_metadata(model, base=base, row_format=prepared.row_format, template_digest=template_digest(tokenizer))
    return _train(model, prepared, settings, existing)


def _longest(train: TrainConfig, base: PreTrainedConfig) -> int:
    """Return how long a row may be: learned positions end somewhere, and beyond them lies an IndexError."""
    return min(train.max_length, num_positions(base) or train.max_length)


def _train(model: PreTrainedModel, data: PreparedData, config: RunConfig, existing: Existing) -> TrainResult:
    check_trainable(model)
    planned = plan_of(model)
    folder = begin_run_folder(config, planned.to_json(), _made_with(model, data, config), existing)
    log.info(
        "%d rows, %d tokens an epoch, %d supervised; %d of %d parameters train",
        *(len(data.train.rows), data.train.num_tokens, data.train.num_supervised),
        *(planned.num_parameters, planned.base_parameters),
    )
    return train_adapter(model, data, config, folder)


def _made_with(model: PreTrainedModel, data: PreparedData, config: RunConfig) -> dict[str, Any]:
    """Return everything that a run's numbers depend on: a resumed run must find it unchanged."""
    return {
        "settings": config.model_dump(mode="json", exclude=_MAY_CHANGE),
        "data": data.digests,
        "base_fingerprint": attachment_of(model).metadata.base_fingerprint,
        "template_digest": attachment_of(model).metadata.template_digest,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "num_threads": torch.get_num_threads(),
    }
