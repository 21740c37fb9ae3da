"""Loading, blocks, hidden states and log-probabilities, on random models of several families."""
import math

import pytest
import torch

import data
import model as M
from conftest import make_model
from files import UserError
from lora import LoRA


def filled(model, seed=0, **kwargs):
    """An adapter whose B is not zero."""
    torch.manual_seed(seed)
    adapter = LoRA(model.base_model, **kwargs).eval()
    with torch.no_grad():
        for B in adapter.B:
            B.normal_(std=0.05)
    return adapter


def some_batch(rows=3, seed=0, width=12):
    generator = torch.Generator().manual_seed(seed)
    return data.collate([(torch.randint(2, 800, (width - 3 * i,), generator=generator).tolist(), 2) for i in range(rows)], pad_id=1)


def test_hidden_states_are_the_models_own(model):
    batch = some_batch()
    with torch.no_grad():
        own = model.base_model(input_ids=batch.ids, attention_mask=batch.attention.long(), output_hidden_states=True).hidden_states
        states = M.hidden_states(model.base_model, [0, 1, 2], batch.ids)
    for layer, state in enumerate(states):     # hidden_states[l] is the input of block l, its last entry is after the norm
        # within rounding: the model's own run has a mask for the padding at the right, ours has none
        torch.testing.assert_close(state[batch.attention], own[layer + 1][batch.attention], rtol=1e-4, atol=1e-5)


def test_cut_model_equals_the_whole_at_the_targets(model, tmp_path):
    model.save_pretrained(tmp_path)
    batch = some_batch()
    cut = M.load_model(str(tmp_path), torch.float32, "cpu", blocks=3)
    ran = []
    for name, module in cut.named_modules():
        module.register_forward_hook(lambda m, a, o, name=name: ran.append(name))
    with torch.no_grad():
        whole, part = (M.hidden_states(trunk, [1, 2], batch.ids) for trunk in (model.base_model, cut))
    assert all(torch.equal(a, b) for a, b in zip(whole, part))
    path, blocks = M.find_blocks(cut)
    assert len(blocks) == 3 and cut.get_output_embeddings() is None
    owner = cut.get_submodule(path.rpartition(".")[0])               # no final norm is left to run
    after = [name for name, child in owner.named_children() if "norm" in name or name.startswith("ln_")]
    assert all(isinstance(getattr(owner, name), torch.nn.Identity) for name in after if "embed" not in name)


def test_layers_are_counted_from_0_and_from_the_top():
    assert M.pick_layers(None, 6) == [0, 1, 2, 3, 4, 5] and M.pick_layers(None, 32) == [10, 12, 14, 16, 18, 20]
    assert M.pick_layers(["middle"], 6) == [2, 3] and M.pick_layers(["middle"], 5) == [1, 2] and M.pick_layers(["middle"], 1) == [0]
    assert M.pick_layers(None, 1) == [0] and M.pick_layers(["-1", "0", "3"], 4) == [0, 3]
    assert M.pick_layers(["last"], 6) == [4, 5] and M.pick_layers(["last"], 32) == [21, 23, 25, 27, 29, 31] and M.pick_layers(["last"], 1) == [0]
    assert M.pick_layers(["all"], 14) == list(range(14)) and M.pick_layers(["middle", "-1"], 6) == [2, 3, 5]
    for layer in ("4", "-5", "top", "1.5"):
        with pytest.raises(UserError, match="0 to 3"):
            M.pick_layers([layer], 4)


def test_log_probabilities_of_five_tokens_by_hand():
    """p, q | r1 r2 r3: P = mean of log softmax of the logits one position earlier."""
    model, ids = make_model("llama"), [10, 20, 30, 40, 50]
    batch = data.collate([(ids, 2)], pad_id=1)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        logprobs, mask = M.response_logprobs(model, batch)
    by_hand = [logits[t - 1, ids[t]].item() - math.log(sum(math.exp(x) for x in logits[t - 1].tolist())) for t in (2, 3, 4)]
    assert mask.tolist() == [[False, True, True, True]]
    assert logprobs[0].tolist() == pytest.approx([0, *by_hand], abs=1e-5)
    assert M.token_mean(logprobs, mask).item() == pytest.approx(sum(by_hand) / 3, abs=1e-5)


def test_log_probabilities_are_the_models_own_for_every_family(model):
    """Whatever a family does to its logits after the head (Gemma 2 caps them) still happens."""
    batch = some_batch()
    with torch.no_grad():
        logits = model(input_ids=batch.ids, attention_mask=batch.attention.long()).logits
        logprobs, mask = M.response_logprobs(model, batch)
    whole = logits[:, :-1].log_softmax(-1).gather(2, batch.ids[:, 1:, None])[..., 0]
    assert torch.allclose(logprobs[mask], whole[mask], atol=1e-5) and (logprobs[~mask] == 0).all()


def test_logits_in_chunks_change_nothing_but_the_memory(model, monkeypatch):
    """Log-probabilities and an adapter's gradients with logits of three positions at a time; no tensor of all logits is kept."""
    batch, found = some_batch(rows=6, width=20), {}
    adapter = filled(model.requires_grad_(False))
    for limit in (2**26, 3 * 800):
        monkeypatch.setattr(M, "LOGITS", limit)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            logprobs, mask = M.response_logprobs(model, batch)
        logprobs.square().sum().backward()
        found[limit] = logprobs.detach(), [p.grad for p in adapter.parameters()], max(kept)
        adapter.zero_grad()
    (whole, gradients, most), (parts, others, least) = found.values()
    assert torch.allclose(whole, parts, atol=1e-5) and all((a - b).abs().max() <= 1e-4 * a.abs().max() for a, b in zip(gradients, others))
    assert most == mask.sum() * 800 and least < most / 2


def test_padding_changes_no_log_probability(model):
    batch = some_batch()
    wide = data.collate([(ids[keep].tolist(), 2) for ids, keep in zip(batch.ids, batch.attention)] + [([7] * 30, 2)], pad_id=1)
    with torch.no_grad():
        narrow = M.token_mean(*M.response_logprobs(model, batch))
        assert torch.allclose(narrow, M.token_mean(*M.response_logprobs(model, wide))[:3], atol=1e-5)


def test_digest_tells_models_apart(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_model("llama", seed).save_pretrained(tmp_path / name)
    changed = make_model("llama")
    with torch.no_grad():
        changed.model.layers[3].mlp.down_proj.weight[0, 0] += 1e-3
    changed.save_pretrained(tmp_path / "d")
    a, b, c, d = (M.model_digest(str(tmp_path / name)) for name in "abcd")
    assert a == b and len({a, c, d}) == 3


def test_unknown_targets_and_models_are_refused(model):
    with pytest.raises(UserError, match="--lora-targets no_such_proj: no such linear in .* whose blocks have"):
        M.find_linears(model.base_model, "no_such_proj")
    with pytest.raises(UserError, match="no such folder"):
        M.load_model("./no/such/model", torch.float32, "cpu")


def test_weights_without_a_head_are_refused(tmp_path):
    """A trunk saved by itself: the head would be random numbers."""
    make_model("gpt_neox").base_model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="lacks .*not a whole causal language model"):
        M.load_model(str(tmp_path), torch.float32, torch.device("cpu"))
    assert M.load_model(str(tmp_path), torch.float32, torch.device("cpu"), blocks=1)
