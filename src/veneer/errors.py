"""The one tree of errors.

    VeneerError
    ├── ConfigError             a setting is wrong                        (also ValueError)
    ├── TargetError             a target pattern or a layer does not fit  (also ValueError)
    ├── AdapterError            an adapter file or value is wrong         (also ValueError)
    ├── BaseModelError          a base model cannot be found or used      (also ValueError)
    ├── DataError               rows are wrong                            (also ValueError)
    ├── OutputError             an output folder cannot be used           (also ValueError)
    ├── DamagedArtefactError    files do not match their manifest         (also ValueError)
    ├── MissingDependencyError  an optional package is not installed      (also ImportError)
    ├── AttachError             attach or detach was called out of turn   (also RuntimeError)
    ├── NonFiniteError          training met NaN or infinity              (also ArithmeticError)
    ├── NotEnoughMemoryError    not even a single row fits into memory    (also MemoryError)
    └── InterruptedRunError     a run was stopped and left in good order  (also RuntimeError)

Every error says what was expected, what came, where, and what to do. `problems` holds one line for
each thing that is wrong, so that a caller sees them all at once.
"""

from collections.abc import Sequence


class VeneerError(Exception):
    r"""Anything that Veneer refuses or fails at, with every problem found listed at once.

    Args:
        message: One sentence: what was expected, what came, where, what to do.
        problems: One line for each single problem.

    Example:
        >>> str(VeneerError("2 rows are wrong", ["a.jsonl:1: empty", "a.jsonl:7: not JSON"]))
        '2 rows are wrong\n  - a.jsonl:1: empty\n  - a.jsonl:7: not JSON'
    """

    exit_code: int = 2

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.message = message
        self.problems = tuple(problems)
        super().__init__(message + "".join(f"\n  - {problem}" for problem in problems))

    def __reduce__(self) -> tuple[type, tuple[str, tuple[str, ...]]]:
        """Pickle by parts, so that errors cross process borders whole."""
        return type(self), (self.message, self.problems)


def shortened(problems: Sequence[str], most: int, count: int | None = None) -> list[str]:
    """Return the first problems, and a line that counts the others: a file of millions is told in a page.

    Args:
        problems: At least the first of them.
        most: How many are told.
        count: How many there are, where not all are given.

    Example:
        >>> shortened(["a", "b", "c"], 2), shortened(["a"], 2), shortened(["a"], 1, 9)
        (['a', 'b', '... and 1 more'], ['a'], ['a', '... and 8 more'])
    """
    left = (len(problems) if count is None else count) - min(most, len(problems))
    return [*problems[:most], *([f"... and {left} more"] if left > 0 else [])]


def several(names: Sequence[str], most: int = 1) -> str:
    """Return the first names on one line, and how many more there are.

    Example:
        >>> several(["q", "k", "v"]), several(["q", "k", "v"], 2), several(["q"])
        ('q and 2 more', 'q, k and 1 more', 'q')
    """
    left = len(names) - most
    return ", ".join(names[:most]) + (f" and {left} more" if left > 0 else "")


class ConfigError(VeneerError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class TargetError(VeneerError, ValueError):
    """A target pattern matches nothing, or a layer cannot be adapted."""


class AdapterError(VeneerError, ValueError):
    """An adapter file or value is malformed, unsupported or does not fit the model."""


class BaseModelError(VeneerError, ValueError):
    """A base model cannot be found, loaded or used."""


class DataError(VeneerError, ValueError):
    """Rows are missing, malformed or cannot be trained on."""


class OutputError(VeneerError, ValueError):
    """An output folder exists already, or does not hold what is needed."""


class DamagedArtefactError(VeneerError, ValueError):
    """Files do not match the manifest that vouches for them."""


class MissingDependencyError(VeneerError, ImportError):
    """An optional package is needed and not installed."""


class AttachError(VeneerError, RuntimeError):
    """Attach, detach or a call that needs an attached model came out of turn."""


class NonFiniteError(VeneerError, ArithmeticError):
    """Training met NaN or infinity; the update was not applied."""

    exit_code = 1


class NotEnoughMemoryError(VeneerError, MemoryError):
    """Memory does not suffice, and nothing more can be cut; no update was applied in part."""

    exit_code = 1


class InterruptedRunError(VeneerError, RuntimeError):
    """A run was stopped by a signal after its state was committed.

    Args:
        message: One sentence.
        problems: One line for each single problem.
        exit_code: What a shell shows for a process that the signal ended: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, message: str, problems: Sequence[str] = (), exit_code: int = 130) -> None:
        super().__init__(message, problems)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type, tuple[str, tuple[str, ...], int]]:  # type: ignore[override]
        """Pickle by parts, so that errors cross process borders whole."""
        return type(self), (self.message, self.problems, self.exit_code)
