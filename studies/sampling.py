"""Answers with common noise and their KL: what the real-model studies measure policies with.

Every policy draws its answers with the same Gumbel noise, argmax_v (log π(v) + g_v), so that two
policies that are near each other mostly give the same answer, and their difference has little
noise. The base runs beside each policy, which gives the KL of an answer as a sum over its positions
of the exact sum over the vocabulary:

    KL(answer) = Σ_t Σ_v π(v | q, r_<t) (log π(v | q, r_<t) - log π_base(v | q, r_<t))
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache

from common.answers import left_pad, stop_tokens, text_of
from common.data import choose_template, encode_pairs
from common.hf import choose_device, load_model
from common.pairs import Pair
from common.score import prompts_of
from lora import LoRA, enable_only

# The answers drawn at a time.
BATCH = 256


@dataclass
class Policy:
    """logits = Σ coefficient_i · logits_i, each of the base with an adapter (or None) on a prompt.

    terms: list of (coefficient, AdapterWeights or None, "plain" | "positive").
    """

    terms: list = field(default_factory=lambda: [(1.0, None, "plain")])


@dataclass
class Answer:
    """ids: up to and with the stop token; kl: nats, the whole answer's."""

    ids: list
    text: str
    kl: float
    ended: bool


def load_sampler(model, dtype):
    """The model that answers are drawn from."""
    return load_model(model, dtype, choose_device("cpu"))


def encode_prompts(tokenizer, prompts, **instructions):
    """EncodedPairs of some requests, without responses."""
    pairs = [Pair((("user", prompt),), "", "", "test") for prompt in prompts]
    template = choose_template("auto", tokenizer)
    return encode_pairs(tokenizer, pairs, template=template, **instructions)


class Stream:
    """One model that reads a batch of prompts once, then `count` answers to each of them, some
    tokens at a time."""

    def __init__(self, model, adapters, adapter, prompts, count, pad_id):
        """adapters: all LoRA on the model; adapter: the one of them that is enabled, or None."""
        self.model = model
        self.adapters = adapters
        self.enabled = [adapter] if adapter else []
        self.count = count
        self.ids, self.attention = left_pad(prompts, pad_id)
        self.cache = DynamicCache(config=model.config)

    def read(self):
        """Read the n tokens that have not been read: their last states [B, n, D], the input of the
        head. B is the number of prompts where these are read (by logits, which then repeats the
        cache), later prompts * count."""
        with enable_only(self.enabled, among=self.adapters):
            output = self.model.base_model(
                input_ids=self.ids,
                attention_mask=self.attention,
                past_key_values=self.cache,
                use_cache=True,
            )
        return output.last_hidden_state

    def logits(self):
        """fp32 [B, V] of the next token, B = prompts * count."""
        reads_prompts = self.cache.get_seq_length() == 0
        # contiguous: else the head's matrix is copied for each prompt
        last = self.read()[:, -1].contiguous()
        logits = self.model.get_output_embeddings()(last).float()
        if reads_prompts:
            self.cache.batch_repeat_interleave(self.count)
            self.attention = self.attention.repeat_interleave(self.count, 0)
            logits = logits.repeat_interleave(self.count, 0)
        return logits

    def append(self, tokens):
        """tokens: int64 [B, n], to be read next."""
        self.ids = tokens
        self.attention = torch.cat([self.attention, torch.ones_like(self.ids)], 1)


@torch.no_grad()
def sample_answers(model, tokenizer, encoded, policy, count, seed, max_new_tokens):
    """`count` answers of a policy to each prompt: for each prompt a list of Answers.

    encoded: EncodedPairs. The noise depends on the seed and on the prompts alone.
    """
    stops = stop_tokens(model, tokenizer, encoded[0].end_token)
    adapters = {}
    for _, weights, _ in policy.terms:
        if weights is not None and id(weights) not in adapters:
            adapters[id(weights)] = LoRA(model.base_model, weights=weights).eval()
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].prompts["plain"]))
    answers = [[] for _ in encoded]
    n_prompts = max(1, BATCH // count)
    for start in tqdm(range(0, len(order), n_prompts), desc="sample", unit="batch"):
        some = order[start : start + n_prompts]
        batch = [encoded[i] for i in some]
        noise = np.random.Generator(np.random.SFC64((seed, start * count)))
        drawn = sample_batch(
            model, tokenizer, batch, policy, adapters, stops, count, noise, max_new_tokens
        )
        for k, i in enumerate(some):
            answers[i] = drawn[k * count : (k + 1) * count]
    for adapter in adapters.values():
        adapter.remove()
    return answers


def sample_batch(model, tokenizer, batch, policy, adapters, stops, count, noise, max_new_tokens):
    """`count` Answers to each prompt of a batch, one prompt's after the other's."""

    def stream(weights, prompt):
        prompts = prompts_of(batch, prompt)
        adapter = adapters[id(weights)] if weights is not None else None
        return Stream(model, adapters.values(), adapter, prompts, count, tokenizer.pad_token_id)

    base = stream(None, "plain")
    streams = []
    for _, weights, prompt in policy.terms:
        is_base = weights is None and prompt == "plain"
        streams.append(base if is_base else stream(weights, prompt))
    n_answers = len(batch) * count
    ids = [[] for _ in range(n_answers)]
    kl = torch.zeros(n_answers)
    running = torch.ones(n_answers, dtype=torch.bool)
    for _ in range(max_new_tokens):
        base_logits = base.logits()
        logits = 0
        for (coefficient, *_), one in zip(policy.terms, streams):
            logits = logits + coefficient * (base_logits if one is base else one.logits())
        if streams != [base]:
            log_p, log_base = logits.log_softmax(-1), base_logits.log_softmax(-1)
            kl += running * (log_p.exp() * (log_p - log_base)).sum(-1)
        # Gumbel noise: -log(-log u)
        uniform = torch.from_numpy(noise.random(logits.shape, dtype=np.float32))
        tokens = (logits - uniform.log_().neg_().log_()).argmax(-1)
        for i, token in enumerate(tokens.tolist()):
            if running[i]:
                ids[i].append(token)
                running[i] = token not in stops
        if not running.any():
            break
        for one in {id(s): s for s in [base, *streams]}.values():
            one.append(tokens[:, None])
    return [
        Answer(answer, text_of(tokenizer, answer, stops), kl[i].item(), answer[-1] in stops)
        for i, answer in enumerate(ids)
    ]


@torch.no_grad()
def logprobs_of_answers(model, prompts, answers, pad_id):
    """Σ_t log π(r_t | q, r_<t) of n answers to each of P prompts, [P, n].

    prompts: P lists of ids; answers: P lists of n lists of ids, none of them empty. As
    answer_logprobs in common/answers.py, but a prompt is read once for all its answers, and nothing
    is cut at the model's context.
    """
    head = model.get_output_embeddings()
    n = len(answers[0])
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    n_prompts = max(1, BATCH // n)
    sums = np.zeros((len(prompts), n))
    for start in range(0, len(order), n_prompts):
        some = order[start : start + n_prompts]
        batch = [torch.tensor(answer) for i in some for answer in answers[i]]
        stream = Stream(model, (), None, [prompts[i] for i in some], n, pad_id)
        first = stream.logits().log_softmax(-1)  # [B, V]
        # padded on the right, where no answer looks
        stream.append(pad_sequence(batch, batch_first=True, padding_value=pad_id))
        states = stream.read()  # [B, T, D], T of the longest
        totals = []
        for k, answer in enumerate(batch):
            # the state at one token predicts the next: [tokens - 1, V]
            later = head(states[k, : len(answer) - 1]).float().log_softmax(-1)
            log_p = torch.cat([first[k : k + 1], later])
            totals.append(log_p.gather(1, answer[:, None]).sum().item())
        sums[some] = np.array(totals).reshape(-1, n)
    return sums
