"""The part of `veneer merge` that writes a GGUF file of what was merged."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import veneer
from veneer.cli.output import size
from veneer.cli.writing import check_place
from veneer.errors import ConfigError, VeneerError

if TYPE_CHECKING:
    from veneer.tools.merge_gguf import GgufExport

GgufFile = Annotated[
    str | None, typer.Option("--gguf", metavar="FILE", help="Write what was merged as one GGUF file too.")
]
GgufLike = Annotated[
    str | None,
    typer.Option("--gguf-like", metavar="FILE", help="GGUF of the base, for the tokenizer; of any type."),
]


def like_of(base: str, folder: str, out: str, gguf: str | None, given: str | None, *, overwrite: bool) -> Path:
    """Return the GGUF file that metadata and tokenizer are from; what stands against the export is said now.

    Raises:
        ConfigError: If there is none, or the file to make would lie in the folder of the merge.
        AdapterError, OutputError: If it is of another base, or the file to make exists.
    """
    if gguf is None:
        if given is not None:
            raise ConfigError("--gguf-like goes with --gguf, the file to make")
        return Path()
    if Path(out).absolute() in Path(gguf).absolute().parents:
        raise ConfigError(f"--gguf: {gguf} lies in {out}, whose manifest knows no such file; name one beside it")
    like = Path(given) if given is not None else None if Path(base).is_dir() else veneer.gguf_of(base)
    if like is None:
        raise ConfigError(
            f"--gguf: llama.cpp needs a tokenizer in its own words, which {base} has not; name a GGUF file of the same"
            " base, of any type: --gguf-like FILE.gguf"
        )
    check_place(gguf)
    veneer.check_gguf(folder, like, gguf, replace=overwrite)
    return like


def write_gguf(folder: str, like: Path, gguf: str, *, probe: bool, overwrite: bool) -> "GgufExport":
    """Write the merged folder as GGUF, with the proof where it is asked for."""
    try:
        if not probe:  # without transformers
            return veneer.export_gguf(folder, like, gguf, replace=overwrite)
        return veneer.export_gguf(folder, like, gguf, replace=overwrite, prove=veneer.gguf_proof(folder))
    except VeneerError as error:
        raise type(error)(f"{error.message}; {folder} was merged and stays", error.problems) from None


def gguf_facts(made: "GgufExport | None") -> dict[str, str]:
    """Return what is shown of it."""
    if made is None:
        return {}
    found = made.probe
    proof = f"logits differ by {found.difference:.3g}" if found.probed else f"not loaded: {found.reason}"
    return {
        "GGUF": f"{made.out}, {made.dtype}, {size(made.file.bytes)}",
        "read back": f"{made.tensors} tensors, bit for bit; {proof}",
    }
