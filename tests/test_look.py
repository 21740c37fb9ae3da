"""The page of tools.look: its numbers, its texts, and what a browser makes of it."""

import html
import json
import math
import re
import shutil
import subprocess

import pytest
import torch
from helpers import HERE, go, stage1_source
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import dual
from common import hf
from common.answers import attached
from common.config import UserError
from common.data import prepare_pairs
from common.stages import read_stage
from lora import load_adapter
from tools import look

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

# What the page's script shows, read off the page before and after another layer is chosen.
PROBE = """
<script>
const read = () => ({
  colours: [...document.querySelectorAll("#chosen .token")].map((e) => e.style.backgroundColor),
  text: document.getElementById("chosen").textContent,
  legend: document.getElementById("legend").textContent,
  number: document.getElementById("number").textContent,
});
const found = [read()];
const shade = document.getElementById("shade");
for (let k = 1; k < shade.options.length; k++) {
  shade.selectedIndex = k;
  shade.dispatchEvent(new Event("change"));
  found.push(read());
}
document.getElementById("next").click();
found.push(read());
document.body.dataset.found = JSON.stringify(found);
document.body.dataset.scripts = String(document.scripts.length);
</script>
"""


def data_of(page):
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]
    return json.loads(text)


@pytest.fixture
def out(done, tmp_path):
    """A copy of a finished run of both methods."""
    for method in ("scit", "dual"):
        shutil.copytree(done / method, tmp_path / method)
    return tmp_path


@torch.no_grad()
def logps_of(model, pair, response, prompt):
    """log π of each token of a response, by one unpadded forward pass."""
    ids, start = pair.input(prompt, response)
    logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float()
    logps = logits.log_softmax(-1)
    return [logps[t - 1, ids[t]].item() for t in range(start, len(ids))]


@pytest.mark.parametrize("method", ["scit", "dual"])
def test_rewards_moves_and_answers_are_those_of_the_models(method, out, tokenizer):
    go(look, "--out", out, "--method", method, "--pairs", "3", "--max-new-tokens", "5", *HERE)
    data = data_of((out / method / "look.html").read_text(encoding="utf-8"))
    manifest = read_stage(out / method / "align", "align", "")
    settings = manifest["settings"]
    assert data["layers"] == settings["layers"]
    assert len(data["pairs"]) == 3
    pairs = prepare_pairs(settings["data"], ("test",), tokenizer, settings["max_length"], 0)["test"]
    shown = data["pairs"][0]
    [pair] = [p for p in pairs if p.pair.prompt[-1][1] == shown["prompt"][-1][1]][:1]
    model = hf.load_model(settings["model"], "float32", torch.device(HERE[1]))
    sides = {
        "scit": (("adapter", "positive"), ("adapter", "negative")),
        "dual": (("good", "plain"), ("bad", "plain")),
    }[method]
    for response in ("chosen", "rejected"):
        logps, states = [], []
        for folder, prompt in sides:
            weights = load_adapter(out / method / folder, model.base_model)
            with attached(model, weights):
                logps.append(logps_of(model, pair, response, prompt))
                ids, start = pair.input(prompt, response)
                ids = torch.tensor([ids], device=model.device)
                with torch.no_grad():
                    [h] = hf.hidden_states(model.base_model, [1], ids)
                states.append(h[0, start:])
        expected = [p - m for p, m in zip(*logps)]
        assert shown[response]["reward"] == pytest.approx(expected, abs=2e-3)
        base_weights = None
        if settings["base"] == "stage1":
            base_weights = load_adapter(out / method / sides[0][0], model.base_model)
        ids, start = pair.input("plain", response)
        with attached(model, base_weights), torch.no_grad():
            [b] = hf.hidden_states(model.base_model, [1], torch.tensor([ids], device=model.device))
        v = (states[0] - states[1]).norm(dim=-1) / b[0, start:].norm(dim=-1)
        scale = manifest["scale"] if settings["base"] == "original" else 1
        expected = (abs(manifest["alpha"] * scale) * v).tolist()
        assert shown[response]["moves"][0] == pytest.approx(expected, abs=2e-3)
        assert "".join(shown[response]["tokens"]) == tokenizer.decode(pair.responses[response])
    assert {"base", "aligned"} <= set(shown)


def test_tokens_keep_their_spaces_and_characters_are_whole():
    """Of a tokenizer that writes spaces as ▁, and bytes of what it does not know."""
    vocabulary = {"▁I": 0, "▁do": 1, "n't": 2, "<0xC3>": 3, "<0xA9>": 4, "<unk>": 5}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=words)
    assert look.token_texts(fast, [0, 1, 2, 3, 4]) == ["I", " do", "n't", "", "é"]


def browse(page_path, width, *arguments):
    """Headless Chromium on a page: (standard output, standard error)."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--window-size={width},1400", "--virtual-time-budget=5000", *arguments]
    done = subprocess.run(
        [*command, page_path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_it_without_an_error_and_texts_stay_texts(tmp_path):
    hostile = "</script><script>document.title='taken over'</script><img src=x onerror=alert(1)>"
    tokens = ["Yes", " &amp; ", hostile, "."]
    response = {
        "tokens": tokens,
        "reward": [0.5, -0.2, 1.5, 0.0],
        "moves": [[0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.0, 0.2]],
    }
    pair = {"prompt": [["user", hostile]], "chosen": response, "rejected": response}
    pair |= {"base": hostile, "aligned": ""}
    data = {"layers": [3, 7], "alpha": 2.0, "reward": "log π_good − log π_bad"}
    path = tmp_path / "look.html"
    look.write_page(path, "a title", {**data, "pairs": [pair, pair]})
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=.?(https?:)?//", page.replace(hostile, ""))
    probe = tmp_path / "probe.html"
    probe.write_text(page.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    dom, errors = browse(probe, 1200, "--dump-dom")
    assert "CONSOLE" not in errors, errors
    assert "<title>a title</title>" in dom
    found = json.loads(html.unescape(re.search(r'data-found="(.*?)"', dom)[1]))
    reward, first, second, after_next = found
    assert reward["text"] == "".join(tokens)
    # each way of shading has colours and a legend of its own
    assert len({tuple(view["colours"]) for view in (reward, first, second)}) == 3
    assert "nats a token" in reward["legend"] and "layer 7" in second["legend"]
    assert (reward["number"], after_next["number"]) == ("1 of 2", "2 of 2")
    # the data, the page's script and the probe
    assert 'data-scripts="3"' in dom
    assert "taken over" not in re.search("<title>(.*?)</title>", dom)[1]


def test_a_page_of_fifty_long_pairs_is_small(tmp_path):
    response = {"tokens": [" token"] * 100, "reward": [-0.123] * 100}
    response["moves"] = [[0.123] * 100] * 5
    pair = {"prompt": [["user", "x" * 400]], "chosen": response, "rejected": response}
    pair |= {"base": "y" * 400, "aligned": "z" * 400}
    path = tmp_path / "look.html"
    data = {"layers": [15, 19, 23, 27, 31], "alpha": 1.0, "reward": ""}
    look.write_page(path, "t", {**data, "pairs": [pair] * 50})
    assert path.stat().st_size < 2e6


def test_what_is_not_a_number_is_refused(tmp_path):
    with pytest.raises(UserError, match="NaN or infinite"):
        look.write_page(tmp_path / "look.html", "t", {"pairs": [math.nan]})
    assert not list(tmp_path.iterdir())


def test_look_after_a_new_stage_1_or_with_other_pairs_is_refused(out, tiny, fails):
    go(dual, *stage1_source(tiny, out), "--steps", "1", *HERE)
    code, lines = fails(look, "--out", out, "--method", "dual", *HERE)
    assert code == 2 and "python collect.py" in lines[0]


def test_look_without_an_aligned_adapter_names_the_command(tmp_path, fails):
    code, lines = fails(look, "--out", tmp_path, *HERE)
    assert code == 2
    assert "python align.py" in lines[-1]
