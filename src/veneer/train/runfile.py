"""Run files: YAML in, a checked `RunConfig` out, and back."""

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from veneer.config import RunConfig
from veneer.errors import ConfigError
from veneer.names import did_you_mean


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 2e-4 is a number, and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is no word", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_run_file(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, with `key=value` settings in the place of its own.

    Args:
        path: The YAML file.
        overrides: Such as `train.epochs=2`; values are YAML.

    Raises:
        ConfigError: If the file cannot be read, is not YAML, or any setting is wrong, all at once.

    Example:
        read_run_file("examples/run.yaml", ["train.epochs=2"]).train.epochs
    """
    file = Path(path)
    if not file.is_file():
        beside = [str(other) for other in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        raise ConfigError(f"run file {path!r} does not exist{did_you_mean(path, beside)}")
    try:
        values = _load(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {_where(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values, such as `base: smollm2`; got {type(values).__name__}")
    for override in overrides:
        _set(values, override)
    try:
        return RunConfig(**values)
    except ConfigError as error:
        count = f"{len(error.problems)} setting{'s' * (len(error.problems) > 1)}"
        raise ConfigError(f"{path}: {count} cannot be used", error.problems) from None


def dump_run(run: RunConfig) -> str:
    """Return a run as YAML, every default written out.

    Example:
        >>> print(dump_run(RunConfig(base="smollm2", data={"train": "a.jsonl"}, out="runs/a")).splitlines()[0])
        base: smollm2
    """
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _load(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _where(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error)


def _set(values: dict[str, Any], override: str) -> None:
    """Put one `key=value` into nested settings."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: expected key=value, such as train.epochs=2")
    *path, last = key.strip().split(".")
    for name in path:
        inner = values.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override!r}: {name!r} holds a value, not settings")
        values = inner
    try:
        values[last] = _load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {_where(error)}") from None
