"""Tables of rows: Parquet files, Arrow files, folders that the `datasets` library saved; read with pyarrow.

In a table a null is an absent key, since a column is there for every row; and a list is a list of values.
"""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from veneer.data.shapes import Bad
from veneer.errors import DataError, MissingDependencyError
from veneer.files.strict_json import parse_json

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_MAX_BYTES = 16 << 20


def table_files(folder: Path) -> tuple[Path, ...]:
    """Return the Arrow files of a folder that `datasets` saved, in their order; none where it is no such folder.

    Raises:
        DataError: If the folder says what it holds in a way that cannot be read.
    """
    state = folder / _STATE
    if not state.is_file():
        return ()
    content = _json(state)
    listed = content.get("_data_files") if isinstance(content, dict) else None
    entries = [one.get("filename") for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    names = [name for name in entries if isinstance(name, str) and Path(name).name == name]
    if not names or len(names) < len(entries):
        raise DataError(f"{state}: expected '_data_files', a list of file names in the folder; save the data set again")
    if isinstance(content, dict) and content.get("_indices_data_files"):
        raise DataError(f"{state}: the rows stand in another order than in the files; save it with a new `datasets`")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder}: {len(missing)} of {len(names)} files are missing, the first is {missing[0]}")
    return tuple(folder / name for name in names)


def splits_of(folder: Path) -> list[str]:
    """Return the names of the splits that a `DatasetDict` saved into a folder; none where it did not."""
    content = _json(folder / _SPLITS) if (folder / _SPLITS).is_file() else {}
    splits = content.get("splits") if isinstance(content, dict) else None
    return [str(name) for name in splits] if isinstance(splits, list) else []


def table_columns(path: Path) -> list[str]:
    """Return the names of a table's columns.

    Raises:
        DataError: If the file is no table.
        MissingDependencyError: If pyarrow is not installed.
    """
    arrow, parquet = _pyarrow()
    try:
        if path.suffix.lower() == ".parquet":
            return list(parquet.read_schema(path).names)
        with arrow.memory_map(str(path)) as source:
            return list(_arrow_reader(arrow, source).schema.names)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as a table: {_first_line(error)}") from None


def table_batches(path: Path, size: int) -> Iterator[tuple[float, list[Any]]]:
    """Yield the rows of a table, at most `size` at a time, as `as_row` takes them, and the share of rows done then.

    Raises:
        DataError: If the table breaks off; rows before that were given.
        MissingDependencyError: If pyarrow is not installed.
    """
    arrow, parquet = _pyarrow()
    done = 0
    try:
        if path.suffix.lower() == ".parquet":
            with parquet.ParquetFile(path, pre_buffer=False) as file:
                total = max(1, file.metadata.num_rows)
                for batch in file.iter_batches(batch_size=size, use_threads=False):
                    done += batch.num_rows
                    yield done / total, _values(batch)
            return
        with arrow.memory_map(str(path)) as source:
            whole = max(1, source.size())
            for batch in _record_batches(_arrow_reader(arrow, source)):
                for start in range(0, batch.num_rows, size):
                    yield min(1.0, source.tell() / whole), _values(batch.slice(start, size))
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: the table breaks off behind row {done}: {_first_line(error)}") from None


def _arrow_reader(arrow: ModuleType, source: Any) -> Any:
    """Open an Arrow file: a stream, as `datasets` writes it, or a file with a footer."""
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    return arrow.ipc.open_file(source) if is_file else arrow.ipc.open_stream(source)


def _record_batches(reader: Any) -> Iterator[Any]:
    if isinstance(reader, Iterator):
        yield from reader
    else:
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))


def _values(batch: Any) -> list[Any]:
    """Return the rows of a batch as values; one that is not UTF-8 is a `Bad`."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        rows = [_value(batch.slice(index, 1)) for index in range(batch.num_rows)]
    return [_without_nulls(row) if isinstance(row, dict) else row for row in rows]


def _value(one: Any) -> Any:
    try:
        return one.to_pylist()[0]
    except UnicodeDecodeError:
        return Bad("not UTF-8: the table holds a string that is none")


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in row.items() if value is not None}
    messages = found.get("messages")
    if isinstance(messages, list):
        found["messages"] = [
            {key: value for key, value in one.items() if value is not None} if isinstance(one, dict) else one
            for one in messages
        ]
    return found


def _json(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes(), str(path), max_bytes=_MAX_BYTES, error=DataError)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _pyarrow() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise MissingDependencyError("Parquet and Arrow files need pyarrow: pip install 'veneer[rows]'") from None
    return pyarrow, pyarrow.parquet
