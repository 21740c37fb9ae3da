"""The two tasks of the real-model studies: prompts, scorers, and pairs of the base model's answers.

    python -m studies.tasks --model out/smollm2 --seed 0 --dtype bfloat16     the committed pairs

1,000 prompts ask for a few sentences about 100 subjects; but for four prompts that are left over,
no subject is in two of the splits. The base model answers each prompt four times at temperature 1.
The best and the worst answer are a preference pair where a scorer tells them apart:

    sentiment    VADER's compound score, in [-1, 1]       (pip install vaderSentiment)
    plain        how plain the words and sentences are: the automated readability index, turned
                 round and scaled to [-1, 1]

Writes studies/pairs/TASK-SEED.jsonl.gz, the data of the README's real-model block. A seed draws
other answers, so that studies over seeds see other pairs.
"""

import functools
import gzip
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common.config import UserError, run, setting
from common.hf import load_tokenizer
from studies.sampling import Policy, encode_prompts, load_sampler, sample_answers

PAIRS = Path(__file__).resolve().parent / "pairs"

# Lists of prompts read better as text.
# ruff: noqa: SIM905

# The longest answer in tokens.
ANSWER_TOKENS = 40

# Prompts for validation and for test; all others are for training.
HELD_OUT = 128

SUBJECTS = {
    "place": (
        "the beach, the library, the dentist, the airport, the city park, the old harbour, "
        "the market square, the night train, the art museum, the mountain hut, the bus station, "
        "the village school, the hospital, the zoo, the swimming pool, the desert, the office, "
        "the botanical garden, the cinema, the castle, the farm, the shopping mall, the ski slope, "
        "the campsite, the courthouse"
    ),
    "thing": (
        "my new phone, the rented car, this winter coat, the coffee machine, a folding bicycle, "
        "the vacuum cleaner, an old guitar, these running shoes, the cheap umbrella, a board game, "
        "the office chair, my alarm clock, the washing machine, a second-hand camera, this "
        "backpack, the garden hose, a pair of headphones, the electric kettle, a paper map, "
        "the kitchen knife, this mattress, a sewing machine, the tent, my reading glasses, "
        "the leaf blower"
    ),
    "food": (
        "lentil soup, pickled herring, burnt toast, strawberry cake, black coffee, fried rice, "
        "blue cheese, airline food, vegetable curry, instant noodles, dark chocolate, apple pie, "
        "cold pizza, goat milk, mushroom stew, oat porridge, spicy chilli, fish and chips, "
        "green tea, garlic bread, canned beans, onion rings, rice pudding, lemon sherbet, "
        "brussels sprouts"
    ),
    "event": (
        "a job interview, moving house, a power cut, the first day of school, a surprise party, "
        "a long flight, losing my keys, a family dinner, a rainy holiday, a public speech, "
        "a lost football match, a wedding, a traffic jam, getting a puppy, an exam, a haircut, "
        "a neighbour's complaint, a broken window, retirement, a blind date, a storm at sea, "
        "a piano concert, a missed train, a snow day, a tax audit"
    ),
}
REQUESTS = {
    "place": (
        "What is it like at {}?",
        "Describe a morning at {}.",
        "I went to {} yesterday. What do you think of it?",
        "Write a short review of {}.",
        "Why do people talk so much about {}?",
        "My friend works at {}. Tell me what to expect.",
        "How would you feel after a whole day at {}?",
        "Tell me a short story that begins at {}.",
        "Should I take my parents to {}?",
        "Write a postcard from {}.",
    ),
    "thing": (
        "What do you think of {}?",
        "Write a short review of {}.",
        "Tell me what could happen with {}.",
        "Someone left {} at my door. What now?",
        "Describe {} to a friend.",
        "How did you like {}?",
        "Write a note to the maker of {}.",
        "Would you keep {} or give it away?",
        "Tell me a short story about {}.",
        "What is the best and the worst about {}?",
    ),
    "food": (
        "What does {} taste like?",
        "Write a short review of {}.",
        "I had {} for lunch. What do you think?",
        "Should I serve {} to my guests?",
        "Tell me a memory of {}.",
        "How do people feel about {}?",
        "Describe the smell of {}.",
        "My brother eats {} every day. Say something about that.",
        "Why is {} on the menu?",
        "Write two sentences about {}.",
    ),
    "event": (
        "How does {} feel?",
        "Tell me about {}.",
        "Write a diary entry about {}.",
        "What should I expect from {}?",
        "I am thinking about {}. Say something.",
        "Write a message to a friend about {}.",
        "What is the worst about {}, and what is the best?",
        "Tell me a short story about {}.",
        "How would you describe {} to a child?",
        "What did you learn from {}?",
    ),
}


# Prompts that have nothing to do with the tasks: what a method changes there is a price.
UNRELATED = (
    "How many legs does a spider have? | Name the capital of Portugal. | What is 17 plus 25? | "
    "Translate good morning into French. | Why is the sky blue? | What does a compass do? | "
    "Write a Python function that doubles a number. | Who wrote Hamlet? | How do bees make "
    "honey? | What is the boiling point of water? | List three primary colours. | What is "
    "photosynthesis? | How far away is the moon? | Explain what a noun is. | What language do "
    "people speak in Brazil? | How do I boil an egg? | What is the square root of 81? | Name a "
    "mammal that lives in the sea. | What is the opposite of hot? | How many days are in a leap "
    "year? | What is gravity? | Give an example of a metaphor. | Which planet is the largest? | "
    "What does DNA stand for? | How does a bicycle stay upright? | What is a haiku? | Name two "
    "rivers in Europe. | What is the chemical symbol of gold? | How do I tie a shoelace? | What "
    "is a triangle? | Who painted the Mona Lisa? | What causes tides? | How many minutes are in "
    "a day? | What is an island? | Name a string instrument. | What is the freezing point of "
    "water? | How is paper made? | What is a verb? | Which animals lay eggs? | What is a "
    "volcano? | How do magnets work? | What is the plural of mouse? | Name three vegetables. | "
    "What is the currency of Japan? | How do plants drink? | What is half of 250? | Who "
    "discovered penicillin? | What is an equator? | Name a desert in Africa. | What does a "
    "lawyer do? | How do I convert miles to kilometres? | What is a synonym of large? | When "
    "did the second world war end? | What is a battery? | How many strings has a violin? | What "
    "is the largest ocean? | How do birds fly? | What is a fossil? | Name a poisonous plant. | "
    "What is the speed of light? | How do I write a formal letter? | What is an atom? | Which "
    "month has 28 days? | What is the purpose of a dictionary?"
).split(" | ")


@dataclass
class Config:
    model: str = setting("out/smollm2", "the folder that studies.smollm2 wrote", group="data")
    seed: int = setting(0, "seed of the answers", group="run")
    dtype: str = setting("float32", "of the model", group="run")
    to: str = setting(str(PAIRS), "folder to write", group="run")


# ---------------------------------------------------------------- prompts


def make_prompts():
    """{split: prompts}: 744 for training, 128 for validation and 128 for test."""
    groups = []
    for kind, subjects in SUBJECTS.items():
        for subject in subjects.split(", "):
            groups.append([request.format(subject) for request in REQUESTS[kind]])
    random.Random(0).shuffle(groups)
    # the prompts of 13 subjects; of the two that are too many training has the use
    share = -(-HELD_OUT // len(REQUESTS["place"]))
    parts = {
        "valid": groups[:share],
        "test": groups[share : 2 * share],
        "train": groups[2 * share :],
    }
    splits = {split: list(itertools.chain.from_iterable(part)) for split, part in parts.items()}
    for split in ("valid", "test"):
        splits["train"] += splits[split][HELD_OUT:]
        del splits[split][HELD_OUT:]
    return splits


# ---------------------------------------------------------------- scorers


@functools.cache
def vader():
    """VADER's analyzer. UserError where it is not installed."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UserError("the task sentiment needs `pip install vaderSentiment`") from None
    return SentimentIntensityAnalyzer()


def sentiment(prompt, response):
    """VADER's compound score of a response, in [-1, 1]."""
    return vader().polarity_scores(response)["compound"]


def plain(prompt, response):
    """How plain a response is, in [-1, 1]: 1 for short words in short sentences.

    The automated readability index (Senter and Smith 1967) estimates the school grade that a text
    needs, 4.71 letters / words + 0.5 words / sentences - 21.43. Grade 0 gives 1, grade 20 gives -1.
    An empty response gives -1.
    """
    words = re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", response)
    if not words:
        return -1.0
    sentences = max(1, len(re.findall(r"[.!?]+(?:\s|$)", response)))
    letters = sum(map(len, words))
    grade = 4.71 * letters / len(words) + 0.5 * len(words) / sentences - 21.43
    return max(-1.0, min(1.0, 1 - grade / 10))


class Task(NamedTuple):
    """A scorer (prompt, response) -> [-1, 1], how far apart the answers of a pair are at least, and
    the instructions p+ and p-."""

    score: Callable
    difference: float
    instructions: tuple


TASKS = {
    "sentiment": Task(
        sentiment,
        0.7,
        (
            "You are a cheerful, positive and warm assistant.",
            "You are a gloomy, negative and cold assistant.",
        ),
    ),
    "plain": Task(
        plain,
        1.0,
        (
            "You write short, simple and plain sentences.",
            "You write long, intricate and ornate sentences.",
        ),
    ),
}


def check_task(name):
    """UserError where a task is unknown or its scorer is not installed."""
    if name not in TASKS:
        raise UserError(f"--task {name}: choose from {', '.join(TASKS)}")
    # of the only task that needs a package
    if name == "sentiment":
        vader()


# ---------------------------------------------------------------- pairs


def best_and_worst(scorer, prompt, answers, difference):
    """The best and the worst of some answers as (chosen, rejected), or None where they are too
    near each other or one is empty."""
    scored = sorted((scorer(prompt, answer), answer) for answer in set(answers))
    (low, worst), (high, best) = scored[0], scored[-1]
    if high - low < difference or not worst or not best:
        return None
    return best, worst


def read_rows(path):
    """The rows of a pairs file."""
    text = gzip.decompress(Path(path).read_bytes()).decode("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def write_rows(path, rows):
    """Write a pairs file."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # without a time, so that the same rows give the same bytes
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def draw_answers(model, tokenizer, prompts, count, seed):
    """The texts of `count` answers of the base to each prompt: lists of texts."""
    encoded = encode_prompts(tokenizer, prompts)
    drawn = sample_answers(model, tokenizer, encoded, Policy(), count, seed, ANSWER_TOKENS)
    texts = []
    for answers in drawn:
        texts.append([answer.text for answer in answers])
    return texts


def main(config):
    splits = make_prompts()
    for name in TASKS:
        check_task(name)
    tokenizer = load_tokenizer(config.model)
    model = load_sampler(config.model, config.dtype)
    rows = {task: [] for task in TASKS}
    for split, prompts in splits.items():
        drawn = draw_answers(model, tokenizer, prompts, 4, config.seed)
        for prompt, answers in zip(prompts, drawn):
            for name, task in TASKS.items():
                if pair := best_and_worst(task.score, prompt, answers, task.difference):
                    row = {"prompt": prompt, "chosen": pair[0], "rejected": pair[1]}
                    rows[name].append({**row, "split": split})
    folder = Path(config.to)
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        path = folder / f"{task}-{config.seed}.jsonl.gz"
        write_rows(path, rows[task])
        print(f"wrote {path}: {dict(Counter(row['split'] for row in rows[task]))}")


if __name__ == "__main__":
    run(main, Config)
