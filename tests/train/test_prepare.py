"""Rows of a run: what is counted, what is said, how it is stopped."""

import json
import logging

import pytest
from tests.conftest import tiny_tokenizer

from veneer.config import DataConfig
from veneer.train.prepare import prepare_data, read_data


def write(path, answers):
    turns = [[("user", f"{n}?"), ("assistant", f"{n}{answer}")] for n, answer in answers]
    rows = [{"messages": [{"role": role, "content": content} for role, content in one]} for one in turns]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_duplicates_overlap_and_lost_rows_are_counted_and_said(tmp_path, caplog):
    config = DataConfig(
        train=write(tmp_path / "train.jsonl", [(1, "a"), (2, "b"), (1, "a"), (3, "c" * 600), (4, "d")]),
        eval=write(tmp_path / "eval.jsonl", [(4, "d"), (5, "e")]),
        skip_bad_rows=True,
    )
    read = read_data(config)
    with caplog.at_level(logging.INFO, logger="veneer"):
        data = prepare_data(config, read, tiny_tokenizer(), 300)
    facts = data.facts
    assert facts.duplicates == {"train": 1, "eval": 0}
    assert (facts.overlap, facts.lost, facts.compared, facts.unequal) == (1, 1, 7, ())
    assert (len(data.train), len(data.eval), len(data.bad)) == (4, 2, 1)
    assert "train.jsonl:4: " in data.bad[0]
    for line in (
        "1 train rows are duplicates of earlier ones",
        "1 eval rows stand among the training rows too",
        "1 of the rows left out had no supervised token left",
        "in all 7 chats the ids before each answer are those that asking gives",
    ):
        assert line in caplog.text
        assert line in facts.lines


@pytest.mark.parametrize("phase", ["checking", "encoding"])
def test_a_stop_ends_the_preparation(tmp_path, phase):
    config = DataConfig(train=write(tmp_path / "train.jsonl", [(n, "a") for n in range(2000)]))

    def stop():
        raise TimeoutError

    read = None if phase == "checking" else read_data(config)
    with pytest.raises(TimeoutError):
        read_data(config, check=stop) if read is None else prepare_data(config, read, tiny_tokenizer(), 300, check=stop)
