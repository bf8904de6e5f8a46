"""Memory that really does not suffice: the system refuses, the step is cut, the run comes to its end.

The limit is on address space, which what a failed attempt leaves in the heap may use up in pieces: some of these runs
end with the error that says so, and go on where there is more.
"""

import json

import pytest

MEGABYTE = 1 << 20


@pytest.fixture
def long_rows(make_chain, tmp_path):
    """Makes chains over rows of 450 tokens, all of a step in one micro-batch."""

    def make(name: str):
        chain = make_chain("lora, dropout, accumulation", name, tokens_per_step=30000, tokens_per_micro_batch=30000)
        rows = [{"prompt": f"{number} " * 80, "completion": " word" * 25} for number in range(100, 160)]
        path = tmp_path / "long.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = json.loads(chain.run_file.read_text())
        chain.run_file.write_text(json.dumps({**settings, "data": {"train": str(path)}}))
        return chain

    return make


@pytest.mark.torture
def test_a_run_short_of_memory_cuts_its_steps_and_ends(long_rows):
    whole = long_rows("whole")
    whole.finish()
    cut = finished = 0
    for margin in range(56, 156, 5):
        chain = long_rows(f"chain-{margin}")
        ended = chain.go(memory=margin * MEGABYTE)
        said = chain.log.read_text()
        if ended.code == 0:
            finished += 1
        else:
            assert ended.code == 1, said[-3000:]
            assert "and it cannot be cut" in said or "memory does not suffice" in said, said[-3000:]
            chain.finish()
        for line, other in zip(chain.metrics(), whole.metrics(), strict=True):
            cut += "cut_to_tokens" in line
            for name in ("step", "epoch", "learning_rate", "tokens", "supervised_tokens"):
                assert line[name] == other[name]
            assert line["loss"] == pytest.approx(other["loss"], rel=0.05)  # other inputs are dropped
    print(f"20 limits, {finished} runs finished, {cut} steps cut")
    assert cut >= 10
