"""studies.gpu in its tiny form: every piece of every part runs, and each leaves its line."""

import json

import pytest

from studies import gpu


@pytest.mark.parametrize("part", [1, 2, 3])
def test_every_piece_of_a_part_runs(part, tmp_path):
    config = gpu.Config(part=part, tiny=True, work=str(tmp_path), to=str(tmp_path))
    gpu.main(config)
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    figures = {line["piece"]: line for line in lines}
    assert list(figures) == ["machine", *gpu.pieces_of(config)]
    failed = {name: line["failed"] for name, line in figures.items() if "failed" in line}
    assert not failed
    for name, line in figures.items():
        if line.get("tokens"):
            assert line["seconds"] > 0, name
    if part == 2:
        assert figures["dual, tiny"]["last line of the log"]["step"] == 2
        assert "tokens/s" in figures["collect, tiny"]["summary"]
        assert figures["answers, tiny"]["tokens/s"] > 0


def test_a_piece_that_fails_or_takes_too_long_is_recorded_and_costs_no_other():
    def parse(text):
        return {"printed": text.strip()}

    assert gpu.run_piece(["-c", "print(3)"], parse, 60)["printed"] == "3"
    assert "ZeroDivisionError" in gpu.run_piece(["-c", "1 / 0"], parse, 60)["failed"]
    assert "not done after" in gpu.run_piece(["-c", "while True: pass"], parse, 0.5)["failed"]
    cut_off = "import time; print('{\"ms\": 1}', flush=True); time.sleep(60)"
    assert gpu.run_piece(["-c", cut_off], parse, 5)["rows"] == [{"ms": 1}]
    broken = gpu.run_piece(["-c", "print(3)"], lambda text: [][0], 60)
    assert broken["failed"].startswith("IndexError")
