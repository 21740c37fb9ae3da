"""Collect and align, and stage 1, against the authors' way, written out afresh.

    python -m tests.bench_pipeline                       4 blocks x 256 wide on the CPU
    python -m tests.bench_pipeline --shape 8b            on a GPU: random weights; also 1b
    python -m tests.bench_pipeline --shape tiny --scaling --rounds 3       1k to 8k pairs: time a pair and peak memory of each stage
    (--save writes tests/results/bench_pipeline_SHAPE.json or scaling.json)

Ours cuts a step's batch into forward passes of 2,048 tokens (4,096 on a GPU); "whole batches" does not. The authors' way, for each
batch of pairs in random order: three full forward passes with all hidden states and logits for h+, h- and b (adapter off), one of the
trained model with a PEFT LoRA on the same linears, a dense masked loss. In two forms: padded to their window (768 tokens for SCIT,
320 for DUAL), and padded to the longest of the batch. DUAL holds the good and the bad model beside the base. Lengths are as in
HH-RLHF's harmless pairs (deciles of 1.3 tokens a word). Each measurement is a process of its own, taken in turns; memory is what it
holds at most above what it held after its imports (on the CPU anonymous memory: mapped files can be dropped at any time).
"""
import json
import math
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import align
import collect
import data
import dual
import scit
from files import new_stage, read_stage, run, setting, versions, write_json
from lora import LoRA, load_adapter, save_adapter
from model import load_model, load_tokenizer, model_digest, token_mean

PROMPT = (9, 18, 26, 49, 79, 108, 138, 172, 220, 324, 700)       # deciles of HH-RLHF harmless, in tokens
RESPONSE = (2, 12, 17, 23, 30, 39, 49, 65, 84, 121, 400)
WINDOW = {"scit": 768, "dual": 320}
SHAPES = {"tiny": (dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, vocab_size=1024), ["1"]),
          "cpu": (dict(hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, vocab_size=1024), ["1", "2"]),
          "1b": (dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4, vocab_size=128256), ["7", "9", "11", "13"]),
          "8b": (dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256), ["10", "12", "14", "16", "18"])}
ALPHA, PEAK_FLOPS = 0.5, {"H100": 989e12, "H200": 989e12, "A100": 312e12}


@dataclass
class Config:
    shape: str = setting("cpu", "cpu, 1b or 8b; tiny for --scaling")
    pairs: int = setting(96, "training pairs", least=2)
    batch_size: int = setting(16, "responses in a step", least=1)
    rounds: int = setting(5, "measurements of each form", least=1)
    methods: str = setting("scit,dual", "methods to measure")
    work: str = setting("/tmp/rahf-bench", "folder of models, pairs and stages")
    scaling: bool = setting(False, "measure growth with the number of pairs instead")
    save: bool = setting(False, "write tests/results/")
    worker: str | None = setting(None, "for the program itself: what to measure in this process")


def draw(rng, deciles):
    """A length with these deciles."""
    i = rng.randrange(10)
    return round(deciles[i] + rng.random() * (deciles[i + 1] - deciles[i]))


def prepare(config, method, pairs):
    """A folder with a random model, a tokenizer, pairs and stage-1 adapters."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out, shape = Path(config.work) / f"{config.shape}-{method}-{pairs}", SHAPES[config.shape][0]
    if (out / "ready").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    words = Tokenizer(models.WordLevel({"<|end|>": 0, "<|unk|>": 1, **{f"w{i}": i + 2 for i in range(shape["vocab_size"] - 2)}}, unk_token="<|unk|>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>", pad_token="<|end|>", unk_token="<|unk|>").save_pretrained(out / "model")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=2048, bos_token_id=None, eos_token_id=0, pad_token_id=0))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(out / "model")
    rng, rows, longest = random.Random(0), [], WINDOW[method] - 24                  # room for instruction and roles
    while len(rows) < pairs + 2:
        prompt, replies = draw(rng, PROMPT), [draw(rng, RESPONSE) for _ in range(2)]
        if prompt + max(replies) <= longest:
            text = [" ".join(f"w{rng.randrange(shape['vocab_size'] - 2)}" for _ in range(n)) for n in (prompt, *replies)]
            rows.append({"prompt": text[0], "chosen": text[1], "rejected": text[2], "split": "train" if len(rows) < pairs else "valid"})
    (out / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {**vars(scit.Config()), "model": str(out / "model"), "data": [str(out / "pairs.jsonl")], "template": "plain", "out": str(out),
                "dtype": "bfloat16" if device == "cuda" else "float32", "max_length": WINDOW[method], "split_seed": 0}
    for kind, folder in ([("scit", "scit/adapter")] if method == "scit" else [("good", "dual/good"), ("bad", "dual/bad")]):
        adapter = LoRA(model.base_model)
        for B in adapter.B:
            B.data.normal_(std=0.02)
        with new_stage(out / folder, kind, {"settings": settings, "model_digest": model_digest(str(out / "model"))}) as new:
            save_adapter(new, adapter.factors(), model.base_model, str(out / "model"))
        adapter.remove()
    (out / "ready").touch()
    return out


# ---------------------------------------------------------------- the authors' way

def left_padded(examples, width, pad_id, device):
    """ids and attention [B, width], the ends of all inputs at the right; too long ones lose their beginning."""
    ids, attention = torch.full((len(examples), width), pad_id), torch.zeros(len(examples), width, dtype=torch.long)
    for row, (tokens, _) in enumerate(examples):
        tokens = tokens[-width:]
        ids[row, width - len(tokens):], attention[row, width - len(tokens):] = torch.tensor(tokens), 1
    return ids.to(device), attention.to(device)


def authors_align(out, method, window, config, device):
    """One epoch; returns the number of responses and of tokens."""
    layers, tokenizer = [int(layer) for layer in SHAPES[config.shape][1]], load_tokenizer(str(out / "model"))
    settings = read_stage(out / ("scit/adapter" if method == "scit" else "dual/good"), "scit" if method == "scit" else "good", "")["settings"]
    dtype = getattr(torch, settings["dtype"])

    def tuned(folder):
        model = load_model(str(out / "model"), dtype, device)
        LoRA(model.base_model, factors=load_adapter(out / folder, model.base_model)).merge()
        return model
    if method == "scit":
        base = up = down = tuned("scit/adapter")
    else:
        base, up, down = load_model(str(out / "model"), dtype, device), tuned("dual/good"), tuned("dual/bad")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=names, layers_to_transform=list(range(layers[-1] + 1)), layers_pattern="layers"))
    up, down = (model if x is base else x for x in (up, down))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    pairs = data.prepare(settings["data"], ("train",), tokenizer, settings["max_length"], 0)["train"]
    examples = [(pair, response) for pair in pairs for response in ("chosen", "rejected")]
    random.Random(0).shuffle(examples)
    tokens = 0
    for i in range(0, len(examples), config.batch_size):
        group = examples[i:i + config.batch_size]
        responses = max(len(pair.responses[response]) for pair, response in group)
        mask = torch.tensor([[0] * (responses - len(pair.responses[response])) + [1] * len(pair.responses[response]) for pair, response in group], device=device)

        def hidden(of, prompt):               # dense, masked, all layers in one tensor: [L, B, R, D]
            inputs = [pair.example(prompt, response) for pair, response in group]
            ids, attention = left_padded(inputs, window or max(len(x) for x, _ in inputs), tokenizer.pad_token_id, device)
            states = of(input_ids=ids, attention_mask=attention, output_hidden_states=True, use_cache=False).hidden_states
            return torch.stack([states[layer + 1][:, -responses:] for layer in layers]) * mask[None, :, :, None]
        with torch.no_grad(), model.disable_adapter():
            b = hidden(model, "plain")
            plus, minus = hidden(up, "positive" if method == "scit" else "plain"), hidden(down, "negative" if method == "scit" else "plain")
            target = b + ALPHA * (plus - minus)
        loss = ((hidden(model, "plain") - target).norm(dim=-1) * mask).sum() / mask.sum() / len(layers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += sum(pair.length("plain", response) for pair, response in group)
    return len(examples), tokens


def authors_stage1(out, method, config, device):
    """scit.py's or dual.py's objective with logits of every position, PEFT LoRA, pairs in random order, padded to the longest."""
    tokenizer, settings = load_tokenizer(str(out / "model")), scit.Config()
    base = load_model(str(out / "model"), torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    pairs = data.prepare([str(out / "pairs.jsonl")], ("train",), tokenizer, WINDOW[method], 0)["train"]
    random.Random(0).shuffle(pairs)
    tokens = count = 0

    def logprobs(examples):
        batch = data.collate(examples, tokenizer.pad_token_id, device)
        logits = model(input_ids=batch.ids, attention_mask=batch.attention.long(), use_cache=False).logits[:, :-1].float()
        return logits.log_softmax(-1).gather(2, batch.ids[:, 1:, None])[..., 0] * batch.response[:, 1:], batch.response[:, 1:]
    step = 8 if method == "scit" else config.batch_size
    for response in (None,) if method == "scit" else ("chosen", "rejected"):
        for i in range(0, len(pairs), step):
            group = pairs[i:i + step]
            if method == "scit":
                examples = [x for pair in group for x in scit.instructed(pair)]
                examples += [pair.example("plain", r) for pair in group[:math.ceil(settings.anchor * step)] for r in ("chosen", "rejected")]
                lp, mask = logprobs(examples)
                P = token_mean(lp, mask)[:4 * len(group)].view(-1, 2, 2)
                learned = torch.tensor([j >= 4 * len(group) or j % 4 < 2 for j in range(len(examples))], device=device)
                loss = scit.contrast_loss(P[:, 0].flatten(), P[:, 1].flatten(), settings.smoothing) - lp[learned].sum() / mask[learned].sum()
            else:
                examples = [pair.example("plain", response) for pair in group]
                lp, mask = logprobs(examples)
                loss = -lp.sum() / mask.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens, count = tokens + sum(len(ids) for ids, _ in examples), count + len(examples)
    return count, tokens


# ---------------------------------------------------------------- measuring

class Memory:
    """The most anonymous memory (on a GPU: the most allocated there) since the start, in bytes above it."""

    def __enter__(self):
        self.start = self.peak = self.now()
        self.on = True
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    @staticmethod
    def now():
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

    def watch(self):
        while self.on:
            self.peak = max(self.peak, self.now())
            time.sleep(0.005)

    def __exit__(self, *_):
        self.on = False
        self.thread.join()
        self.bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else self.peak - self.start


def work(config):
    """Measure one thing in this process and print it as JSON."""
    form, method, pairs = config.worker.split(":")
    shutil.rmtree(Path(config.work) / f"{config.shape}-{method}-{pairs}" / method / ".collect.partial", ignore_errors=True)     # of a run that was cut off
    out, device = Path(config.work) / f"{config.shape}-{method}-{pairs}", torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Memory() as memory:
        start = time.perf_counter()
        if form == "collect":
            collect.main(collect.Config(out=str(out), method=method, layers=SHAPES[config.shape][1], max_gb=1e6))
        elif form.startswith("align"):
            if form == "align, nothing read":     # any states will do: they cost the same
                states = torch.randn(10**4, SHAPES[config.shape][0]["hidden_size"], device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
                data.Collection.states = lambda self, indices, device: ([states[:sum(map(self.tokens, indices))]] * len(self.layers),) * 3
            align.main(align.Config(out=str(out), method=method, alpha=[ALPHA], restart=True, tokens_per_pass=10**9 if form == "align, whole batches" else None,
                                    steps=math.ceil(2 * int(pairs) / config.batch_size), batch_size=config.batch_size))
        elif form == "stage1":
            stage, steps = (scit, math.ceil(int(pairs) / 8)) if method == "scit" else (dual, math.ceil(int(pairs) / config.batch_size))
            stage.main(stage.Config(out=str(out / "own"), restart=True, model=str(out / "model"), data=[str(out / "pairs.jsonl")], steps=steps, max_length=WINDOW[method]))
        elif form == "authors stage1":
            authors_stage1(out, method, config, device)
        else:
            authors_align(out, method, WINDOW[method] if form == "window" else None, config, device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "bytes": memory.bytes}))


def measured(config, form, method, pairs):
    done = subprocess.run([sys.executable, "-m", "tests.bench_pipeline", "--shape", config.shape, "--work", config.work, "--batch-size", str(config.batch_size),
                           "--worker", f"{form}:{method}:{pairs}"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads([line for line in done.stdout.splitlines() if line.startswith('{"seconds"')][-1])


def hardware():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "unknown")
    return f"{torch.get_num_threads()} threads, {cpu}"


def spread(values):
    return {"median": round(statistics.median(values), 3), "least": round(min(values), 3), "most": round(max(values), 3)}


def compare(config):
    """Every form in turns, round after round; ratios are of the same round."""
    found = {}
    for method in config.methods.split(","):
        out = prepare(config, method, config.pairs)
        tokenizer = load_tokenizer(str(out / "model"))
        pairs = data.prepare([str(out / "pairs.jsonl")], ("train",), tokenizer, WINDOW[method], 0)["train"]
        tokens = sum(pair.length("plain", response) for pair in pairs for response in ("chosen", "rejected"))
        rounds = [{form: measured(config, form, method, config.pairs) for form in ("collect", "align", "align, whole batches", "align, nothing read", "longest", "window", "stage1", "authors stage1")}
                  for _ in range(config.rounds)]
        for row in rounds:
            row["collect + align"] = {"seconds": row["collect"]["seconds"] + row["align"]["seconds"], "bytes": max(row["collect"]["bytes"], row["align"]["bytes"])}
        found[method] = {"responses": 2 * len(pairs), "tokens": tokens, "seconds": {form: spread([row[form]["seconds"] for row in rounds]) for form in rounds[0]},
                         "peak MB": {form: spread([row[form]["bytes"] / 1e6 for row in rounds]) for form in rounds[0]}, "ratios": {}}
        for ours, theirs in (("collect + align", "longest"), ("collect + align", "window"), ("align", "longest"), ("align", "window"), ("align, whole batches", "longest"),
                             ("align", "align, nothing read"), ("stage1", "authors stage1")):
            found[method]["ratios"][f"{ours} / {theirs}"] = {
                "speed": spread([row[theirs]["seconds"] / row[ours]["seconds"] for row in rounds]),
                "memory": spread([row[ours]["bytes"] / row[theirs]["bytes"] for row in rounds])}
        found[method]["tokens a second"] = {form: round(tokens / found[method]["seconds"][form]["median"]) for form in ("collect + align", "align", "longest", "window")}
        peak = next((flops for name, flops in PEAK_FLOPS.items() if torch.cuda.is_available() and name in torch.cuda.get_device_name()), None)
        if peak:                              # forward and the backward to the inputs, of the blocks that run
            model = load_model(str(out / "model"), torch.bfloat16, torch.device("cpu"), blocks=int(SHAPES[config.shape][1][-1]) + 1)
            weights = sum(p.numel() for block in model.layers for p in block.parameters())
            found[method]["align, model FLOP utilisation"] = round(4 * weights * tokens / found[method]["seconds"]["align"]["median"] / peak, 3)
        print(json.dumps({method: found[method]}), flush=True)
    return found


def markdown(found):
    """The README's table."""
    lines = ["| | | speed | peak memory |", "|---|---|---|---|"]
    names = {"longest": "padded to the longest of a batch", "window": "padded to the authors' window", "authors stage1": "full logits, random batches",
             "align, nothing read": "the same, its targets at hand"}
    for method, rows in found.items():
        for key, ratio in rows["ratios"].items():
            ours, theirs = key.split(" / ")
            speed, memory = ratio["speed"], ratio["memory"]
            lines.append(f"| {method.upper()}: {ours.replace('stage1', method + '.py')} | against {names[theirs]} | {speed['median']:.2f} ({speed['least']:.2f} to {speed['most']:.2f}) x | "
                         f"{memory['median']:.2f} ({memory['least']:.2f} to {memory['most']:.2f}) of it |")
    return "\n".join(lines)


def scaling(config):
    """Milliseconds a pair and peak memory of each stage, one epoch, at 1k to 8k pairs of the same lengths; medians of rounds."""
    rows, sizes = {}, (1000, 2000, 4000, 8000)
    for pairs in sizes:
        prepare(config, "dual", pairs)
    for _ in range(config.rounds):
        for pairs in sizes:
            for stage in ("stage1", "collect", "align"):
                rows.setdefault(stage, {}).setdefault(pairs, []).append(measured(config, stage, "dual", pairs))
                print(stage, pairs, rows[stage][pairs][-1], flush=True)
    return {stage: {pairs: {"ms a pair": round(1e3 * statistics.median(row["seconds"] for row in some) / pairs, 3),
                            "peak MB": round(statistics.median(row["bytes"] for row in some) / 1e6, 1)} for pairs, some in sized.items()}
            for stage, sized in rows.items()}


def growth(found):
    """The README's table of it."""
    sizes = list(next(iter(found.values())))
    lines = ["| pairs | " + " | ".join(f"{int(size):,}" for size in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for stage, rows in found.items():
        lines.append(f"| {stage.replace('stage1', 'dual.py')}: ms a pair, peak MB | " + " | ".join(f"{row['ms a pair']:.1f}, {row['peak MB']:.0f}" for row in rows.values()) + " |")
    return "\n".join(lines)


def main(config):
    if config.worker:
        return work(config)
    found = scaling(config) if config.scaling else compare(config)
    result = {"command": "python -m tests.bench_pipeline " + " ".join(sys.argv[1:]), "hardware": hardware(), "versions": versions(), "settings": vars(config), "found": found}
    print(json.dumps(result))
    if config.save:
        write_json(ROOT / "tests" / "results" / ("scaling.json" if config.scaling else f"bench_pipeline_{config.shape}.json"), result)


if __name__ == "__main__":
    run(main, Config)
