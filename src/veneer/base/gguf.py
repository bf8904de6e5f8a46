"""GGUF files, converted once.

Reading a GGUF file takes transformers half a minute; the directory made of it loads in less than a
second with the same logits. It is kept in a cache, under the digest of the file, committed in one step.
"""

import logging
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedConfig, PreTrainedModel

from veneer.base.cache import cache_folder
from veneer.base.quiet import quiet_transformers
from veneer.errors import BaseModelError, DamagedArtefactError, MissingDependencyError
from veneer.files.commit import commit_folder, verify_folder
from veneer.files.filesystem import REAL

log = logging.getLogger("veneer")

CONVERSION = 1
"""Part of the cache's key: raise it when the same file gives another directory."""


def converted_gguf(path: Path, expected_sha256: str | None = None) -> Path:
    """Return the directory that a GGUF file converts to, converting it where that was not done yet.

    The weights are dequantised to float32; tokenizer and chat template come from the file as well.

    Args:
        path: The `.gguf` file.
        expected_sha256: What the file's digest must be.

    Raises:
        BaseModelError: If the file is another than expected, or cannot be read as GGUF.
        MissingDependencyError: If the `gguf` package is not installed.

    Cost:
        The first time half a minute for 135 M parameters and 4 bytes a parameter on disk; then about a second.
    """
    _, digest = REAL.measure(path)
    if expected_sha256 is not None and digest != expected_sha256:
        raise BaseModelError(f"{path} is damaged: expected SHA-256 {expected_sha256}, got {digest}; install it again")
    target = cache_folder() / "gguf" / f"{digest}-{CONVERSION}"
    if _is_sound(target, path):
        return target
    if find_spec("gguf") is None:
        raise MissingDependencyError("reading GGUF files needs the gguf package: pip install 'veneer[gguf]'")
    REAL.make_parents(target.parent)
    with REAL.locked(target.with_name(f"{target.name}.lock"), create=True):
        if not _is_sound(target, path):  # another process may have made it while we waited
            log.info("converting %s once; this takes about half a minute", path.name)
            notes = {"source": path.name, "sha256": digest, "conversion": CONVERSION}
            commit_folder(target, lambda folder: _convert(path, folder), kind="base", notes=notes, replace=True)
    return target


def _is_sound(target: Path, path: Path) -> bool:
    """Tell whether the converted copy is there, every byte as its manifest says."""
    try:
        return target.exists() and verify_folder(target) is not None
    except DamagedArtefactError as error:
        log.warning("the converted copy of %s is damaged and is made again: %s", path.name, error)
        return False


def load_gguf(path: Path, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """Return the model of a GGUF file, in float32, without a converted copy.

    Args:
        path: The file.
        config: What its weights are read into; None takes what transformers makes of the file's fields, which is not
            all that they say (Gemma 2's `query_pre_attn_scalar`).

    Raises:
        BaseModelError: If transformers cannot read it: it knows fewer families than llama.cpp.

    Example:
        load_gguf(Path("models/llama.gguf")).config.model_type
    """
    try:
        with quiet_transformers():
            plain = GgufConfig(dequantize=True)  # otherwise packed weights stay packed where `kernels` is installed
            place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
            given = {} if config is None else {"config": config}
            model = AutoModelForCausalLM.from_pretrained(
                **place, **given, dtype=torch.float32, quantization_config=plain
            )
    except Exception as error:  # whatever a reader of binary files may raise on a file that is none
        raise BaseModelError(f"{path} cannot be read as a GGUF model: {error}") from error
    # What it was quantised by is history: the copy holds plain numbers.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    return model.requires_grad_(False).eval()


def _convert(path: Path, folder: Path) -> None:
    model = load_gguf(path)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except Exception as error:  # as above
        raise BaseModelError(f"{path} cannot be read as a GGUF model: {error}") from error
