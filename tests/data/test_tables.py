"""Parquet, Arrow and `datasets` folders."""

import json
import sys
from pathlib import Path

import pytest

from veneer.data.rows import ChatRow, CompletionRow, Message, check_rows, read_prompts, read_rows
from veneer.errors import DataError, MissingDependencyError

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


def write(path, columns, suffix=".parquet"):
    table = arrow.table(columns)
    path = path.with_suffix(suffix)
    if suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=300)
        return str(path)
    new = arrow.ipc.new_stream if "stream" in path.name else arrow.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=700)
    return str(path)


def save_folder(folder, parts):
    """What `Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05}-of-{len(parts):05}.arrow" for n in range(len(parts))]
    for name, texts in zip(names, parts, strict=True):
        table = arrow.table({"prompt": texts, "completion": [" x"] * len(texts)})
        with arrow.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return str(folder)


@pytest.mark.parametrize(
    ("name", "suffix"), [("a", ".parquet"), ("stream", ".arrow"), ("file", ".arrow"), ("A", ".PARQUET")]
)
def test_tables_are_read_row_by_row(tmp_path, name, suffix):
    columns = {
        "prompt": [f"{n}?" for n in range(2000)],
        "completion": [f" {n}" for n in range(2000)],
        "id": [*range(2000)],
    }
    path = write(tmp_path / name, columns, suffix.lower())
    read = read_rows(path)
    assert len(read.rows) == check_rows(path).num_rows == 2000
    assert read.rows[1234] == CompletionRow(f"{path}, row 1235", "1234?", " 1234")


def test_dialogues_and_nulls_are_absent_keys(tmp_path):
    with_name = [{**turn, "name": None} for turn in CHAT]
    path = write(tmp_path / "a", {"messages": [CHAT, with_name, CHAT]})
    assert [row.messages for row in read_rows(path).rows] == [
        (Message("user", "2 + 2?"), Message("assistant", "4"))
    ] * 3
    assert read_prompts(path)[0].answer == "4"


def test_bad_rows_are_named_by_their_number(tmp_path):
    texts = ["a", None, " ", "b"]
    path = write(tmp_path / "a", {"text": texts})
    found = read_rows(path, skip_bad_rows=True)
    assert [row.source for row in found.rows] == [f"{path}, row 1", f"{path}, row 4"]
    assert [line.split(": ")[0] for line in found.bad] == [f"{path}, row 2", f"{path}, row 3"]
    assert "'text' is blank" in found.bad[1]
    with pytest.raises(DataError, match="2 of 4 rows"):
        read_rows(path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"txt": ["a"]}, "row 1: columns: .*unknown key 'txt'; nearest: 'text'"),
        ({"text": ["a"], "category": ["b"]}, "unknown key 'category'"),
        ({"text": [1]}, "'text' must be a string, is a number"),
        ({"text": [b"a"]}, "'text' must be a string, is bytes"),
        ({"messages": ["a"]}, "'messages' must be a list"),
    ],
)
def test_columns_that_are_no_rows(tmp_path, columns, message):
    with pytest.raises(DataError, match=message):
        read_rows(write(tmp_path / "a", columns))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_what_is_no_table_or_breaks_off(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="cannot be read as a table"):
        read_rows(str(path))
    whole = Path(write(tmp_path / "stream", {"text": [f"row {n}" for n in range(3000)]}, suffix)).read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + (whole[-8:] if suffix == ".parquet" else b""))
    with pytest.raises(DataError, match="table"):
        read_rows(str(path))


def test_a_datasets_folder_is_its_files_in_their_order(tmp_path):
    path = save_folder(tmp_path / "set", [["a", "b"], ["c"]])
    read, checked = read_rows(path), check_rows(path)
    assert [row.prompt for row in read.rows] == ["a", "b", "c"]
    assert read.rows[2].source == f"{path}/data-00001-of-00002.arrow, row 1"
    assert checked.num_rows == 3
    assert checked.digest != check_rows(save_folder(tmp_path / "other", [["a"], ["b", "c"]])).digest


def test_a_datasets_folder_that_the_library_wrote(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{"messages": CHAT}] * 5)
    one.save_to_disk(str(tmp_path / "one"), num_shards=2)
    turns = (Message("user", "2 + 2?"), Message("assistant", "4"))
    assert [row.messages for row in read_rows(str(tmp_path / "one")).rows] == [turns] * 5
    assert isinstance(read_rows(str(tmp_path / "one")).rows[0], ChatRow)
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DataError, match=r"several splits; name one of them: .*both/train, .*both/test"):
        read_rows(str(tmp_path / "both"))
    assert len(read_rows(str(tmp_path / "both" / "train")).rows) == 5


@pytest.mark.parametrize("state", ["{", "[]", '{"_data_files": [{"filename": "../a.arrow"}]}', '{"_data_files": 3}'])
def test_a_folder_that_says_nothing_sensible(tmp_path, state):
    folder = tmp_path / "set"
    save_folder(folder, [["a"]])
    (folder / "state.json").write_text(state)
    with pytest.raises(DataError, match=r"state\.json"):
        read_rows(str(folder))


def test_a_file_of_the_folder_is_missing(tmp_path):
    save_folder(tmp_path / "set", [["a"], ["b"]])
    (tmp_path / "set" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match="1 of 2 files are missing"):
        read_rows(str(tmp_path / "set"))


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a", {"text": ["a"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'veneer\[rows\]'"):
        read_rows(path)
