"""Rows of tokens that train alone, beside no factors: PEFT's TrainableTokens (0.21.2).

To PEFT, LoRA without a target module is an error; rows alone are a method of their own, with a layout of its own:

    adapter_config.json    peft_type TRAINABLE_TOKENS; target_modules, the tables; token_indices, one list for all
    tensors                P.trainable_tokens_delta for the path P of each table, shape (tokens, size of a row)

A head that is tied to a table follows it; PEFT writes its rows once more, by the head's path.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.adapter import Adapter, AdapterMetadata, TokenRows
from veneer.config import LoRAConfig
from veneer.errors import AdapterError
from veneer.files.peft_config import PEFT_VERSION
from veneer.files.peft_folder import PREFIX
from veneer.files.peft_keys import read_keys
from veneer.files.peft_values import choice, is_empty, names, show, text, token_ids
from veneer.names import did_you_mean, matches

METHOD = "TRAINABLE_TOKENS"

_ROWS = "trainable_tokens_delta"
_KEY = re.compile(rf"(?P<path>.+)\.{_ROWS}(?:\.default)?")
_USED = ("peft_type", "task_type", "base_model_name_or_path", "revision", "target_modules", "token_indices")
_CHANGES_NOTHING = ("auto_mapping", "peft_version", "inference_mode", "runtime_config", "init_weights")


def rows_alone(adapter: Adapter) -> bool:
    """Tell whether an adapter holds rows of tokens and nothing else."""
    return bool(adapter.tokens) and not adapter.modules and not adapter.trained


def write_rows_alone(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return PEFT's configuration and the tensors, by their names without PEFT's prefix.

    Raises:
        AdapterError: If the tables do not train the same tokens: PEFT has one list for all.

    Example:
        >>> rows = TokenRows((5, 7), torch.zeros(2, 3))
        >>> adapter = Adapter({}, LoRAConfig(target_modules=(), token_rows={"embed": (5, 7)}), tokens={"embed": rows})
        >>> raw, tensors = write_rows_alone(adapter)
        >>> raw["target_modules"], raw["token_indices"], list(tensors)
        (['embed'], [5, 7], ['embed.trainable_tokens_delta'])
    """
    ids = {path: one.indices for path, one in adapter.tokens.items()}
    if len(set(ids.values())) > 1:
        lines = [f"{path}: {list(indices)}" for path, indices in ids.items()]
        raise AdapterError("PEFT has one list of tokens for all tables; these differ", lines)
    metadata = adapter.metadata
    raw = {
        "auto_mapping": None,
        "base_model_name_or_path": metadata.base,
        "inference_mode": True,
        "init_weights": True,
        "peft_type": METHOD,
        "peft_version": PEFT_VERSION,
        "revision": metadata.revision,
        "target_modules": sorted(ids),
        "task_type": metadata.task_type,
        "token_indices": list(next(iter(ids.values()))),
    }
    return raw, {f"{path}.{_ROWS}": one.rows for path, one in adapter.tokens.items()}


def read_rows_alone(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> tuple[LoRAConfig, AdapterMetadata, dict[str, TokenRows]]:
    """Return our settings, what the configuration says of the base, and the rows by the path of their table.

    Args:
        raw: The parsed `adapter_config.json`.
        tensors: The tensors by key.
        where: What errors call the folder.

    Raises:
        AdapterError: If a key is unknown, of the wrong type, or the tensors are not what it says; all at once.
    """
    problems = [
        f"{key}: a value here has no meaning that is known{did_you_mean(key, (*_USED, *_CHANGES_NOTHING))}"
        for key, value in raw.items()
        if key not in (*_USED, *_CHANGES_NOTHING) and not is_empty(value)
    ]
    choice(raw, "init_weights", (True, False), problems)  # how they started: the file has their values
    targets = names(raw, "target_modules", problems, regex=True)
    ids = token_ids(raw, "token_indices", problems)
    metadata = AdapterMetadata(
        base=text(raw, "base_model_name_or_path", problems),
        revision=text(raw, "revision", problems),
        task_type=text(raw, "task_type", problems),
    )
    if not targets and not any(problem.startswith("target_modules") for problem in problems):
        problems.append("target_modules: expected the tables, got none")
    if (not ids or len(set(ids)) != len(ids)) and not any(one.startswith("token_indices") for one in problems):
        problems.append(f"token_indices: expected token ids, each once, got {show(raw.get('token_indices'))}")
    if problems:
        raise AdapterError(f"{where}: its configuration cannot be read exactly as it is meant", problems)
    tokens = _tables(tensors, targets, ids, where, problems)
    if problems:
        raise AdapterError(f"{where}: its tensors are not what its configuration says", problems)
    entries = targets if isinstance(targets, tuple) else tuple(tokens)
    config = LoRAConfig(target_modules=(), token_rows=dict.fromkeys(entries, ids))
    return config, metadata, tokens


def _tables(
    tensors: Mapping[str, Tensor], targets: str | tuple[str, ...], ids: tuple[int, ...], where: str, problems: list[str]
) -> dict[str, TokenRows]:
    """Return the rows of each table; a tied head's must be a copy of some table's."""
    parts = read_keys(tensors, PREFIX, (), where, rows=_KEY)
    problems += parts.problems
    strange = [*(one.A for one in parts.modules.values()), *parts.trained.values(), *parts.base_weights.values()]
    problems += [f"{key!r}: no rows of tokens, and {METHOD} has nothing else" for key in strange]
    entries = _entries(targets, list(parts.tokens), problems)
    tokens: dict[str, TokenRows] = {}
    for path, key in parts.tokens.items():
        if matches(path, entries):
            try:
                tokens[path] = TokenRows(ids, tensors[key])
            except AdapterError as error:
                problems.append(f"{key!r}: {error.message}")
    for path, key in parts.tokens.items():
        is_copy = any(torch.equal(one.rows, tensors[key]) for one in tokens.values())
        if entries and not matches(path, entries) and not is_copy:
            problems.append(f"{key!r}: target_modules names no such table, and it is no copy of a table's rows")
    unused = [entry for entry in entries if not any(matches(path, (entry,)) for path in parts.tokens)]
    problems += [f"target_modules={entry!r}: no rows of such a table are there" for entry in unused]
    return tokens


def _entries(targets: str | tuple[str, ...], paths: Sequence[str], problems: list[str]) -> tuple[str, ...]:
    """Return the names of the tables. Without a list PEFT writes one path as an expression; none is run here."""
    if isinstance(targets, tuple):
        return targets
    if targets in paths:
        return (targets,)
    if len(paths) == 1:
        return tuple(paths)
    problems.append(f"target_modules={show(targets)}: an expression for several tables; expected a list of their names")
    return ()
