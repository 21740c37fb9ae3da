"""Loading, blocks, hidden states and log-probabilities, on random models of several families."""

import importlib
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import (
    CPU,
    ROOT,
    go,
    logits_of,
    make_model,
    random_adapter,
    saved_bytes,
    some_batch,
    stage1_source,
)
from transformers import AutoConfig, AutoTokenizer

import collect
import dual
import evaluate
import scit
from common import hf
from common.config import UserError
from common.data import collate
from common.stages import read_stage
from lora import save_adapter

# ---------------------------------------------------------------- blocks and hidden states


def test_hidden_states_are_those_of_transformers(model):
    batch = some_batch()
    with torch.no_grad():
        output = model.base_model(
            input_ids=batch.ids, attention_mask=batch.attention.long(), output_hidden_states=True
        )
        states = hf.hidden_states(model.base_model, [0, 1, 2], batch.ids)
    for layer, state in enumerate(states):
        # hidden_states[l] is the input of block l, so the output of block l - 1
        expected = output.hidden_states[layer + 1][batch.attention]
        # within rounding: transformers' run has a mask for the padding, ours has none
        torch.testing.assert_close(state[batch.attention], expected, rtol=1e-4, atol=1e-5)


def test_a_cut_model_has_the_hidden_states_of_the_whole(model, tmp_path):
    """... and nothing of the blocks above, whose weights are not read."""
    model.save_pretrained(tmp_path)
    batch = some_batch()
    trunk = hf.load_trunk(str(tmp_path), 3, "float32", "cpu")
    with torch.no_grad():
        whole = hf.hidden_states(model.base_model, [1, 2], batch.ids)
        cut = hf.hidden_states(trunk, [1, 2], batch.ids)
    for one, other in zip(whole, cut):
        assert torch.equal(one, other)
    path, blocks = hf.find_blocks(trunk)
    assert len(blocks) == 3
    assert not any(f"{path}.3." in name for name, _ in trunk.named_modules())
    assert trunk.get_output_embeddings() is None


@pytest.mark.parametrize(
    "layers, n_blocks, expected",
    [
        (None, 1, [0]),
        (None, 6, [0, 1, 2, 3, 4, 5]),
        (None, 32, [19, 23, 27, 31]),
        (None, 12, [6, 7, 8, 9, 10, 11]),
        (["middle"], 32, [10, 12, 14, 16, 18, 20]),
        (["-1", "0", "3"], 4, [0, 3]),
        (["middle"], 6, [2, 3]),
        (["middle"], 5, [1, 2]),
        (["middle"], 1, [0]),
        (["last"], 6, [4, 5]),
        (["last"], 32, [21, 23, 25, 27, 29, 31]),
        (["last"], 1, [0]),
        (["all"], 14, list(range(14))),
        (["middle", "-1"], 6, [2, 3, 5]),
    ],
)
def test_layers_are_counted_from_0_and_from_the_top(layers, n_blocks, expected):
    assert hf.choose_layers(layers, n_blocks) == expected


@pytest.mark.parametrize("layer", ["4", "-5", "top", "1.5"])
def test_layers_that_do_not_exist_are_refused(layer):
    with pytest.raises(UserError, match="0 to 3"):
        hf.choose_layers([layer], 4)


# ---------------------------------------------------------------- log-probabilities


def test_log_probabilities_of_five_tokens_by_hand():
    """p, q | r1 r2 r3: P = mean of log softmax of the logits one position earlier."""
    model = make_model("llama")
    ids = [10, 20, 30, 40, 50]
    batch = collate([(ids, 2)], pad_id=1)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        logprobs, mask = hf.response_logprobs(model, batch)
    expected = []
    for t in (2, 3, 4):
        row = logits[t - 1].tolist()
        expected.append(row[ids[t]] - math.log(sum(math.exp(x) for x in row)))
    assert mask.tolist() == [[False, True, True, True]]
    assert logprobs[0].tolist() == pytest.approx([0, *expected], abs=1e-5)
    assert hf.token_mean(logprobs, mask).item() == pytest.approx(sum(expected) / 3, abs=1e-5)


def test_log_probabilities_are_the_models_own_for_every_family(model):
    """Whatever a family does to its logits after the head (Gemma 2 caps them) still happens."""
    batch = some_batch()
    with torch.no_grad():
        output = model(input_ids=batch.ids, attention_mask=batch.attention.long())
        logprobs, mask = hf.response_logprobs(model, batch)
    all_logprobs = output.logits[:, :-1].log_softmax(-1)  # [B, S-1, V]
    expected = all_logprobs.gather(2, batch.ids[:, 1:, None])[..., 0]
    assert torch.allclose(logprobs[mask], expected[mask], atol=1e-5)
    assert (logprobs[~mask] == 0).all()


def test_logits_in_chunks_change_nothing_but_the_memory(model, monkeypatch):
    """Log-probabilities and an adapter's gradients with the logits of three positions at a time;
    no tensor of all logits is kept."""
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(2, 800, (20 - 3 * i,), generator=generator) for i in range(6)]
    batch = collate([(ids.tolist(), 2) for ids in sequences], pad_id=1)
    adapter = random_adapter(model.requires_grad_(False))

    def logprobs_and_gradients(max_logits):
        monkeypatch.setattr(hf, "MAX_LOGITS", max_logits)
        with saved_bytes() as kept:
            logprobs, mask = hf.response_logprobs(model, batch)
        gradients = torch.autograd.grad(logprobs.square().sum(), list(adapter.parameters()))
        return logprobs.detach(), gradients, max(kept), mask

    logprobs, gradients, largest, mask = logprobs_and_gradients(2**26)
    in_chunks, gradients_in_chunks, largest_in_chunks, _ = logprobs_and_gradients(3 * 800)
    assert torch.allclose(logprobs, in_chunks, atol=1e-5)
    for one, other in zip(gradients, gradients_in_chunks):
        assert (one - other).abs().max() <= 1e-4 * one.abs().max()
    assert largest == mask.sum() * 800 * 4
    assert largest_in_chunks < largest / 2


def test_padding_changes_no_log_probability(model):
    batch = some_batch()
    examples = [(ids[real].tolist(), 2) for ids, real in zip(batch.ids, batch.attention)]
    wide = collate([*examples, ([7] * 30, 2)], pad_id=1)
    with torch.no_grad():
        narrow_P = hf.token_mean(*hf.response_logprobs(model, batch))
        wide_P = hf.token_mean(*hf.response_logprobs(model, wide))
    assert torch.allclose(narrow_P, wide_P[:3], atol=1e-5)


# ---------------------------------------------------------------- loading


def test_digest_tells_models_apart(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_model("llama", seed).save_pretrained(tmp_path / name)
    changed = make_model("llama")
    with torch.no_grad():
        changed.model.layers[3].mlp.down_proj.weight[0, 0] += 1e-3
    changed.save_pretrained(tmp_path / "d")
    a, b, c, d = (hf.model_digest(str(tmp_path / name)) for name in "abcd")
    assert a == b
    assert len({a, c, d}) == 3


def test_unknown_targets_are_refused(model):
    message = "--lora-targets no_such_proj: no such linear in .* whose blocks have"
    with pytest.raises(UserError, match=message):
        hf.find_linears(model.base_model, "no_such_proj")


def test_unknown_models_are_refused():
    with pytest.raises(UserError, match="no such folder"):
        hf.load_model("./no/such/model", "float32", "cpu")


def test_weights_without_a_head_are_refused(tmp_path):
    """A trunk saved by itself: the head would be random numbers."""
    make_model("gpt_neox").base_model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lacks .*not a complete causal language model"):
        hf.load_model(str(tmp_path), "float32", torch.device("cpu"))
    trunk = hf.load_trunk(str(tmp_path), 1, "float32", torch.device("cpu"))
    assert len(hf.find_blocks(trunk)[1]) == 1


def test_an_adapter_beside_full_weights_is_not_added(tmp_path, capsys):
    """... with peft installed: the logits are those of the weights alone. A note says so."""
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    batch = some_batch()
    expected = logits_of(model, batch)
    adapter = random_adapter(model)
    save_adapter(tmp_path, adapter.weights(), model.base_model, str(tmp_path))
    loaded = hf.load_model(str(tmp_path), "float32", torch.device("cpu"))
    assert torch.equal(logits_of(loaded, batch), expected)
    assert "its adapter_config.json is not read" in capsys.readouterr().out
    trunk = hf.load_trunk(str(tmp_path), 2, "float32", torch.device("cpu"))
    assert not [name for name, _ in trunk.named_parameters() if "lora" in name]


def edit_config(folder, **changes):
    """Change the config.json of a model folder."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def source(tiny, tmp_path):
    """A copy of the tiny model and its pairs, to be spoiled: a folder."""
    shutil.copytree(tiny, tmp_path / "source")
    return tmp_path / "source"


def test_a_quantized_model_is_refused(source, refused, tmp_path):
    edit_config(source / "model", quantization_config={"quant_method": "bitsandbytes"})
    args = [*stage1_source(source, tmp_path / "out"), *CPU]
    refused(dual, *args, words=["is quantized", "original weights"])


def test_a_model_of_another_kind_is_refused(source, refused, tmp_path):
    for kind in ("musicgen", "canine"):
        AutoConfig.for_model(kind).save_pretrained(source / "model")
        args = [*stage1_source(source, tmp_path / "out"), *CPU]
        refused(dual, *args, words=["--model"])


def test_a_full_gpu_or_disk_is_no_bad_input(tmp_path):
    def full_gpu():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def full_disk():
        raise OSError(28, "No space left on device")

    with pytest.raises(torch.OutOfMemoryError):
        hf.try_or_refuse("read its weights", "x", full_gpu)
    with pytest.raises(OSError, match="No space"):
        hf.try_or_refuse("read its weights", "x", full_disk)


def test_ids_without_an_embedding_are_refused_before_training(source, refused, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(source / "model")
    tokenizer.add_tokens(["fool"])
    tokenizer.save_pretrained(source / "model")
    args = [*stage1_source(source, tmp_path / "out"), *CPU]
    refused(scit, *args, words=["has written the id 800", "embeddings for 800 ids"])


def test_a_padding_token_without_an_embedding_is_replaced(source, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(source / "model")
    tokenizer.pad_token = "<|other pad|>"
    tokenizer.add_special_tokens({"pad_token": "<|other pad|>"})
    tokenizer.save_pretrained(source / "model")
    assert tokenizer.pad_token_id == 800
    loaded = hf.load_tokenizer(str(source / "model"))
    assert loaded.pad_token_id == loaded.eos_token_id
    go(dual, *stage1_source(source, tmp_path / "out"), "--steps", "1", *CPU)


def test_no_input_is_longer_than_the_context(done, tmp_path, refused):
    """--max-length is lowered to it, in every stage that reads pairs; a --prompt is refused."""
    shutil.copytree(done, tmp_path / "out")
    out = ["--out", tmp_path / "out"]
    options = [*out, "--method", "dual", "--layers", "1", "--max-length", "5000", *CPU]
    go(collect, *options)
    manifest = read_stage(tmp_path / "out" / "dual" / "collect", "collect", "")
    assert manifest["settings"]["max_length"] == 128
    short = ["--limit", "2", "--max-new-tokens", "2", "--max-length", "5000", *CPU]
    go(evaluate, *out, *short)
    report = json.loads((tmp_path / "out" / "evaluate" / "report.json").read_text())
    assert report["settings"]["max_length"] == 128
    words = ["--prompt", "no room for an answer in the model's 128"]
    refused(evaluate, *out, "--prompt", "word " * 300, *CPU, words=words)


def test_code_from_a_model_folder_is_never_run(source, refused, tmp_path, monkeypatch):
    """Whatever stands on standard input: it is not asked."""

    def asked(*args):
        raise AssertionError("a question on standard input")

    monkeypatch.setattr("builtins.input", asked)
    (source / "model" / "code.py").write_text("open('trace', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    edit_config(source / "model", model_type="somebody_elses", auto_map=code)
    args = [*stage1_source(source, tmp_path / "out"), *CPU]
    refused(dual, *args, words=["--model", "cannot read its config"])
    assert not (tmp_path / "trace").exists()


def test_no_name_of_ours_hides_a_package_from_the_libraries():
    """Scripts begin the search for modules in this folder, where the libraries would find ours."""
    ours = [path.stem for path in ROOT.glob("*.py")]
    ours += [path.parent.name for path in ROOT.glob("*/__init__.py")]
    assert {"align", "common", "kernel"} <= set(ours)
    imports = re.compile(rf"^\s*(?:from|import) ({'|'.join(ours)})(?:\.| import|$)", re.MULTILINE)
    for library in ("transformers", "peft", "bitsandbytes", "accelerate", "safetensors"):
        folder = Path(importlib.util.find_spec(library).origin).parent
        for path in folder.rglob("*.py"):
            # its scripts for tests take a package named as our evaluate.py
            if "test_utils" not in path.parts:
                found = imports.search(path.read_text(encoding="utf-8"))
                assert not found, f"{path} imports {found[1]}"
