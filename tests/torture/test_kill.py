"""kill -9 at random instants, also within saves: what a run ends with is what it would have ended with.

200 chains without a failure bound the share of failing ones to 1.5 % at 95 % confidence.
"""

import json
import random
import time

import pytest

from tests.torture.conftest import RUNS

CHAINS = [20, pytest.param(200, marks=pytest.mark.torture)]


def same_as(chain, whole) -> None:
    assert chain.adapter() == whole.adapter()
    assert chain.metrics() == whole.metrics()
    chain.check_rows()


@pytest.mark.parametrize("count", CHAINS)
def test_killed_at_random_a_run_ends_with_the_same_bytes(make_chain, count, record_property):
    """Half of the kills come at an instant of the clock, half at an operation of the file system."""
    draw = random.Random(count)
    names = list(RUNS)[: 4 if count == 20 else None]
    wholes = {name: make_chain(name, f"whole-{place}") for place, name in enumerate(names)}
    seconds = {name: whole.finish().seconds for name, whole in wholes.items()}
    kills, start = [], time.monotonic()
    for number in range(count):
        name = names[number % len(names)]
        chain, of_chain = make_chain(name, f"chain-{number}"), 0
        for _ in range(draw.choice([1, 2, 3, 4])):
            after = draw.uniform(0.1, 1.0) * seconds[name]
            how = {"after": after} if draw.random() < 0.5 else {"operation": draw.randint(1, 300)}
            ended = chain.go(**how)
            assert ended.code in (0, -9), chain.log.read_text()[-3000:]
            if ended.code == 0:
                break
            of_chain += 1
        chain.finish()
        same_as(chain, wholes[name])
        kills.append(of_chain)
    often = sum(one >= 3 for one in kills)
    print(f"{count} chains, {sum(kills)} kills, {often} chains of 3 or more, {time.monotonic() - start:.0f} s")
    assert sum(kills) >= count, "too few kills hit: the test is blind"
    assert often >= count // 10


@pytest.mark.torture
def test_killed_at_every_file_operation_of_a_run_it_ends_with_the_same_bytes(make_chain):
    """Every operation of every save of one run, one after another: each chain is killed at the next one."""
    name = "lora, dropout, accumulation"
    whole = make_chain(name, "whole")
    whole.finish()
    operation = 0
    while True:
        operation += 1
        chain = make_chain(name, f"chain-{operation}")
        if chain.go(operation=operation).code == 0:
            break
        chain.finish()
        same_as(chain, whole)
    print(f"{operation - 1} operations")
    assert operation > 100


def test_the_trace_of_rows_would_show_a_row_that_is_missing_or_comes_twice(make_chain):
    """The test of the test."""
    chain = make_chain("one micro-batch, nothing drawn", "whole")
    chain.finish()
    chain.check_rows()
    lines = chain.trace.read_text().splitlines()
    number, rows = json.loads(lines[3])
    for damaged in (rows[1:], [*rows, rows[0]], [rows[0], *rows[:-1]]):
        chain.trace.write_text("\n".join([*lines[:3], json.dumps([number, damaged]), *lines[4:]]))
        with pytest.raises(AssertionError):
            chain.check_rows()
    chain.trace.write_text("\n".join([*lines, json.dumps([number, rows[::-1]])]))
    with pytest.raises(AssertionError, match="other rows when done again"):
        chain.check_rows()
