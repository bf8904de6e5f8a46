"""What verbs may write, and what `--overwrite` may replace: told before any work."""

from pathlib import Path

import veneer
from veneer.base.cache import cache_folder
from veneer.errors import OutputError, shortened

_SHOWN = 3


def check_place(out: str) -> None:
    """Raise where a file or folder would lie in veneer's own cache, which may be emptied at any time.

    Raises:
        OutputError: If it would.

    Example:
        >>> check_place("runs/new")
    """
    cache = cache_folder().resolve()
    if Path(out).resolve().is_relative_to(cache):
        raise OutputError(
            f"{out}: lies in veneer's own cache, {cache}, which may be emptied at any time; choose another"
        )


def check_folder(out: str, *, overwrite: bool) -> None:
    """Raise where a folder could not be written in the end, or where more than a result of ours would be lost.

    Raises:
        OutputError: If it exists and is not to be replaced; if it is, and holds what no verb wrote; in the cache.

    Example:
        >>> check_folder("no/such/folder", overwrite=False)
    """
    check_place(out)
    path = Path(out)
    if not path.exists():
        return
    if not path.is_dir():
        raise OutputError(f"{out}: expected a folder to write, but a file is there; choose another name")
    if not overwrite:
        raise OutputError(f"{out}: exists already; choose another name, or replace it with --overwrite")
    if lost := veneer.unknown_files(path):
        raise OutputError(
            f"{out}: --overwrite replaces what veneer wrote, and this holds other files; choose another name, or remove"
            " it yourself",
            shortened(lost, _SHOWN),
        )
