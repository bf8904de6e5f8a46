"""Where we keep what is made once and used again: converted models, encoded rows."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder: `$VENEER_CACHE`, or `veneer` in the user's cache folder."""
    own = os.environ.get("VENEER_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "veneer"
