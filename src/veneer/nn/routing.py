"""Which rows go through which adapter slot.

One `Routing` object belongs to an attached model and is shared by its layers. There is no global
state, and "no adapter" is `None`, never a number.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from veneer.errors import AttachError


@dataclass(frozen=True)
class Segment:
    """Rows `start` to `stop` (not included) go through `slot`; None is the base alone."""

    start: int
    stop: int
    slot: int | None


class Routing:
    """The segments of the rows that come next; one slot for all rows unless told otherwise.

    Args:
        slot: The slot of all rows while no segments are set.
        needs_segments: Why rows must not go through a slot unless segments say so, or None.

    Example:
        >>> routing = Routing()
        >>> routing.segments(10)
        (Segment(start=0, stop=10, slot=0),)
        >>> with routing.using([Segment(0, 4, None), Segment(4, 10, 0)]):
        ...     len(routing.segments(10))
        2
    """

    def __init__(self, slot: int | None = 0, needs_segments: str | None = None) -> None:
        self._slot = slot
        self._needs_segments = needs_segments
        self._segments: Mapping[int, tuple[Segment, ...]] | None = None

    def segments(self, num_rows: int) -> tuple[Segment, ...]:
        """Return the segments that cover the rows, in order.

        Raises:
            AttachError: If the segments that were set cover another number of rows, or are needed and not set.
        """
        if self._segments is None:
            if self._needs_segments is not None and self._slot is not None:
                raise AttachError(self._needs_segments)
            return (Segment(0, num_rows, self._slot),)
        if num_rows not in self._segments:
            covered = " or ".join(str(rows) for rows in self._segments)
            raise AttachError(f"the routing covers {covered} rows, the layer got {num_rows}")
        return self._segments[num_rows]

    def all_slots(self) -> tuple[int | None, ...]:
        """Return the slots that rows go through, each once."""
        if self._segments is None:
            return (self._slot,)
        return tuple(dict.fromkeys(one.slot for segments in self._segments.values() for one in segments))

    @contextmanager
    def using(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Route by these segments within the block.

        Raises:
            AttachError: If they leave a gap, overlap or are empty.
        """
        with self.by_rows([segments]):
            yield

    @contextmanager
    def by_rows(self, choices: Iterable[Sequence[Segment]]) -> Iterator[None]:
        """Route each call within the block by those segments that cover its number of rows.

        Raises:
            AttachError: If any leave a gap, overlap or are empty.
        """
        found = {}
        for segments in choices:
            expected = 0
            for segment in segments:
                if segment.start != expected or segment.stop <= segment.start:
                    raise AttachError(f"segments must follow each other from row {expected} on, got {segment}")
                expected = segment.stop
            if not segments:
                raise AttachError("a routing needs at least one segment, got none")
            found[expected] = tuple(segments)
        before, self._segments = self._segments, found
        try:
            yield
        finally:
            self._segments = before

    @contextmanager
    def everywhere(self, slot: int | None) -> Iterator[None]:
        """Route all rows through one slot, or through none, within the block."""
        before = self._slot, self._segments
        self._slot, self._segments = slot, None
        try:
            yield
        finally:
            self._slot, self._segments = before
