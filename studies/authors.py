"""The authors' way through RAHF, written out afresh for bench_pipeline.py to compare with.

Stage 1 has our objectives, but makes the logits of every position, for batches of pairs in random
order padded to their longest. The last stage records nothing: for each batch it runs three full
forward passes with all hidden states and logits for h+, h- and b (adapter off), and one of the
trained model, and takes a dense, masked loss. DUAL holds the good and the bad model beside the
base. Both train a PEFT LoRA on the linears that ours trains too, for one epoch.
"""

import math
import random

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils import clip_grad_norm_

import scit
from common.data import collate, prepare_pairs
from common.hf import load_model, load_tokenizer, token_mean
from lora import LoRA, load_adapter

# Of a Llama.
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def shuffled(items):
    """The items in random order, the same at every call."""
    items = list(items)
    random.Random(0).shuffle(items)
    return items


def groups(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


def make_optimizer(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)


def optimizer_step(model, optimizer, loss):
    loss.backward()
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------- stage 1


def full_logprobs(model, examples, pad_id):
    """log π of the response tokens from the logits of all positions: fp32 [B, S-1], and the mask
    of the response, bool [B, S-1]."""
    batch = collate(examples, pad_id, model.device)
    output = model(input_ids=batch.ids, attention_mask=batch.attention.long(), use_cache=False)
    logits = output.logits[:, :-1].float()  # [B, S-1, V]
    logprobs = logits.log_softmax(-1).gather(2, batch.ids[:, 1:, None])[..., 0]
    mask = batch.response[:, 1:]
    return logprobs * mask, mask


def scit_loss(model, pairs, n_anchors, pad_id):
    """scit.py's loss; the first n_anchors pairs also come without instruction."""
    examples = [pair.input(*names) for pair in pairs for names in scit.INSTRUCTED]
    for pair in pairs[:n_anchors]:
        examples += [pair.input("plain", "chosen"), pair.input("plain", "rejected")]
    logprobs, mask = full_logprobs(model, examples, pad_id)
    n_instructed = 4 * len(pairs)
    learned = torch.arange(len(examples), device=model.device) % 4 < 2
    learned[n_instructed:] = True
    P = token_mean(logprobs, mask)[:n_instructed].view(-1, 2, 2)
    contrast = scit.contrast_loss(P[:, 0], P[:, 1], scit.Config.smoothing) / (2 * len(pairs))
    return contrast - logprobs[learned].sum() / mask[learned].sum()


def dual_loss(model, pairs, response, pad_id):
    """dual.py's loss on the chosen or the rejected responses."""
    examples = [pair.input("plain", response) for pair in pairs]
    logprobs, mask = full_logprobs(model, examples, pad_id)
    return -logprobs.sum() / mask.sum()


def train_stage1(model_name, data, method, max_length, batch_size, dtype, device):
    """One epoch of scit.py, or of both models of dual.py (as one adapter: the cost is the same).

    data: a list of files; max_length, in tokens; batch_size: responses in a step of DUAL.
    """
    tokenizer = load_tokenizer(model_name)
    pad_id = tokenizer.pad_token_id
    base = load_model(model_name, dtype, device)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer = make_optimizer(model)
    pairs = shuffled(prepare_pairs(data, ("train",), tokenizer, max_length, 0)["train"])
    if method == "scit":
        n_anchors = math.ceil(scit.Config.anchor * scit.Config.batch_size)
        for group in groups(pairs, scit.Config.batch_size):
            optimizer_step(model, optimizer, scit_loss(model, group, n_anchors, pad_id))
        return
    for response in ("chosen", "rejected"):
        for group in groups(pairs, batch_size):
            optimizer_step(model, optimizer, dual_loss(model, group, response, pad_id))


# ---------------------------------------------------------------- the last stage


def left_padded(examples, width, pad_id, device):
    """Ids and attention mask, int64 [B, width], padded on the left; longer inputs lose their
    beginning. examples: (ids, number of prompt ids)."""
    ids = torch.full((len(examples), width), pad_id)
    attention = torch.zeros(len(examples), width, dtype=torch.long)
    for i, (example_ids, _) in enumerate(examples):
        kept = torch.tensor(example_ids[-width:])
        ids[i, width - len(kept) :] = kept
        attention[i, width - len(kept) :] = 1
    return ids.to(device), attention.to(device)


def response_mask(examples, device):
    """Which of the last R positions are the response's, int64 [B, R], R the longest response.
    examples: (EncodedPair, "chosen" | "rejected")."""
    lengths = torch.tensor([len(pair.responses[response]) for pair, response in examples])
    longest = lengths.max()
    mask = torch.arange(longest) >= longest - lengths[:, None]
    return mask.long().to(device)


def masked_states(model, inputs, mask, layers, window, pad_id):
    """Hidden states at the last R positions of the inputs, dense and masked: [L, B, R, D]."""
    width = window or max(len(ids) for ids, _ in inputs)
    ids, attention = left_padded(inputs, width, pad_id, model.device)
    options = {"output_hidden_states": True, "use_cache": False}
    states = model(input_ids=ids, attention_mask=attention, **options).hidden_states
    n_positions = mask.shape[1]
    chosen = [states[layer + 1][:, -n_positions:] for layer in layers]
    return torch.stack(chosen) * mask[None, :, :, None]


def instructed_model(folder, model_name, dtype, device):
    """The whole model with a stage-1 adapter in its weights."""
    model = load_model(model_name, dtype, device)
    LoRA(model.base_model, weights=load_adapter(folder, model.base_model)).merge()
    return model


def train_align(out, settings, method, layers, alpha, window, batch_size, device):
    """One epoch over both responses of all pairs.

    out: the folder with stage 1's adapters; settings: stage 1's; window: the width in tokens that
    inputs are padded to, None for the longest of each batch; batch_size: responses in a step.
    """
    name, dtype = settings["model"], settings["dtype"]
    if method == "scit":
        base = instructed_model(out / "scit" / "adapter", name, dtype, device)
    else:
        base = load_model(name, dtype, device)
        good = instructed_model(out / "dual" / "good", name, dtype, device)
        bad = instructed_model(out / "dual" / "bad", name, dtype, device)
    adapted = {"target_modules": LINEARS, "layers_to_transform": list(range(layers[-1] + 1))}
    lora_config = LoraConfig(r=8, lora_alpha=16, layers_pattern="layers", **adapted)
    model = get_peft_model(base, lora_config)
    positive, negative = (model, model) if method == "scit" else (good, bad)
    prompts = ("positive", "negative") if method == "scit" else ("plain", "plain")
    optimizer = make_optimizer(model)

    tokenizer = load_tokenizer(name)
    max_length = settings["max_length"]
    pairs = prepare_pairs(settings["data"], ("train",), tokenizer, max_length, 0)["train"]
    examples = [(pair, response) for pair in pairs for response in ("chosen", "rejected")]
    for group in groups(shuffled(examples), batch_size):
        mask = response_mask(group, device)
        shared = (mask, layers, window, tokenizer.pad_token_id)
        plain = inputs_of(group, "plain")
        with torch.no_grad(), model.disable_adapter():
            b = masked_states(model, plain, *shared)
            plus = masked_states(positive, inputs_of(group, prompts[0]), *shared)
            minus = masked_states(negative, inputs_of(group, prompts[1]), *shared)
            target = b + alpha * (plus - minus)
        distance = (masked_states(model, plain, *shared) - target).norm(dim=-1)  # [L, B, R]
        loss = (distance * mask).sum() / mask.sum() / len(layers)
        optimizer_step(model, optimizer, loss)


def inputs_of(examples, prompt):
    return [pair.input(prompt, response) for pair, response in examples]
