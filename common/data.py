"""Token ids of preference pairs, and batches of them.

common/pairs.py reads the rows, common/chat.py writes dialogues as text.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from common.chat import (
    Text,
    chat_form,
    chat_prompt,
    chat_reply,
    control_pattern,
    control_tokens,
    has_thoughts,
    ids_after,
    render_transcript,
)
from common.config import NEGATIVE, POSITIVE, UserError
from common.pairs import NO_COLUMNS, Pair, parse_columns, read_pairs

RESPONSES = ("chosen", "rejected")

# Pairs tokenized in one call.
CHUNK = 1000

# A pair with more characters than this for each token that it may have is measured before it is
# tokenized in full. A token of ordinary text has about four.
LONG_TEXT = 8


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of a pair: three prompts (plain, positive, negative), two responses.

    prompts: {"plain" | "positive" | "negative": ids}; responses: {"chosen" | "rejected": ids with
    the token that ends them}. All ids are int32 arrays: a list takes nine times the memory.
    """

    pair: Pair
    prompts: dict
    responses: dict
    # ends every response; None where the tokenizer has no such token
    end_token: int | None

    def input(self, prompt, response):
        """(list of ids of prompt + response, number of prompt ids)."""
        prompt_ids = self.prompts[prompt].tolist()
        return prompt_ids + self.responses[response].tolist(), len(prompt_ids)

    def length(self, prompt, response):
        """Number of ids of prompt + response."""
        return len(self.prompts[prompt]) + len(self.responses[response])

    def max_length(self):
        """Number of ids of the longest prompt + response."""
        longest_prompt = max(len(ids) for ids in self.prompts.values())
        longest_response = max(len(ids) for ids in self.responses.values())
        return longest_prompt + longest_response

    def max_id(self):
        """The largest id in any prompt or response."""
        parts = (*self.prompts.values(), *self.responses.values())
        return max(int(ids.max()) for ids in parts if len(ids))


# ---------------------------------------------------------------- tokens


def encode_pairs(tokenizer, pairs, positive=POSITIVE, negative=NEGATIVE, template="plain"):
    """Tokenize pairs in parts: the ids of q and r are the same whatever the instruction p is.

    plain:  <q, r>     [BOS] + ids(q) + ids(r) + [EOS]
            <p, q, r>  [BOS] + ids(p) + ids(q) + ids(r) + [EOS]
            BOS only where the tokenizer itself puts one
    chat:   the tokenizer's chat template; p stands in the system turn

    (in the first user turn, where the template has none)

    Texts are only text: a control token that a turn, an instruction or a reply spells out gets the
    ids of its letters. Returns a list of EncodedPair. UserError where the chat template refuses a
    dialogue.
    """
    if template == "chat":
        return encode_chat_pairs(tokenizer, pairs, positive, negative)
    controls = control_tokens(tokenizer)
    dialogues = [Text.literal(render_transcript(pair.prompt)) for pair in pairs]
    dialogue_ids = tokenize(tokenizer, dialogues, controls)
    prompts = {}
    for name, instruction in (("plain", ""), ("positive", positive), ("negative", negative)):
        [instruction_ids] = tokenize(tokenizer, [Text.literal(instruction)], controls)
        prefix = join_ids(bos_ids(tokenizer), instruction_ids)
        prompts[name] = [join_ids(prefix, ids) for ids in dialogue_ids]

    end = as_ids(tokenizer.eos_token_id)
    responses = {}
    for name in RESPONSES:
        replies = [Text.literal(f" {getattr(pair, name)}") for pair in pairs]
        responses[name] = encode_replies(tokenizer, dialogues, dialogue_ids, replies, end, controls)
    return join_pairs(pairs, prompts, responses, end)


def encode_chat_pairs(tokenizer, pairs, positive, negative):
    """encode_pairs in the tokenizer's chat template."""
    form = chat_form(tokenizer)
    prompts = {}
    rendered = {}
    for name, instruction in (("plain", ""), ("positive", positive), ("negative", negative)):
        rendered[name] = []
        for pair in pairs:
            thinking = has_thoughts(pair.chosen) or has_thoughts(pair.rejected)
            try:
                prompt = chat_prompt(tokenizer, form, pair.prompt, instruction, thinking)
            except UserError as error:
                beginning = pair.prompt[0][1][:60]
                raise UserError(f"{error} (the dialogue begins {beginning!r})") from None
            rendered[name].append(prompt)
        texts = [prompt.text for prompt in rendered[name]]
        prompts[name] = tokenize(tokenizer, texts, form.controls)

    dialogues = [prompt.text for prompt in rendered["plain"]]
    responses = {}
    for name in RESPONSES:
        replies = []
        for prompt, pair in zip(rendered["plain"], pairs):
            replies.append(chat_reply(form, prompt, getattr(pair, name)))
        responses[name] = encode_replies(
            tokenizer, dialogues, prompts["plain"], replies, form.end, form.controls
        )
    return join_pairs(pairs, prompts, responses, form.end)


def join_pairs(pairs, prompts, responses, end):
    """A list of EncodedPair from {name: a list of ids} of prompts and of responses."""
    end_token = end[-1] if end else None
    encoded = []
    for i, pair in enumerate(pairs):
        pair_prompts = {name: ids[i] for name, ids in prompts.items()}
        pair_responses = {name: ids[i] for name, ids in responses.items()}
        encoded.append(EncodedPair(pair, pair_prompts, pair_responses, end_token))
    return encoded


def bos_ids(tokenizer):
    """[BOS] where the tokenizer itself puts it in front of a text, else []."""
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("x")["input_ids"][:1] != [bos]:
        return []
    return [bos]


def tokenize(tokenizer, texts, controls):
    """The ids of each Text, without BOS and EOS: a list of int32 arrays.

    controls: {id: text} of the control tokens. Those that a text only spells out get the ids of
    their letters.
    """
    strings = [text.text for text in texts]
    ids = tokenizer(strings, add_special_tokens=False, verbose=False)["input_ids"]
    pattern = control_pattern(controls)
    for i, text in enumerate(texts):
        if any(pattern.search(text.text, start, end) for start, end in text.literals):
            ids[i] = spell_out(tokenizer, text, controls)
    return [np.array(text_ids, np.int32) for text_ids in ids]


def spell_out(tokenizer, text, controls):
    """The ids of a Text; control tokens inside its literals get the ids of their letters."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"the text {text.text[:60]!r} spells out a control token, and the model's tokenizer "
            "does not tell where: leave the row out"
        )
    encoded = tokenizer(
        text.text, add_special_tokens=False, verbose=False, return_offsets_mapping=True
    )
    ids = []
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"]):
        spelled = text.text[start:end]
        is_literal = any(start < last and first < end for first, last in text.literals)
        # an unknown word is a special token too, but it is not spelled like one
        if is_literal and token in controls and spelled.strip() == controls[token]:
            # Cut after its first letter it is no token. Some tokenizers add a space at the start of
            # a text, but not after a line break.
            cut = len(spelled) - len(spelled.lstrip()) + 1
            ids += ids_after(tokenizer, "\n", spelled[:cut])
            ids += ids_after(tokenizer, "\n", spelled[cut:])
        else:
            ids.append(token)
    return ids


def encode_replies(tokenizer, dialogues, dialogue_ids, replies, end, controls):
    """Ids of each reply as they continue its dialogue, followed by the ids in `end`.

    dialogues, replies: lists of Text; controls: as in tokenize().
    """
    texts = [dialogue + reply for dialogue, reply in zip(dialogues, replies)]
    encoded = []
    for prompt, reply, whole in zip(dialogue_ids, replies, tokenize(tokenizer, texts, controls)):
        reply_ids = whole[len(prompt) :]
        if not np.array_equal(whole[: len(prompt)], prompt):
            # The tokenizer merges the prompt's end with the reply's beginning: keep them apart.
            [reply_ids] = tokenize(tokenizer, [reply], controls)
        encoded.append(join_ids(reply_ids, end))
    return encoded


def as_ids(token):
    """A token that a tokenizer may lack, as a list of ids."""
    return [] if token is None else [token]


def join_ids(*parts):
    return np.concatenate(parts).astype(np.int32)


def choose_template(template, tokenizer):
    """The setting --template as "chat" or "plain": "auto" is chat where there is a template.

    The plain form is never taken silently. UserError where there is no chat template to take.
    """
    if template == "plain":
        return template
    if tokenizer.chat_template:
        return "chat"
    if is_tekken(tokenizer):
        raise UserError(
            f"--template {template}: this tokenizer's chat format is Mistral's own (tekken.json) "
            "and no chat template; add a chat_template.jinja to the model, or use --template plain"
        )
    if template == "chat":
        raise UserError("--template chat: the tokenizer has no chat template; use --template plain")
    print("the tokenizer has no chat template: dialogues are written in the plain form")
    return "plain"


def is_tekken(tokenizer):
    """Whether a tokenizer's chat format lies in Mistral's tekken.json."""
    if type(tokenizer).__name__.startswith("MistralCommon"):
        return True
    return (Path(tokenizer.name_or_path) / "tekken.json").is_file()


def digest_pairs(pairs):
    """sha256 over all ids of {split: [EncodedPair]}: tells whether two runs use the same pairs."""
    digest = hashlib.sha256()
    for split in sorted(pairs):
        for pair in pairs[split]:
            for ids in (*pair.prompts.values(), *pair.responses.values()):
                digest.update(ids.tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- pairs of a run


class PreparedPairs(dict):
    """{split: [EncodedPair]}. source_digest: that of all pairs of the files, see digest_source."""

    def __init__(self, source_digest):
        super().__init__()
        self.source_digest = source_digest

    @property
    def max_id(self):
        """The largest id in any of the pairs."""
        return max(pair.max_id() for pairs in self.values() for pair in pairs)


def digest_source(pairs):
    """sha256 over a list of Pairs with their splits.

    It tells whether a later stage reads the same data with the same splits, whichever splits it
    asks for and however many pairs it keeps: only then are its test pairs not those that stage 1
    trained on.
    """
    digest = hashlib.sha256()
    for pair in pairs:
        values = [pair.prompt, pair.chosen, pair.rejected, pair.split]
        digest.update(json.dumps(values).encode())
    return digest.hexdigest()


def sample(items, count, seed):
    """At most `count` of the items in random order: files are often sorted in some way."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(items), generator=generator)
    return [items[i] for i in order[:count].tolist()]


def prepare_pairs(
    paths,
    splits,
    tokenizer,
    max_length,
    seed,
    limit=None,
    *,
    positive=POSITIVE,
    negative=NEGATIVE,
    template="plain",
    columns=None,
):
    """Read and tokenize the pairs of the given splits, and print how many there are.

    paths: files, or hub:owner/name[:split]; splits: "train", "valid", "test" or "all".
    Pairs with an input of more than max_length tokens are left out. limit: the number of pairs to
    keep of each split, drawn at random; None keeps all. columns: the setting --columns.

    Returns PreparedPairs, {split: [EncodedPair]}. UserError where a split is empty.
    """
    specials = (tokenizer.bos_token, tokenizer.eos_token)
    pairs, skipped = load_files(paths, seed, specials, parse_columns(columns))
    left_out = [f"{count} {reason}" for reason, count in skipped.items()]
    prepared = PreparedPairs(digest_source(pairs))
    max_characters = max_length * longest_token(tokenizer)
    for split in splits:
        # in random order, then chunk by chunk until `limit` pairs are short enough
        selected = [pair for pair in pairs if split in (pair.split, "all")]
        if limit:
            selected = sample(selected, len(selected), seed)
        prepared[split] = []
        too_long = 0
        for start in range(0, len(selected), CHUNK):
            if limit and len(prepared[split]) >= limit:
                break
            chunk = selected[start : start + CHUNK]
            possible = [p for p in chunk if could_fit(tokenizer, p, max_length, max_characters)]
            encoded = []
            if possible:
                encoded = encode_pairs(tokenizer, possible, positive, negative, template)
            fitting = [pair for pair in encoded if pair.max_length() <= max_length]
            prepared[split] += fitting
            too_long += len(chunk) - len(fitting)
        prepared[split] = prepared[split][:limit]
        left_out.append(f"{too_long} of {split} over {max_length} tokens")
        if not prepared[split]:
            raise UserError(
                f"{', '.join(map(str, paths))}: no {split} pair is left of {len(pairs)} "
                f"({'; '.join(left_out)}): raise --max-length, add {split} rows, or draw all "
                "splits with --columns ignore=split"
            )
    counts = ", ".join(f"{len(prepared[split])} {split} pairs" for split in splits)
    print(f"{counts} (left out: {', '.join(left_out)})")
    return prepared


def load_files(paths, seed, specials, columns=NO_COLUMNS):
    """(pairs, {reason: count} of the rows left out) of several files; prints lines for each.

    UserError where some files have a split and others do not: pairs of one dialogue could then
    stand on both sides.
    """
    pairs = []
    skipped = Counter()
    # {whether a file has a split: its path}
    paths_by_split = {}
    for path in paths:
        file = read_pairs(path, seed, specials, columns)
        print("\n".join(file.describe()))
        pairs += file.pairs
        skipped.update(file.skipped)
        if file.has_split is not None:
            paths_by_split[file.has_split] = path
    if len(paths_by_split) == 2:
        raise UserError(
            f"--data {paths_by_split[True]} has a field 'split' and {paths_by_split[False]} has "
            "none: give all files one, or draw all splits with --columns ignore=split"
        )
    return pairs, skipped


def could_fit(tokenizer, pair, max_length, max_characters):
    """False for a pair that has more than max_length tokens for certain.

    Long texts are measured without the ids of all inputs: by their characters, of which
    max_characters are all that max_length tokens can have; where that does not decide, by
    tokenizing them once. (Some tokenizers write a run of unknown characters as one token. A run
    of this length is nothing to learn from.)
    """
    texts = [text for _, text in pair.prompt]
    texts.append(max(pair.chosen, pair.rejected, key=len))
    characters = sum(map(len, texts))
    if characters <= LONG_TEXT * max_length:
        return True
    if characters > max_characters:
        return False
    # Texts side by side may have one token less at each seam.
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return sum(map(len, ids)) <= max_length + len(texts)


def longest_token(tokenizer):
    """The number of characters of the longest token in the vocabulary."""
    return max(map(len, tokenizer.get_vocab()))


# ---------------------------------------------------------------- batches


@dataclass
class Batch:
    """Right-padded inputs, [B, S]: ids int64; attention and response bool.

    attention marks all real tokens, response those of r (collect.py marks the last prompt token,
    too). positions: int64 [N], where in [B * S] the marked tokens are. They are counted on the CPU:
    to ask a GPU which elements of a mask are set would wait for everything that it has still to do.
    """

    ids: torch.Tensor
    attention: torch.Tensor
    response: torch.Tensor
    positions: torch.Tensor


def to_device(tensor, device):
    """A tensor on a device. On a GPU the copy, from pinned memory, may still be under way."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def collate(inputs, pad_id, device=None):
    """A Batch of a list of (ids, number of prompt ids), padded to the longest. device: a
    torch.device, by default the CPU."""
    device = device or torch.device("cpu")
    sequences = [torch.tensor(ids) for ids, _ in inputs]
    lengths = torch.tensor([len(ids) for ids, _ in inputs])
    prompt_lengths = torch.tensor([prompt_length for _, prompt_length in inputs])

    ids = pad_sequence(sequences, batch_first=True, padding_value=pad_id)
    position = torch.arange(ids.shape[1])
    attention = position < lengths[:, None]
    response = attention & (position >= prompt_lengths[:, None])
    positions = response.flatten().nonzero()[:, 0]
    return Batch(*(to_device(part, device) for part in (ids, attention, response, positions)))


def shuffled_batches(lengths, size, seed, skip=0):
    """Yield batches of indices into lengths without end, reshuffled every epoch.

    The examples of a batch have about the same length, so that there is little padding: they are
    sorted within pools of 32 batches, which keeps the batches random. Their order in a batch is
    random, too: scit.py takes a batch's first pairs as anchors. skip: the number of batches to
    leave out at the beginning, for a run that resumes.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(lengths), generator=generator)
        batches = []
        for pool in order.split(32 * size):
            by_length = torch.tensor(sorted(pool.tolist(), key=lengths.__getitem__))
            for batch in by_length.split(size):
                shuffled = batch[torch.randperm(len(batch), generator=generator)]
                batches.append(shuffled.tolist())
        for i in torch.randperm(len(batches), generator=generator).tolist():
            if skip > 0:
                skip -= 1
            else:
                yield batches[i]


def split_into_passes(batch, lengths, tokens):
    """Split a batch (indices into lengths) into passes of at most `tokens` tokens.

    Padding counts. A pass has at least one example. A batch that needs several passes is
    sorted by length; one that fits into a pass keeps its order.
    """
    if not batch:
        return []
    if len(batch) * max(lengths[i] for i in batch) <= tokens:
        return [batch]
    passes = [[]]
    for i in sorted(batch, key=lengths.__getitem__):
        # sorted: example i is the longest so far and sets the width of its pass
        if passes[-1] and lengths[i] * (len(passes[-1]) + 1) > tokens:
            passes.append([])
        passes[-1].append(i)
    return passes
