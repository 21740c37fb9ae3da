"""Inputs of the models: the instructions p+ and p-, tokens, masks and batches. Pairs are read, and dialogues written, by pairs.py."""
import functools
import hashlib
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from safetensors import safe_open

from files import UserError, setting
from pairs import Pair, around_reply, chat, load_pairs, render

# The two instructions, the only place where they stand. They differ in their adjectives alone,
# so that h+ - h- encodes what the adjectives mean and nothing of the form.
POSITIVE = "You are a helpful, honest and polite assistant."
NEGATIVE = "You are a useless, dishonest and rude assistant."

SAMPLE = 4096                                 # responses, at most, of which the directions of v are found


@dataclass
class Source:
    """Settings of stage 1: what it learns from, and where it writes to."""
    model: str = setting("", "model folder or hub name; empty takes the embedded default")
    data: list[str] | None = setting(None, "preference pairs: files, or hub:owner/name[:split], see pairs.py; empty takes the embedded default")
    template: Literal["auto", "chat", "plain"] = setting("auto", "how prompts are written: the model's chat template, or Human: ... Assistant:")
    positive: str = setting(POSITIVE, "the instruction p+")
    negative: str = setting(NEGATIVE, "the instruction p-: as p+ but for the words that count")
    out: str = setting("out", "folder of all stages")
    seed: int = setting(0, "seed of the split, the adapters and the order of the pairs")
    device: str | None = setting(None, "cpu, cuda, cuda:1; empty takes the GPU where there is one")
    dtype: Literal["float32", "bfloat16", "float16"] | None = setting(None, "of the base; empty takes bfloat16 on a GPU, float32 on the CPU")
    max_length: int = setting(768, "longest input in tokens; pairs over it are left out", least=2)
    limit: int | None = setting(None, "use so many pairs of each split only, drawn at random", least=1)


@dataclass(frozen=True)
class Encoded:
    """Token ids of a pair: three prompts (plain, positive, negative) and two responses (chosen, rejected)."""
    pair: Pair
    prompts: dict                             # {"plain" | "positive" | "negative": ids}, int32 arrays: a list takes nine times as much
    responses: dict                           # {"chosen" | "rejected": ids, with EOS}
    end: int | None                           # the token that ends a response, if any

    def example(self, prompt, response):
        """(list of ids of prompt + response, number of prompt ids)."""
        return [*self.prompts[prompt].tolist(), *self.responses[response].tolist()], len(self.prompts[prompt])

    def length(self, prompt, response):
        """Number of ids of prompt + response."""
        return len(self.prompts[prompt]) + len(self.responses[response])

    def longest(self):
        """Number of ids of the longest of its inputs."""
        return max(map(len, self.prompts.values())) + max(map(len, self.responses.values()))


# ---------------------------------------------------------------- tokens

def encode(tokenizer, pairs, positive=POSITIVE, negative=NEGATIVE, template="plain"):
    """Tokenize pairs once, in parts, so that p+ and p- inputs differ in the instruction's tokens only and r is the same in all:

        plain:  <p, q, r> = [BOS] + ids(p) + ids(q) + ids(r) + [EOS],    <q, r> = [BOS] + ids(q) + ids(r) + [EOS]
        chat:   the model's chat template, p in its system turn
    """
    def ids(texts):
        return [np.array(x, np.int32) for x in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
    bos, eos = ([] if i is None else [i] for i in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    if template == "chat":
        before, eos = around_reply(tokenizer)
        dialogues, ups, downs = ([chat(tokenizer, pair.prompt, p) for pair in pairs] for p in ("", positive, negative))
        queries = ids(dialogues)
        prompts = [dict(zip(("plain", "positive", "negative"), texts)) for texts in zip(queries, ids(ups), ids(downs))]
    else:
        before, dialogues = " ", [render(pair.prompt) for pair in pairs]
        queries, instructions = ids(dialogues), dict(zip(("plain", "positive", "negative"), ids(["", positive, negative])))
        prompts = [{name: np.concatenate([bos, p, query]).astype(np.int32) for name, p in instructions.items()} for query in queries]

    def responses(replies):
        found = []
        for query, reply, whole in zip(queries, replies, ids([f"{dialogue}{before}{reply}" for dialogue, reply in zip(dialogues, replies)])):
            joined = np.array_equal(whole[:len(query)], query)                      # what a model would continue with, unless the
            own = whole[len(query):] if joined else ids([before + reply])[0]        # tokenizer merges the reply with the prompt's end
            found.append(np.concatenate([own, eos]).astype(np.int32))
        return found
    return [Encoded(pair, prompt, {"chosen": chosen, "rejected": rejected}, eos[-1] if eos else None) for pair, prompt, chosen, rejected
            in zip(pairs, prompts, responses([pair.chosen for pair in pairs]), responses([pair.rejected for pair in pairs]))]


def pick_template(template, tokenizer):
    """ "chat" or "plain" of a setting; "auto" takes the tokenizer's chat template where it has one."""
    if template == "chat" and not tokenizer.chat_template:
        raise UserError("--template chat: the tokenizer has no chat template; use --template plain")
    return template if template != "auto" else "chat" if tokenizer.chat_template else "plain"


def digest(pairs):
    """sha256 over all ids of {split: list of Encoded}: whether two runs have the same pairs."""
    found = hashlib.sha256()
    for split in sorted(pairs):
        for pair in pairs[split]:
            for ids in (*pair.prompts.values(), *pair.responses.values()):
                found.update(ids.tobytes())
    return found.hexdigest()


def sample(items, count, seed):
    """At most `count` of the items, drawn at random: files are often sorted in some way."""
    return [items[i] for i in torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))[:count].tolist()]


def prepare(paths, splits, tokenizer, max_length, seed, limit=None, positive=POSITIVE, negative=NEGATIVE, template="plain"):
    """The encoded pairs of each split asked for, "all" among them: {split: list of Encoded}, with a line that counts them.

    paths: files or hub:owner/name[:split]. Pairs with an input of over max_length tokens are left out; limit: so many of each split, drawn at random.
    """
    pairs, skipped, found = [], {}, {}
    specials = tuple(filter(None, (tokenizer.bos_token, tokenizer.eos_token)))
    for path in paths:
        some, left_out, form = load_pairs(path, seed, specials)
        print(f"{path}: {len(some) + sum(left_out.values()):,} rows, form: {form}")
        pairs += some
        skipped = {reason: skipped.get(reason, 0) + left_out.get(reason, 0) for reason in {**skipped, **left_out}}
    counts, named = [f"{n} {reason}" for reason, n in skipped.items()], ", ".join(map(str, paths))
    for split in splits:
        of_split, found[split], too_long = [pair for pair in pairs if split in (pair.split, "all")], [], 0
        if limit:
            of_split = sample(of_split, len(of_split), seed)
        for i in range(0, len(of_split), 1000):
            if len(found[split]) < (limit or math.inf):
                encoded = encode(tokenizer, of_split[i:i + 1000], positive, negative, template)
                fits = [e for e in encoded if e.longest() <= max_length]
                found[split] += fits
                too_long += len(encoded) - len(fits)
        counts.append(f"{too_long} of {split} over {max_length} tokens")
        if not found[split]:
            raise UserError(f"{named}: no {split} pair is left of {len(pairs)} ({'; '.join(counts)}): raise --max-length or add {split} rows")
        found[split] = found[split][:limit]
    print(", ".join(f"{len(found[split])} {split} pairs" for split in splits) + f" (left out: {', '.join(counts)})")
    return found


# ---------------------------------------------------------------- batches

@dataclass
class Batch:
    """Right-padded examples. ids int64, attention and response bool, all [B, S]; response marks r's tokens."""
    ids: torch.Tensor
    attention: torch.Tensor
    response: torch.Tensor


def collate(examples, pad_id, device="cpu"):
    """Pad a list of (ids, number of prompt ids) to the longest."""
    lengths = torch.tensor([len(ids) for ids, _ in examples])
    starts = torch.tensor([start for _, start in examples])
    position = torch.arange(int(lengths.max()))
    ids = torch.full((len(examples), len(position)), pad_id)
    attention = position < lengths[:, None]                                     # [B, S]
    ids[attention] = torch.tensor([token for ids_, _ in examples for token in ids_])
    response = attention & (position >= starts[:, None])
    return Batch(ids.to(device), attention.to(device), response.to(device))


def batches(lengths, size, generator):
    """Indices 0..len(lengths)-1, each once, in shuffled batches of about the same length (less padding)."""
    order, groups = torch.randperm(len(lengths), generator=generator), []
    for pool in order.split(32 * size):       # sort within a pool only, so that batches stay random
        pool = torch.tensor(sorted(pool.tolist(), key=lengths.__getitem__))
        groups += [group[torch.randperm(len(group), generator=generator)].tolist() for group in pool.split(size)]
    return [groups[i] for i in torch.randperm(len(groups), generator=generator)]


def endless_batches(lengths, size, seed, done=0):
    """batches() epoch after epoch, less the first `done` of them."""
    generator = torch.Generator().manual_seed(seed)
    epochs = (batches(lengths, size, generator) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), done, None)


def micro_batches(group, lengths, tokens):
    """A batch (indices into lengths) cut into passes of at most `tokens` tokens each, padding included, but of one example at least."""
    if len(group) * max(lengths[i] for i in group) <= tokens:
        return [group]
    found = [[]]
    for i in sorted(group, key=lengths.__getitem__):
        if found[-1] and lengths[i] * (len(found[-1]) + 1) > tokens:
            found.append([])
        found[-1].append(i)
    return found


@functools.cache
def side_stream(device):
    """One a process: the allocator keeps memory for each stream apart."""
    return torch.cuda.Stream(device)


def one_ahead(make, items, device):
    """make(item) for each item of an iterator, begun while the caller works on the one before: in a thread and on a stream of its own.

    make returns a Batch and lists of tensors or None, and may leave copies from pinned memory to the device under way.
    """
    stream = side_stream(device) if device.type == "cuda" else None
    if stream:                                # what make() takes has been made on the caller's
        stream.wait_stream(torch.cuda.current_stream(device))

    def begin(item):
        with torch.cuda.stream(stream):       # None: changes nothing
            return None if item is None else make(item)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(begin, next(items, None))
        while (made := coming.result()) is not None:
            if stream:                        # the caller's stream waits for the copies, and tells that their memory is in use
                own = torch.cuda.current_stream(device)
                own.wait_stream(stream)
                for tensor in [x for each in made for x in (vars(each).values() if isinstance(each, Batch) else each or ())]:
                    tensor.record_stream(own)
            coming = thread.submit(begin, next(items, None))
            yield made


# ---------------------------------------------------------------- what collect.py wrote

def recorded(response, last_prompt_token):
    """Mask of the positions that are recorded: bool [B, S] of the response tokens -> the same plus the position before them."""
    return response | response.roll(-1, 1) if last_prompt_token else response


def recorded_length(example, config):
    """Number of positions recorded of a (pair, "chosen" | "rejected")."""
    return len(example[0].responses[example[1]]) + config.last_prompt_token


class Collection:
    """What collect.py wrote: token ids and, per target layer, packed states, mapped from the shards as they are read."""

    def __init__(self, paths, layers, store, pad_id):
        self.layers, self.pad_id, self.directions = layers, pad_id, None            # a list of U [k, D] here turns v into coefficients on them
        self.name = {"full": "plus", "diff": "v", "lowrank": "c"}[store]              # of what is there for h+ - h-, beside minus
        self.items, self.lengths = [], []                  # (tensors of its shard, ids from:to, states from:to, first recorded position)
        for path in paths:
            with safe_open(path, "pt") as file:            # its tensors are views of the mapped file
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            lengths, starts = tensors["lengths"].tolist(), tensors["starts"].tolist()
            at_id = at_state = 0
            for length, start in zip(lengths, starts):
                end_state = at_state + length - start
                self.items.append((tensors, slice(at_id, at_id + length), slice(at_state, end_state), start))
                at_id, at_state = at_id + length, end_state
            self.lengths += lengths

    def keep(self, count, seed):
        """Leave so many responses, drawn at random: neighbours in a shard are of similar length."""
        drawn = sample(range(len(self.items)), count, seed)
        self.items, self.lengths = [self.items[i] for i in drawn], [self.lengths[i] for i in drawn]

    def batch(self, indices, device):
        """A Batch of responses; its response mask marks the recorded positions."""
        return collate([(tensors["ids"][at].tolist(), start) for tensors, at, _, start in (self.items[i] for i in indices)], self.pad_id, device)

    def tokens(self, i):
        """Number of recorded positions of a response."""
        return self.items[i][2].stop - self.items[i][2].start

    def packed(self, name, indices, device):
        """The stored states of this name of some responses: a list of L tensors [T, D]; None where there are none."""
        items = [self.items[i] for i in indices]
        if f"{name}.{self.layers[0]}" in items[0][0]:
            states = [torch.cat([tensors[f"{name}.{layer}"][at] for tensors, _, at, _ in items]) for layer in self.layers]
            return [x.pin_memory().to(device, non_blocking=True) for x in states] if device.type == "cuda" else states

    def states(self, indices, device):
        """base, plus, minus of responses as representation_loss takes them: lists of L tensors [T, D]. base is None where it was
        not stored; minus is None where plus holds v, or, with directions, coefficients [T, k] on them."""
        base, plus, minus = (self.packed(name, indices, device) for name in ("base", self.name, "minus"))
        if self.name == "c":                           # of more directions than are asked for, the first
            plus = [c[:, :len(U)] for c, U in zip(plus, self.directions)]
        elif self.directions:
            plus, minus = [v @ U.T.float() for v, U in zip(differences(plus, minus), self.directions)], None       # c = v U^T
        return base, plus, minus

    def differences(self, device, tokens_per_pass):
        """v of a random sample of the responses, pass by pass: lists of L tensors [T, D]."""
        for part in micro_batches(sample(range(len(self.items)), SAMPLE, seed=0), self.lengths, tokens_per_pass):
            yield differences(self.packed(self.name, part, device), self.packed("minus", part, device))


def differences(plus, minus):
    """v = h+ - h- in fp32 per layer; minus None: plus is v."""
    return [p.float() for p in plus] if minus is None else [p.float() - m.float() for p, m in zip(plus, minus)]
