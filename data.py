"""Inputs of the models: the instructions p+ and p-, prompts, tokens, masks and batches. Pairs are read by pairs.py."""
from dataclasses import dataclass

import torch
from jinja2 import TemplateError

from files import UserError
from pairs import Pair, load_pairs

# The two instructions, the only place where they stand. They differ in their adjectives alone,
# so that h+ - h- encodes what the adjectives mean and nothing of the form.
POSITIVE = "You are a helpful, honest and polite assistant."
NEGATIVE = "You are a useless, dishonest and rude assistant."


@dataclass(frozen=True)
class Encoded:
    """Token ids of a pair: three prompts (plain, positive, negative) and two responses (chosen, rejected)."""
    pair: Pair
    prompts: dict                             # {"plain" | "positive" | "negative": list of ids}
    responses: dict                           # {"chosen" | "rejected": list of ids, with EOS}
    end: int | None                           # the token that ends a response, if any

    def example(self, prompt, response):
        """(ids of prompt + response, number of prompt ids)."""
        return self.prompts[prompt] + self.responses[response], len(self.prompts[prompt])


# ---------------------------------------------------------------- tokens

def render(turns):
    """A dialogue in the HH form, up to where the assistant's reply begins."""
    names = {"user": "Human: ", "assistant": "Assistant: ", "system": ""}
    return "".join(f"\n\n{names[role]}{text}" for role, text in turns) + "\n\nAssistant:"


def messages(turns):
    """A dialogue as role/content messages without its system turns; turns in a row of one role, which many templates refuse, become one."""
    found = []
    for role, text in turns:
        if found and found[-1]["role"] == role:
            found[-1]["content"] += f"\n\n{text}"
        elif role != "system":
            found.append({"role": role, "content": text})
    return found


def chat(tokenizer, turns, instruction=""):
    """A dialogue by the tokenizer's chat template, up to where the assistant's reply begins.

    The instruction opens the system turn; where the template has no system turn, the first user turn.
    """
    system, dialogue = "\n\n".join(filter(None, (instruction.strip(), *(text for role, text in turns if role == "system")))), messages(turns)

    def written(dialogue):
        text = tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        return f"{text}\n</think>\n\n" if text.rstrip().endswith("<think>") else text
    try:
        text = written([{"role": "system", "content": system}, *dialogue] if system else dialogue)
        if system in text:
            return text
    except TemplateError:                     # this is how a template says that it knows no system turn
        pass
    dialogue[0]["content"] = f"{system}\n\n{dialogue[0]['content']}".strip()
    try:
        return written(dialogue)
    except TemplateError as error:
        raise UserError(f"the chat template refuses a dialogue of {', '.join(m['role'] for m in dialogue)}: {error}; use --template plain") from None


def around_reply(tokenizer):
    """What the chat template puts right before and after a reply, up to the token that ends it: (text, ids)."""
    asked, reply = [{"role": "user", "content": "?"}], {"role": "assistant", "content": "REPLY"}
    whole, begun = tokenizer.apply_chat_template([*asked, reply], tokenize=False, enable_thinking=False), chat(tokenizer, (("user", "?"),))
    before, _, after = whole.removeprefix(begun).partition("REPLY") if whole.startswith(begun) else ("", "", "")
    ids, ends = tokenizer(after, add_special_tokens=False)["input_ids"], {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    return before, [tokenizer.eos_token_id] if end is None else ids[:end + 1]


def encode(tokenizer, pair, positive=POSITIVE, negative=NEGATIVE, template="plain"):
    """Tokenize a pair once, in parts, so that p+ and p- inputs differ in the instruction's tokens only and r is the same in all:

        plain:  <p, q, r> = [BOS] + ids(p) + ids(q) + ids(r) + [EOS],    <q, r> = [BOS] + ids(q) + ids(r) + [EOS]
        chat:   the model's chat template, p in its system turn
    """
    def ids(text):
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if template == "chat":
        dialogue, up, down = (chat(tokenizer, pair.prompt, instruction) for instruction in ("", positive, negative))
        query, (before, eos) = ids(dialogue), around_reply(tokenizer)
        prompts = {"plain": query, "positive": ids(up), "negative": ids(down)}
    else:
        dialogue, before = render(pair.prompt), " "
        query = ids(dialogue)
        prompts = {"plain": bos + query, "positive": bos + ids(positive) + query, "negative": bos + ids(negative) + query}

    def response(reply):
        whole = ids(dialogue + before + reply)                                      # what a model would continue with, unless the
        joined = whole[:len(query)] == query                                        # tokenizer merges the reply with the prompt's end
        return (whole[len(query):] if joined else ids(before + reply)) + eos
    return Encoded(pair, prompts, {"chosen": response(pair.chosen), "rejected": response(pair.rejected)}, eos[-1] if eos else None)


def pick_template(template, tokenizer):
    """ "chat" or "plain" of a setting; "auto" takes the tokenizer's chat template where it has one."""
    if template == "chat" and not tokenizer.chat_template:
        raise UserError("--template chat: the tokenizer has no chat template; use --template plain")
    return template if template != "auto" else "chat" if tokenizer.chat_template else "plain"


def prepare(paths, splits, tokenizer, max_length, seed, limit=None, positive=POSITIVE, negative=NEGATIVE, template="plain"):
    """The encoded pairs of each split asked for: {split: list of Encoded}, with a line that counts them.

    paths: files or hub:owner/name[:split]. Pairs with an input of over max_length tokens are left out; limit keeps the first.
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
        encoded = [encode(tokenizer, pair, positive, negative, template) for pair in pairs if pair.split == split]
        found[split] = [e for e in encoded if max(map(len, e.prompts.values())) + max(map(len, e.responses.values())) <= max_length]
        counts.append(f"{len(encoded) - len(found[split])} of {split} over {max_length} tokens")
        if not found[split]:
            raise UserError(f"{named}: no {split} pair is left of {len(pairs)} ({'; '.join(counts)}): raise --max-length or add rows")
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


def endless_batches(lengths, size, seed):
    """batches() epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from batches(lengths, size, generator)
