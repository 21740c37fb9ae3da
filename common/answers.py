"""A model's own answers: generated, as text, and what the model and its base think of them."""

import itertools
from bisect import bisect_left
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from common.chat import without_thoughts
from common.data import collate, split_into_passes
from common.hf import (
    MAX_LOGITS,
    choose_tokens_per_pass,
    context_length,
    response_logprobs,
)
from lora import LoRA, enable_only


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated."""

    # the longest answer
    max_new_tokens: int
    # prompts answered at a time
    batch_size: int
    # seed of the sampled answers
    seed: int


@contextmanager
def attached(model, weights):
    """Within the context, a model has an adapter: AdapterWeights, or None for the base alone."""
    adapter = LoRA(model.base_model, weights=weights).eval() if weights else None
    try:
        yield adapter
    finally:
        if adapter:
            adapter.remove()


# ---------------------------------------------------------------- generation


def stop_tokens(model, tokenizer, end_token=None):
    """The ids that end an answer: of the model's generation config (else EOS), and end_token."""
    stops = model.generation_config.eos_token_id
    if stops is None:
        stops = tokenizer.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    return {*stops, end_token} - {None}


@torch.no_grad()
def generate(model, tokenizer, prompts, settings, sample=False, end_token=None):
    """Answers to prompts (lists of ids), as lists of ids up to and with their stop token.

    sample: at temperature 1 from the model's full distribution, else greedy. end_token: the id
    that ends a response in the chat template, if any. Answers end where the model's context does,
    each where its own prompt leaves no more room.
    """
    stops = stop_tokens(model, tokenizer, end_token)
    options = {
        "do_sample": sample,
        "eos_token_id": list(stops) or None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if sample:
        options |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    context = context_length(model.config)

    def room(i):
        """The most tokens of an answer to prompts[i]."""
        return max(1, min(settings.max_new_tokens, context - len(prompts[i])))

    torch.manual_seed(settings.seed)
    answers = [None] * len(prompts)
    for indices in generation_batches(prompts, room, settings.batch_size):
        ids, attention = left_pad([prompts[i] for i in indices], tokenizer.pad_token_id)
        width = ids.shape[1]
        with no_generation_config(model), contiguous_states(model):
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=attention.to(model.device),
                generation_config=GenerationConfig(max_new_tokens=room(indices[0]), **options),
            )
        for i, new_ids in zip(indices, output[:, width:].tolist()):
            answers[i] = cut_after_stop(new_ids, stops)
    return answers


def generation_batches(prompts, room, batch_size):
    """Yield batches of indices into the prompts, from the shortest prompt to the longest.

    The prompts of a batch have about the same length, so that there is little padding. They have
    the same room for an answer: no answer is cut short because a neighbour's prompt is long.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for _, group in itertools.groupby(order, key=room):
        indices = list(group)
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size]


def left_pad(prompts, pad_id):
    """Ids and attention mask, int64 [B, S], padded on the left, where generation expects it."""
    width = max(len(prompt) for prompt in prompts)
    ids = [[pad_id] * (width - len(prompt)) + prompt for prompt in prompts]
    attention = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(attention)


def cut_after_stop(ids, stops):
    """The ids up to and with the first stop token."""
    for i, token in enumerate(ids):
        if token in stops:
            return ids[: i + 1]
    return ids


@contextmanager
def no_generation_config(model):
    """Hide a model's generation config within the context.

    Its settings, such as a repetition penalty, would fill in what the caller's leaves open.
    """
    config = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = config


@contextmanager
def contiguous_states(model):
    """Within the context, the head of a model gets its states without gaps.

    Of a batch of prompts transformers hands it the last states, a slice; PyTorch would then copy
    the head's weights for each prompt, 7 GB for 64 prompts of a small model.
    """
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda head, args: tuple(x.contiguous() for x in args))
    try:
        yield
    finally:
        hook.remove()


def text_of(tokenizer, answer, stops=()):
    """An answer as text, without the thoughts that it begins with and without its stop token.

    It is cut where the model begins to write the next human turn. stops: the ids that end answers;
    such a token may be an added one that is not special.
    """
    if answer and answer[-1] in stops:
        answer = answer[:-1]
    # The tags of a block of thoughts may be special tokens, which the text of an answer lacks: the
    # block is found in the text with all of them.
    whole = tokenizer.decode(answer)
    block = whole.removesuffix(without_thoughts(whole))
    # the number of ids that write the block, and what the last of them writes after it
    count = bisect_left(
        range(len(answer)), True, key=lambda n: tokenizer.decode(answer[:n]).startswith(block)
    )
    rest = tokenizer.decode(answer[:count]).removeprefix(block)
    text = rest + tokenizer.decode(answer[count:], skip_special_tokens=True)
    return text.split("\n\nHuman:")[0].strip()


def repeated_ngrams(answers, n=4):
    """The share of n-grams that have occurred before in the same answer."""
    repeated = 0
    total = 0
    for answer in answers:
        ngrams = [tuple(answer[i : i + n]) for i in range(len(answer) - n + 1)]
        repeated += len(ngrams) - len(set(ngrams))
        total += len(ngrams)
    return repeated / max(1, total)


# ---------------------------------------------------------------- log-probabilities and KL


def answer_examples(prompts, answers):
    """(ids, number of prompt ids) of each answer after its prompt; see collate."""
    return [(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers)]


@torch.no_grad()
def answer_logprobs(model, prompts, answers, pad_id, tokens_per_pass=None):
    """Σ_t log π(r_t | q, r_<t) of each answer, a list of floats.

    prompts, answers: lists of lists of ids, an answer to each prompt. What lies beyond the model's
    context does not count.
    """
    context = context_length(model.config)
    examples = [(ids[:context], start) for ids, start in answer_examples(prompts, answers)]
    sums = [0.0] * len(examples)
    lengths = [len(ids) for ids, _ in examples]
    pass_size = choose_tokens_per_pass(tokens_per_pass, model.device)
    for indices in split_into_passes(range(len(examples)), lengths, pass_size):
        batch = collate([examples[i] for i in indices], pad_id, model.device)
        logprobs, _ = response_logprobs(model, batch)
        for i, value in zip(indices, logprobs.sum(1).tolist()):
            sums[i] = value
    return sums


@torch.no_grad()
def kl_to_base(model, adapter, prompts, base_prompts, answers, pad_id, tokens_per_pass=None):
    """The KL divergence of the model's answers from the base's, in nats, one float per answer:

        KL = Σ_t Σ_v π(v | p, q, r_<t) [log π(v | p, q, r_<t) - log π_base(v | q, r_<t)]

    The sum over the vocabulary is exact. Over answers that are sampled from π at temperature 1,
    the mean is the KL divergence of π's answers from the base's. adapter: the LoRA that makes the
    base π, or None; prompts, base_prompts, answers: lists of lists of ids. The prompts <p, q> and
    <q> may differ.
    """
    examples = answer_examples(prompts, answers)
    base_examples = answer_examples(base_prompts, answers)
    lengths = [max(len(ids), len(base)) for (ids, _), (base, _) in zip(examples, base_examples)]
    # of a pass there are logits for all tokens
    pass_size = max(1, MAX_LOGITS // model.config.get_text_config().vocab_size)
    pass_size = min(pass_size, choose_tokens_per_pass(tokens_per_pass, model.device))

    def logprobs(examples):
        """log π of every token at the N positions that predict one of the answers: [N, V], and the
        number of the answer that each belongs to, [N]."""
        batch = collate(examples, pad_id, model.device)
        logits = model(input_ids=batch.ids, use_cache=False).logits
        # position t predicts token t + 1
        logits = logits.flatten(0, 1).index_select(0, batch.positions - 1)
        return logits.float().log_softmax(-1), batch.positions // batch.ids.shape[1]

    sums = [0.0] * len(examples)
    for indices in split_into_passes(range(len(examples)), lengths, pass_size):
        log_p, rows = logprobs([examples[i] for i in indices])
        with enable_only([], among=[adapter] if adapter else []):
            log_base, _ = logprobs([base_examples[i] for i in indices])
        kl = (log_p.exp() * (log_p - log_base)).sum(-1)  # [N]
        per_answer = torch.zeros(len(indices), device=model.device).index_add_(0, rows, kl)
        for i, value in zip(indices, per_answer.tolist()):
            sums[i] = value
    return sums
