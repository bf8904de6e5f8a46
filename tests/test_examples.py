"""The examples run as they are written."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_linear_regression(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "linear_regression.py"), run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    losses = {row[0]: float(row[2]) for row in rows}
    assert losses["1"] > losses["2"] > losses["3"] > 20 * losses["4"], "the shift has rank 4"
    assert losses["4"] < 1.1 * losses["full"]
    assert [row[1] for row in rows][:2] == ["64", "128"]
    assert (tmp_path / "linear_regression.png").stat().st_size > 10_000


def test_the_example_is_short():
    assert len((EXAMPLES / "linear_regression.py").read_text().splitlines()) < 60
