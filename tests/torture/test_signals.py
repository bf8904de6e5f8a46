"""SIGTERM and SIGINT in every phase of a run: it commits and leaves within ten seconds, and goes on exactly."""

import random
import signal

import pytest

from tests.torture.nursery import PHASES
from tests.torture.test_kill import same_as

RUN = "prefix on disk, freeze_A"
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.mark.parametrize("count", [11, pytest.param(55, marks=pytest.mark.torture)])
def test_a_signal_in_any_phase_commits_and_leaves_with_the_code_of_its_kind(make_chain, count):
    draw, slowest, before, finished = random.Random(count), 0.0, 0, 0
    whole = make_chain(RUN, "whole")
    whole.finish()
    for turn in range(count):
        phase = list(PHASES)[turn % len(PHASES)]
        number = draw.choice(list(CODES))
        chain = make_chain(RUN, f"chain-{turn}")
        call = {"step": draw.randint(1, 20), "evaluation": draw.randint(1, 4), "save": draw.randint(1, 5)}.get(phase, 1)
        sent = chain.out.parent / "sent"
        order = {"phase": phase, "call": call, "delay": draw.uniform(0, 0.02), "number": number, "marks": str(sent)}
        ended = chain.go(phase=order)
        said = chain.log.read_text()
        if ended.code == 0:  # the run was done before the signal came
            finished += 1
        else:
            took = ended.end - float(sent.read_text())
            slowest = max(slowest, took)
            assert (ended.code, took < 10) == (CODES[number], True), said
            assert f"stopped by {signal.Signals(number).name}" in said
            assert "Traceback" not in said
            assert ("go on with --resume" in said) == (chain.out / "plan.json").exists(), said
            before += not chain.out.exists()
        chain.finish()
        same_as(chain, whole)
    print(f"{count} signals: {before} before there was a folder, {finished} too late, slowest {slowest:.2f} s")
    assert finished <= count // 5


def test_the_second_signal_leaves_at_once(make_chain, tmp_path):
    """By what it did before the run: SIGTERM ends the process."""
    chain = make_chain(RUN, "chain")
    order = {"phase": "save", "call": 2, "delay": 0.0, "number": signal.SIGTERM, "marks": str(tmp_path / "sent")}
    twice = {**order, "times": 2}
    ended = chain.go(phase=twice)
    assert ended.code in (-signal.SIGTERM, 143)
    chain.finish()
