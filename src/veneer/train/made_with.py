"""What a run's numbers depend on: a run that is gone on with must find all of it unchanged."""

import hashlib
import platform
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from transformers import PreTrainedModel

from veneer import __version__
from veneer.config import RunConfig
from veneer.nn.attach import attachment_of
from veneer.ops import native, tiles
from veneer.train.prepare import PreparedData

_MAY_CHANGE: dict[str, Any] = {"out": True, "train": {"checkpoint_every", "keep_checkpoints"}}


def made_with(model: PreTrainedModel, data: PreparedData, config: RunConfig) -> dict[str, Any]:
    """Return the settings, and digests of rows, tokens, base and template, versions, threads and the device.

    Args:
        model: The model with the adapter attached.
        data: The run's rows.
        config: The run.
    """
    metadata = attachment_of(model).metadata
    return {
        "settings": config.model_dump(mode="json", exclude=_MAY_CHANGE),
        "data": data.digests,
        "tokens": _tokens_digest(data),
        "base_fingerprint": metadata.base_fingerprint,
        "template_digest": metadata.template_digest,
        "versions": {
            "veneer": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "python": platform.python_version(),
        },
        "num_threads": torch.get_num_threads(),
        "device": _device(model.device),
        "kernels": native.source() if model.device.type == "cpu" else None,
        "tiles": tiles.has_tiles() if model.device.type == "cpu" else None,
    }


def _tokens_digest(data: PreparedData) -> str:
    """Return a digest of what the rows became: it changes with the tokenizer, whatever a file of rows says."""
    sha = hashlib.sha256()
    for rows in (data.train, data.eval):
        if rows is not None:
            for part in (rows.lengths, rows.token_ids_T.numpy(), rows.supervised_T.numpy()):
                sha.update(np.ascontiguousarray(part).data)
    return sha.hexdigest()


def _device(device: torch.device) -> str:
    """Return what computes, as far as it decides the last bits."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    maker = torch.cpu.get_capabilities().get("cpu_name", "")  # it decides who multiplies: `ops.product`
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()} {maker}".rstrip()
