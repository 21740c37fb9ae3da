"""Stage 1 from both sides: what scit.py and dual.py start from, and how later stages open what
they wrote."""

from dataclasses import dataclass
from pathlib import Path

import torch

from common import toy
from common.config import UserError
from common.data import choose_template, digest_pairs, prepare_pairs
from common.hf import (
    check_ids,
    check_trunk,
    choose_device,
    choose_dtype,
    choose_tokens_per_pass,
    context_length,
    load_config,
    load_model,
    load_tokenizer,
    model_digests,
)
from common.log import check_tracker
from common.stages import MANIFEST, choose_method, read_stage, verified_path
from common.training import check_batch_size
from lora import ADAPTER_WEIGHTS, LoRA, load_adapter

# What the manifests of one run have in common.
AGREED = ("settings", "inputs")

# The adapters that each method trains: {method: {kind: folder in OUT/method}}.
ADAPTER_FOLDERS = {"scit": {"scit": "adapter"}, "dual": {"good": "good", "bad": "bad"}}


@dataclass
class Stage1Inputs:
    """What stage 1 trains on. pairs: {"train" | "valid": [EncodedPair]}. settings: those of the
    stage, with what was chosen or computed filled in. digests: {what: sha256} of the files that it
    was given, by which later stages know them again. Both go into the stage's manifest."""

    model: torch.nn.Module
    tokenizer: object
    pairs: dict
    settings: dict
    digests: dict

    @property
    def manifest(self):
        """What the manifests of stage 1 begin with."""
        return {"settings": self.settings, "inputs": self.digests}

    @property
    def depends_on(self):
        """What a checkpoint depends on besides the settings."""
        return {"pairs": digest_pairs(self.pairs), "model_digest": self.digests["model"]}


def prepare_stage1(config):
    """Load model, tokenizer and pairs for scit.py or dual.py, and complete their settings.

    Where neither --model nor --data is given, the embedded default is used (and made first).
    """
    check_tracker(config.report_to)
    check_batch_size(config.batch_size)
    device = choose_device(config.device)
    config.dtype = choose_dtype(config.dtype, device)
    config.tokens_per_pass = choose_tokens_per_pass(config.tokens_per_pass, device)
    source = toy.source_or_default(config)
    # after the embedded default, which only one process makes: all adapters start the same
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(source["model"])
    config.template = choose_template(config.template, tokenizer)
    config.max_length = min(config.max_length, context_length(load_config(source["model"])))
    pairs = prepare_pairs(
        source["data"],
        ("train", "valid"),
        tokenizer,
        config.max_length,
        config.seed,
        config.limit,
        positive=config.positive,
        negative=config.negative,
        template=config.template,
        columns=config.columns,
    )
    check_ids(source["model"], pairs.max_id)
    model = load_model(
        source["model"], config.dtype, device, config.gradient_checkpointing, config.quantize
    )
    check_trunk(source["model"], model, config.quantize)
    # later stages may take another seed, but never another split
    settings = {**vars(config), **source, "split_seed": config.seed}
    digests = {**model_digests(source["model"], tokenizer), "pairs": pairs.source_digest}
    return Stage1Inputs(model, tokenizer, pairs, settings, digests)


@dataclass
class Stage1Output:
    """What stage 1 wrote. folders and manifests by kind: scit, or good and bad."""

    method: str
    folders: dict
    manifests: dict

    @property
    def manifest(self):
        """One of the manifests: they agree in settings and inputs."""
        return next(iter(self.manifests.values()))

    def load_weights(self, trunk):
        """{kind: AdapterWeights} of a trunk."""
        return {
            kind: load_adapter(verified_path(folder, self.manifests[kind]), trunk)
            for kind, folder in self.folders.items()
        }

    def load_adapters(self, trunk):
        """The adapters {kind: LoRA} on a trunk, in evaluation mode."""
        weights = self.load_weights(trunk)
        return {kind: LoRA(trunk, weights=weights[kind]).eval() for kind in weights}


def open_stage1(out, method):
    """The Stage1Output in a folder. method: "scit", "dual", or None for the one that is there.

    UserError if it is missing or unfinished, or if its adapters come from different runs.
    """
    required = {"scit": "adapter", "dual": "good"}
    method = choose_method(out, method, required, ["python scit.py", "python dual.py"])
    command = f"python {method}.py"
    folders, manifests = {}, {}
    for kind, name in ADAPTER_FOLDERS[method].items():
        folders[kind] = Path(out) / method / name
        manifests[kind] = read_stage(folders[kind], kind, command)
    stage1 = Stage1Output(method, folders, manifests)
    if any(m[name] != stage1.manifest[name] for m in manifests.values() for name in AGREED):
        names = " and ".join(map(str, folders.values()))
        raise UserError(f"{names} come from different runs: run `{command}` again")
    return stage1


def check_adapters(out, method, collected_from):
    """UserError where the adapters in OUT/METHOD are not those that a collection was made of.

    collected_from: {kind: digest of an adapter's weights}. Adapters that have gone do not matter.
    """
    for kind, digest in collected_from.items():
        folder = Path(out) / method / ADAPTER_FOLDERS[method][kind]
        if not (folder / MANIFEST).is_file():
            continue
        manifest = read_stage(folder, kind, f"python {method}.py")
        if manifest["digests"].get(ADAPTER_WEIGHTS) != digest:
            raise UserError(
                f"{folder} is newer than the hidden states that were collected with it: "
                "run `python collect.py` and `python align.py` again"
            )
