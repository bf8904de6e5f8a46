"""A head that a checkpoint's files hold no tensor for, as it is tied to the table: when a merge unties it, and how.

Files name no module, so the head is what the adapter calls so, or `lm_head`; the table is the tensor of its shape.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from veneer.adapter import Adapter
from veneer.errors import TargetError
from veneer.files.shards import Checkpoint

HEAD = "lm_head.weight"
_ONE_HEAD = ("ForCausalLM", "LMHeadModel")
_OTHERWISE_TIED = ("ForMaskedLM", "ForPreTraining", "ForConditionalGeneration")
_SETTING = "tie_word_embeddings"


@dataclass(frozen=True)
class Untied:
    """A head that gets a weight of its own.

    Args:
        head: Name of its tensor.
        table: Name of the table's.
        stored: Whether the files hold the head's tensor already, and only the configuration ties them.
    """

    head: str
    table: str
    stored: bool = False


def find_untied(checkpoint: Checkpoint, adapter: Adapter) -> Untied | None:
    """Return the tie that a merge must undo: the adapter changes the head or the table, and they are one.

    Raises:
        TargetError: If the tie is none that a saved configuration can undo, or cannot be told from the files.
    """
    if _is_tied(checkpoint.config) is False:
        return None
    head = _missing_head(checkpoint, adapter)
    if head is not None:
        name, shape = head
        tables = [one for one, place in checkpoint.tensors.items() if place.shape == shape]
        if len(tables) != 1:
            return None  # then it is no tied head: a name that the files lack, which is said elsewhere
        _refuse_other_ties(checkpoint, tables[0])
        return Untied(name, tables[0])
    table = _touched_table(checkpoint, adapter)
    if table is None:
        return None
    shape = checkpoint.tensors[table].shape
    alike = [one for one, place in checkpoint.tensors.items() if place.shape == shape and one != table]
    if alike:
        stored = _is_tied(checkpoint.config) is True and HEAD in checkpoint.tensors and HEAD in (*alike, table)
        other = next((one for one in alike if HEAD in (one, table)), alike[0])
        return Untied(HEAD, other if table == HEAD else table, stored=True) if stored else None
    _refuse_other_ties(checkpoint, table)
    return Untied(HEAD, table) if _ends(checkpoint.config, _ONE_HEAD) else None


def stored_twin(checkpoint: Checkpoint, name: str) -> list[str]:
    """Return the head where the files hold it beside a table that its configuration ties it to: rows go into both."""
    head = checkpoint.tensors.get(HEAD)
    tied = head is not None and name != HEAD and _is_tied(checkpoint.config) is True
    return [HEAD] if tied and head is not None and head.shape == checkpoint.tensors[name].shape else []


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that says that head and table are two.

    Example:
        >>> untied_config({"model_type": "gpt2"})["tie_word_embeddings"]
        False
    """
    changed = deepcopy(dict(config))
    changed[_SETTING] = False
    if _SETTING in _text_config(changed):
        changed["text_config"][_SETTING] = False
    return changed


def typed_config(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return a configuration that says in which dtype the weights are stored, under each name that it had for it.

    Example:
        >>> typed_config({"torch_dtype": "float32"}, torch.bfloat16)
        {'torch_dtype': 'bfloat16'}
    """
    name, changed = str(dtype).removeprefix("torch."), deepcopy(dict(config))
    places = [changed, *(one for key, one in changed.items() if key.endswith("_config") and isinstance(one, dict))]
    for place in places:
        for key in ("dtype", "torch_dtype"):
            if key in place:
                place[key] = name
    if not {"dtype", "torch_dtype"} & set(changed):
        changed["dtype"] = name
    return changed


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    found = config.get("text_config")
    return found if isinstance(found, dict) else {}


def _is_tied(config: Mapping[str, Any]) -> bool | None:
    """Return what a configuration says; None where it says nothing, and the class of the model decides."""
    return config.get(_SETTING, _text_config(config).get(_SETTING))


def _ends(config: Mapping[str, Any], ends: tuple[str, ...]) -> bool:
    found = config.get("architectures")
    return isinstance(found, list) and any(str(one).endswith(ends) for one in found)


def _missing_head(checkpoint: Checkpoint, adapter: Adapter) -> tuple[str, tuple[int, ...]] | None:
    """Return name and shape of a matrix that the adapter changes and the files lack, which lies in no layer."""
    heads: dict[str, tuple[int, ...]] = {
        f"{path}.weight": pair.sizes for path, pair in adapter.modules.items() if pair.form == "linear"
    }
    heads |= {path: tuple(value.shape) for path, value in adapter.trained.items() if value.ndim == 2}
    for name, shape in heads.items():
        numbered = any(part.isdigit() for part in name.split("."))
        leaf = ".".join(name.split(".")[-2:])
        if not numbered and not any(one == leaf or one.endswith(f".{leaf}") for one in checkpoint.tensors):
            return name, shape
    return None


def _touched_table(checkpoint: Checkpoint, adapter: Adapter) -> str | None:
    """Return the table of words, or the stored head, that the adapter changes as a whole."""
    words = checkpoint.config.get("vocab_size", _text_config(checkpoint.config).get("vocab_size"))
    for name in _whole(adapter):
        leaf = ".".join(name.split(".")[-2:])
        found = [one for one in checkpoint.tensors if one == leaf or one.endswith(f".{leaf}")]
        shape = checkpoint.tensors[found[0]].shape if len(found) == 1 else ()
        if len(shape) == 2 and words in (None, shape[0]):
            return found[0]
    return None


def _whole(adapter: Adapter) -> Iterator[str]:
    for path, pair in adapter.modules.items():
        if pair.form == "embedding" or f"{path}.weight" == HEAD:
            yield f"{path}.weight"
    for path, value in adapter.trained.items():
        if value.ndim == 2 and not any(part.isdigit() for part in path.split(".")):
            yield path


def _refuse_other_ties(checkpoint: Checkpoint, table: str) -> None:
    if _ends(checkpoint.config, _OTHERWISE_TIED):
        raise TargetError(
            f"{table}: the files hold one tensor for it and for other places of "
            f"{checkpoint.config['architectures'][0]} (nothing was written); only a head and its table can be untied "
            "in a saved configuration, others are tied when it loads"
        )
