"""What a merge on files did, as a value."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from veneer.files.manifest import FileRecord
from veneer.tools.merge_record import MergedModule, ProbeResult

RECORD = "veneer_merge.json"
"""Name of the record beside the weights."""
VERSION = 1


@dataclass(frozen=True)
class CheckpointMerge:
    """What a merge on files did.

    Args:
        base: The folder that was read.
        adapters: Digest and weight of each adapter.
        dtype: In which the weights are stored now, where that was asked for.
        inputs: Size and SHA-256 of each file of weights that was read.
        outputs: Of each that was written.
        modules: What was done to each weight; of 16-bit weights `rounding_loss` and `unchanged` are measured on a
            sample of their rows.
        trained: Tensors that were put in whole, or rows of which were.
        untied: Tensors that head or table got of their own.
        untouched: How many tensors were copied bit for bit.
        copied: Other files, copied as they are.
        left_out: Files that were not copied: they hold the base's weights in other forms.
        read_back: Whether the disk gave back of every file of weights what was written to it.
        probe: What the model computed before and after.
    """

    base: str
    adapters: tuple[tuple[str, float], ...]
    dtype: str | None
    inputs: Mapping[str, FileRecord]
    outputs: Mapping[str, FileRecord]
    modules: tuple[MergedModule, ...]
    trained: tuple[str, ...]
    untied: tuple[str, ...]
    untouched: int
    copied: tuple[str, ...]
    left_out: tuple[str, ...]
    read_back: bool
    probe: ProbeResult

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"version": VERSION, **asdict(self)}
