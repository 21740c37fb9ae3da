"""The pictures of tools.survey and tools.sweep: what is in them, and what is refused."""

import pytest
from helpers import HERE, go, stage1_source

import collect
import dual
from tools import plots, survey, sweep

pyplot = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture
def drawn(monkeypatch):
    """The lines of each panel that is drawn: [{label: (x, y)}]."""
    panels = []
    close = pyplot.close

    def read(figure):
        for axis in figure.axes:
            lines = {str(line.get_label()): line.get_data() for line in axis.lines}
            panels.append({name: tuple(map(list, data)) for name, data in lines.items()})
        close(figure)

    monkeypatch.setattr(pyplot, "close", read)
    return panels


def test_the_picture_of_a_survey(drawn, tmp_path):
    blocks = [
        {"layer": 0, "nll": [2.0, 1.9], "ratio": 0.1},
        {"layer": 1, "nll": [1.8, 2.5], "ratio": 0.3},
    ]
    plots.plot_survey(tmp_path / "a.png", blocks, (0.1, 0.4), 2.1)
    nll, ratio = drawn
    assert nll["ρ 0.1"] == ([0, 1], [2.0, 1.8]) and nll["ρ 0.4"] == ([0, 1], [1.9, 2.5])
    assert nll["nothing moved"][1] == [2.1, 2.1]
    assert list(ratio.values()) == [([0, 1], [0.1, 0.3])]
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_the_picture_of_a_sweep(drawn, tmp_path):
    reports = {
        "base": {"kl_to_base": 0.0, "judge_sampled": 0.4},
        "kl_4": {"kl_to_base": 4.2, "judge_sampled": 0.8},
        "kl_2": {"kl_to_base": 1.9, "judge_sampled": 0.6},
    }
    plots.plot_sweep(tmp_path / "a.svg", reports, ["judge"], "kl_4")
    [panel] = drawn
    assert list(panel.values()) == [([0.0, 1.9, 4.2], [0.4, 0.6, 0.8])]


def test_the_tools_draw_them(tiny, tmp_path):
    go(dual, *stage1_source(tiny, tmp_path), "--steps", "10", "--lr", "2e-2", *HERE)
    pictures = [tmp_path / "survey.png", tmp_path / "sweep.png"]
    few = ["--train-pairs", "4", "--valid-pairs", "4", "--plot", pictures[0]]
    go(survey, "--out", tmp_path, *few, *HERE)
    go(collect, "--out", tmp_path, "--layers", "1", "--limit", "8", *HERE)
    quick = ["--strength", "0.1", "0.3", "--steps", "2", "--max-new-tokens", "2"]
    go(sweep, "--out", tmp_path, *quick, "--plot", pictures[1], *HERE)
    assert all(path.stat().st_size > 5000 for path in pictures)


def test_what_cannot_be_drawn_is_refused_at_the_start(tmp_path, fails, monkeypatch):
    for path, words in (("a.txt", "must end in .png"), ("no/such/a.png", "no such folder")):
        code, lines = fails(survey, "--out", tmp_path, "--plot", path, *HERE)
        assert code == 2 and words in lines[0]
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    code, lines = fails(sweep, "--out", tmp_path, "--kl", "1", "--plot", "a.png", *HERE)
    assert code == 2 and "pip install matplotlib" in lines[0]
