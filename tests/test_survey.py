"""The survey: its measurements one example at a time, and what it recommends, by hand."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from helpers import HERE, go, logits_of, random_adapter, some_batch, stage1_source

import collect
import dual
import scit
from common.config import UserError
from common.data import prepare_pairs, sample
from common.hf import hidden_states, load_model, load_tokenizer
from common.stages import read_stage
from lora import LoRA, enable_only, load_adapter
from tools import survey


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_states_moved_onto_those_of_an_adapter_give_its_answer(model, layer):
    """The survey's ground: the base model says what an adapted model says, where its states in the
    adapter's highest block are moved to the adapted ones."""
    batch = some_batch()
    with torch.no_grad():
        [before] = hidden_states(model.base_model, [layer], batch.ids)
    base = logits_of(model, batch)
    adapter = random_adapter(model, blocks=layer + 1)
    with torch.no_grad():
        [after] = hidden_states(model.base_model, [layer], batch.ids)
    adapted = logits_of(model, batch)
    adapter.enabled = False
    shift = (after - before)[batch.attention]
    with survey.moved_states(model.base_model, layer, batch.attention, shift):
        moved = logits_of(model, batch)
    assert torch.allclose(moved, adapted, atol=1e-4)
    assert not torch.allclose(base, adapted, atol=1e-2)
    assert torch.equal(logits_of(model, batch), base)


class Reference:
    """What the survey measures, one unpadded example at a time and in float64, on the model and
    the adapters that stage 1 wrote."""

    def __init__(self, folder, method, last_prompt_token):
        self.method = method
        self.last_prompt_token = last_prompt_token
        kinds = {"adapter": "scit"} if method == "scit" else {"good": "good", "bad": "bad"}
        for name, kind in kinds.items():
            settings = read_stage(folder / method / name, kind, "")["settings"]
        tokenizer = load_tokenizer(settings["model"])
        splits = ("train", "valid")
        max_length, seed = settings["max_length"], settings["seed"]
        self.pairs = prepare_pairs(settings["data"], splits, tokenizer, max_length, seed)
        self.model = load_model(settings["model"], "float32", "cpu")
        self.adapters = []
        for name in kinds:
            weights = load_adapter(folder / method / name, self.model.base_model)
            self.adapters.append(LoRA(self.model.base_model, weights=weights).eval())
        # b is of the SCIT model, or of the original one
        self.base_adapters = self.adapters if method == "scit" else []

    @torch.no_grad()
    def states_under(self, pair, prompt, response, *enabled):
        """The recorded states of all 4 blocks, [4, T, D]."""
        ids, start = pair.input(prompt, response)
        with enable_only(enabled, among=self.adapters):
            hidden = hidden_states(self.model.base_model, range(4), torch.tensor([ids]))
        return torch.stack(hidden)[:, 0, start - self.last_prompt_token :].double()

    def states(self, pair, response):
        """b and v = h+ - h-, [4, T, D]."""
        positive, negative = ("positive", "negative") if self.method == "scit" else ("plain",) * 2
        base = self.states_under(pair, "plain", response, *self.base_adapters)
        plus = self.states_under(pair, positive, response, self.adapters[0])
        minus = self.states_under(pair, negative, response, self.adapters[-1])
        return base, plus - minus

    def states_of_split(self, split):
        """b and v of both responses of all pairs, [4, T, D]."""
        states = []
        for pair in self.pairs[split]:
            states += [self.states(pair, "chosen"), self.states(pair, "rejected")]
        base, v = zip(*states)
        return torch.cat(base, 1), torch.cat(v, 1)

    @torch.no_grad()
    def nll(self, pair, layer=None, shift=None):
        """The NLL of the chosen response, summed over its tokens, with the states of one block
        moved by shift [T, D]."""
        ids, start = pair.input("plain", "chosen")

        def move(module, args, output):
            output[0, start - self.last_prompt_token :] += shift.float()
            return output

        if layer is not None:
            hook = self.model.base_model.layers[layer].register_forward_hook(move)
        with enable_only(self.base_adapters, among=self.adapters):
            logprobs = self.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        if layer is not None:
            hook.remove()
        return -sum(logprobs[t - 1, ids[t]].item() for t in range(start, len(ids)))


@pytest.mark.parametrize(
    "method, options",
    [
        ("scit", ["--base", "stage1"]),
        ("dual", []),
        ("dual", ["--last-prompt-token", "False", "--tokens-per-pass", "150"]),
    ],
)
def test_measurements_one_example_at_a_time(method, options, tiny, tmp_path):
    stage1 = {"scit": scit, "dual": dual}[method]
    go(stage1, *stage1_source(tiny, tmp_path), "--steps", "10", "--lr", "2e-2", *HERE)
    go(survey, "--out", tmp_path, "--method", method, *options, *HERE)
    measured = json.loads((tmp_path / method / "survey.json").read_text())
    assert not (tmp_path / method / "collect").exists()

    reference = Reference(tmp_path, method, last_prompt_token="--last-prompt-token" not in options)
    base, v = reference.states_of_split("train")
    ratio = (v.norm(dim=2) / base.norm(dim=2)).mean(1)  # [4]
    mean_v = v.mean(1)  # [4, D]
    projections = {"chosen": [], "rejected": []}
    base_nll = tokens = 0
    nll = torch.zeros(4, len(survey.STRENGTHS), dtype=torch.double)
    for pair in reference.pairs["valid"]:
        for response in ("chosen", "rejected"):
            b, _ = reference.states(pair, response)
            projections[response].append((b * mean_v[:, None]).sum(2).mean(1))  # [4]
        _, v_chosen = reference.states(pair, "chosen")
        tokens += len(pair.responses["chosen"])
        base_nll += reference.nll(pair)
        for layer in range(4):
            for j, strength in enumerate(survey.STRENGTHS):
                shift = strength / ratio[layer] * v_chosen[layer]
                nll[layer, j] += reference.nll(pair, layer, shift)
    nll /= tokens

    assert measured["base_nll"] == pytest.approx(base_nll / tokens, rel=1e-5)
    chosen = torch.stack(projections["chosen"], 1)  # [4, n]
    rejected = torch.stack(projections["rejected"], 1)
    wins = (chosen[:, :, None] > rejected[:, None]).double().mean((1, 2))
    assert [block["layer"] for block in measured["blocks"]] == [0, 1, 2, 3]
    for layer, block in enumerate(measured["blocks"]):
        assert block["ratio"] == pytest.approx(ratio[layer].item(), rel=1e-4)
        assert block["nll"] == pytest.approx(nll[layer].tolist(), rel=1e-4)
        assert block["auc"] == pytest.approx(wins[layer].item(), abs=0.01)
        squares = torch.linalg.svdvals(v[layer]).square()
        shares = squares.cumsum(0) / squares.sum()
        assert block["shares"][:3] == pytest.approx(shares[:3].tolist(), rel=1e-3)


def test_the_printed_command_collects_what_was_surveyed(tiny, tmp_path):
    """Also where stage 1 or its embedded default says otherwise."""
    go(dual, *stage1_source(tiny, tmp_path), "--steps", "3", *HERE)
    rows = tmp_path / "other rows.jsonl"
    rows.write_text(Path(tiny / "pairs.jsonl").read_text())
    output = go(survey, "--out", tmp_path, "--base", "stage1", "--data", rows, *HERE)
    [command] = [line for line in output.splitlines() if "collect.py" in line]
    _, _, command = command.partition("collect.py ")
    go(collect, *shlex.split(command), *HERE)
    settings = read_stage(tmp_path / "dual" / "collect", "collect", "")["settings"]
    assert (settings["base"], settings["data"]) == ("stage1", [str(rows)])


# ---------------------------------------------------------------- recommending

# two of 32 directions hold 95%
SHARES = [0.5, 0.95, *[1.0] * 30]


def blocks_with(*nlls, shares=SHARES):
    """Measurements of blocks with these NLLs, one row per block, one value per strength."""
    return [
        {"layer": layer, "nll": list(nll), "shares": list(shares)} for layer, nll in enumerate(nlls)
    ]


def test_recommendation_by_hand():
    """Gains .1, .5, .4 and .2 over the base's 2.0: blocks 1 and 2 reach half of the best; ρ 0.25
    has their lowest sum."""
    blocks = blocks_with([1.9] * 5, [1.9, 1.6, 1.5, 1.7, 3], [1.95, 1.7, 1.65, 1.6, 3], [1.8] * 5)
    assert survey.recommend(blocks, 2.0) == ([1, 2], [0.15, 0.25, 0.4], 2, 2)


def test_a_recommendation_at_the_end_of_the_grid_has_one_neighbour():
    layers, strengths, _, _ = survey.recommend(blocks_with([1.9, 2, 3, 3, 3]), 2.0)
    assert (layers, strengths) == ([0], [0.1, 0.15])


def test_six_of_many_layers_are_recommended_with_the_highest_among_them():
    layers, _, _, _ = survey.recommend(blocks_with(*[[1.5] * 5] * 20), 2.0)
    assert layers == [0, 4, 8, 11, 15, 19]


def test_no_rank_is_recommended_where_many_directions_matter():
    shares = [i / 32 for i in range(1, 33)]
    _, _, rank, directions = survey.recommend(blocks_with([1.5] * 5, shares=shares), 2.0)
    assert (rank, directions) == (None, 29)


def test_where_no_move_helps_stage_1_is_to_be_trained_longer():
    with pytest.raises(UserError, match="train stage 1 longer"):
        survey.recommend(blocks_with([2.0] * 5, [2.1] * 5), 2.0)


def test_survey_where_h_plus_and_h_minus_are_equal(tiny, tmp_path, fails):
    go(dual, *stage1_source(tiny, tmp_path), "--steps", "1", "--lr", "0", *HERE)
    code, lines = fails(survey, "--out", tmp_path, *HERE)
    assert code == 2
    assert "h+ and h- must differ" in lines[-1]


def test_a_sample_is_spread_over_a_sorted_file():
    drawn = sample(list(range(1000)), 100, 0)
    assert len(set(drawn)) == 100
    assert 300 < sum(drawn) / 100 < 700
    assert drawn == sample(list(range(1000)), 100, 0)
    assert drawn != sample(list(range(1000)), 100, 1)
