import datetime
import json
import sys

import pytest
from babel.dates import format_date

from veneer.data.rows import read_rows
from veneer.demo.dates import FORMATS, INSTRUCTION, LOCALES, date_rows, to_jsonl
from veneer.errors import ConfigError, MissingDependencyError


@pytest.fixture(scope="module")
def task():
    return date_rows(seed=0, num_train=2000, num_eval=200)


def parts(rows):
    return [[message["content"] for message in row["messages"]] for row in rows]


def test_shape(task):
    assert (len(task.train), len(task.eval)) == (2000, 200)
    for row in task.train + task.eval:
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert row["messages"][0]["content"] == INSTRUCTION


def test_same_seed_same_rows(task):
    assert date_rows(seed=0, num_train=2000, num_eval=200) == task
    assert date_rows(seed=1, num_train=2000, num_eval=200).eval != task.eval


def test_evaluation_rows_do_not_depend_on_the_number_of_training_rows(task):
    fewer = date_rows(seed=0, num_train=100, num_eval=200)
    assert fewer.eval == task.eval
    assert fewer.train == task.train[:100]


def test_nothing_is_shared(task):
    rows = parts(task.train + task.eval)
    assert len({written for _, written, _ in rows}) == len(rows)
    assert len({iso for _, _, iso in rows}) == len(rows)


def test_every_answer_is_the_date_that_was_written(task):
    seen = set()
    for _, written, iso in parts(task.train + task.eval):
        day = datetime.date.fromisoformat(iso)
        assert datetime.date(1950, 1, 1) <= day <= datetime.date(2049, 12, 31)
        styles = {(locale, form) for locale in LOCALES for form in FORMATS if format_date(day, form, locale) == written}
        assert styles
        seen |= styles
    assert len(seen) == len(LOCALES) * len(FORMATS)


def test_dates_are_spread_evenly(task):
    days = [datetime.date.fromisoformat(iso) for _, _, iso in parts(task.train + task.eval)]
    decades = [sum(day.year // 10 == decade for day in days) for decade in range(195, 205)]
    assert min(decades) > 150
    assert max(decades) < 290


def test_ambiguous_forms_are_dropped():
    # es_PR writes 03/05/2024 for 5 March, pt_PT for 3 May; neither may be used, 13/05 and 05/05 may.
    first = datetime.date(2020, 1, 1)
    meanings = {}
    for day in (first + datetime.timedelta(n) for n in range(366)):
        for locale in ("es_PR", "pt_PT"):
            for form in FORMATS:
                meanings.setdefault(format_date(day, form, locale), set()).add(day)
    ambiguous = {written[:6] for written, days in meanings.items() if len(days) > 1}
    assert len(ambiguous) == 132  # 12 * 12 - 12

    task = date_rows(seed=3, num_train=6000, num_eval=100, locales=["es_PR", "pt_PT"])
    written = [text for _, text, _ in parts(task.train + task.eval) if text[2:3] == "/"]
    assert len(written) > 500
    assert not [text for text in written if text[:6] in ambiguous]


def test_all_dates_can_be_drawn_but_not_one_more():
    task = date_rows(seed=0, num_train=36524, num_eval=1, locales=["sv"])
    assert len({iso for _, _, iso in parts(task.train + task.eval)}) == 36525
    with pytest.raises(ConfigError, match=r"36525 \+ 1 rows, but 1950 to 2049 has only 36525 dates"):
        date_rows(seed=0, num_train=36525, num_eval=1)


def test_wrong_settings_are_listed_together():
    with pytest.raises(ConfigError, match="locale 'pt-BR' is not in CLDR; nearest: 'pt_BR'") as caught:
        date_rows(seed=-1, num_train=-1, num_eval=1, locales=["pt-BR", "de"])
    assert len(caught.value.problems) == 3
    with pytest.raises(ConfigError, match="at least one name"):
        date_rows(seed=0, num_train=1, num_eval=1, locales=[])
    with pytest.raises(ConfigError, match="is 'de'"):
        date_rows(seed=0, num_train=1, num_eval=1, locales="de")


def test_instruction():
    task = date_rows(seed=0, num_train=0, num_eval=1, locales=["de"], instruction="ISO, please.")
    assert parts(task.eval)[0][0] == "ISO, please."
    assert task.train == ()


def test_json_lines_are_rows(task, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(to_jsonl(task.train), encoding="utf-8")
    rows = read_rows(str(path)).rows
    assert [[one.content for one in row.messages] for row in rows] == parts(task.train)
    assert [json.loads(line) for line in to_jsonl(task.eval).splitlines()] == list(task.eval)


def test_without_babel(monkeypatch):
    monkeypatch.setitem(sys.modules, "babel", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'veneer\[demo\]'"):
        date_rows(seed=0, num_train=1, num_eval=1)
