"""Models from Hugging Face: loading all or the first blocks of one, finding its blocks and linear
layers, reading hidden states and log-probabilities.

A "trunk" is a causal language model without its head: embeddings, decoder blocks, final norm.
"""

import errno
import functools
import hashlib
import json
import logging as logging_of_python
import os
import struct
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as checkpoint_activations
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    masking_utils,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file, logging

from common.config import UserError, first_line
from common.distributed import WORLD_SIZE

# The logits made at a time: 256 MB in fp32.
MAX_LOGITS = 2**26

# "No limit is known" for the length of an input.
UNLIMITED = 2**30

# Of these families PEFT adapts no out_proj: their fast kernels read its weight past the layer.
MAMBA_TYPES = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")

# Where there are experts, PEFT takes these names for their weights.
NAMES_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")

# What families call the layer that makes logits.
NAMES_OF_HEADS = ("lm_head", "embed_out", "output", "score")

# The stages have progress bars of their own.
logging.disable_progress_bar()

# In each forward pass transformers asks the device whether its inputs are several sequences in a
# row, and waits for the answer. Here they never are.
masking_utils.find_packed_sequence_indices = lambda position_ids: None


# ---------------------------------------------------------------- device, dtype, pass size


def choose_device(name):
    """torch.device of a setting; None takes the GPU where there is one. UserError otherwise."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if WORLD_SIZE > 1 and ":" in name:
        raise UserError(f"--device {name}: torchrun gives each process a GPU of its own")
    if WORLD_SIZE > 1 and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"--device {name}: only cpu and cuda are supported")
        # fails here, and not in the middle of the stage, where the device does not exist
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {first_line(error)}") from None
    if device.type == "cuda" and device.index is not None:
        # peak memory and profiles are those of the current GPU
        torch.cuda.set_device(device)
    return device


def choose_dtype(dtype, device):
    """The name of a dtype; None takes bfloat16 on a GPU that has it, else float32."""
    if dtype is not None:
        return dtype
    if device.type != "cuda":
        return "float32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    print("this GPU has no bfloat16: computing in float32")
    return "float32"


def choose_tokens_per_pass(tokens, device):
    """The most tokens of a forward pass; None takes 4096 on a GPU, 2048 on a CPU (small caches)."""
    return tokens or (4096 if device.type == "cuda" else 2048)


# ---------------------------------------------------------------- loading


def try_or_refuse(what, name, function, setting="--model"):
    """function(), any of its many exceptions turned into one UserError: NAME: cannot WHAT."""
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path and not Path(name).is_dir():
        raise UserError(f"{setting} {name}: no such folder")
    try:
        return function()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EIO):
            # the machine's fault
            raise
        message = f"{setting} {name}: cannot {what}: {first_line(error)}"
        raise UserError(message) from None


def load_config(name):
    """The text configuration of a model folder or hub name. UserError where it is not that of a
    decoder-only language model."""
    config = load_whole_config(name)
    config = try_or_refuse("read its config", name, config.get_text_config)
    for size in ("vocab_size", "num_hidden_layers", "hidden_size"):
        if getattr(config, size, None) is None:
            kind = type(config).__name__
            raise UserError(f"--model {name}: {kind} has no {size}: a decoder-only model is needed")
    return config


def load_whole_config(name):
    """The configuration of a model folder or hub name. UserError for a quantized model."""
    load = functools.partial(AutoConfig.from_pretrained, name, trust_remote_code=False)
    config = try_or_refuse("read its config", name, load)
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"--model {name} is quantized, which is not supported: give the original weights"
        )
    return config


def context_length(config):
    """The longest input, in tokens, that a model of this configuration was made for."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or UNLIMITED


def load_tokenizer(name):
    """The model's tokenizer. One without a padding token that the model knows pads with its
    end-of-text token."""
    load = functools.partial(AutoTokenizer.from_pretrained, name, trust_remote_code=False)
    tokenizer = try_or_refuse("read its tokenizer", name, load)
    if type(tokenizer).__name__.startswith("MistralCommon"):
        raise UserError(
            f"--model {name}: its tokenizer is Mistral's own (tekken.json), which is not "
            "supported: use a folder of this model that has a tokenizer.json"
        )
    pad_id = tokenizer.pad_token_id
    if pad_id is None or pad_id >= load_config(name).vocab_size:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def check_ids(name, max_id, setting="--model"):
    """UserError unless a model has an embedding for every id up to max_id."""
    rows = load_config(name).vocab_size
    if max_id >= rows:
        raise UserError(
            f"{setting} {name}: its tokenizer has written the id {max_id}, but the model has "
            f"embeddings for {rows} ids only: its files do not belong together"
        )


def load_model(name, dtype, device, gradient_checkpointing=False, quantize=None):
    """A frozen causal language model in evaluation mode. dtype: "float32" or "bfloat16"; quantize:
    "4bit", "8bit" or None.

    UserError if it cannot be read, or is not a decoder-only model with one stack of blocks.
    """
    model = load_weights(AutoModelForCausalLM, name, dtype, device, quantize)
    check_decoder_only(name, model)
    return prepare_model(model, model.base_model, gradient_checkpointing)


def load_trunk(name, n_blocks, dtype, device, gradient_checkpointing=False, quantize=None):
    """The frozen trunk of a model, without the blocks after its first n_blocks.

    The weights of later blocks and of the head are not read. dtype: "float32", "bfloat16", or
    "auto" for that of the files; quantize: "4bit", "8bit" or None.
    """
    config = load_whole_config(name)

    def class_of_trunk():
        with torch.device("meta"):
            return type(AutoModel.from_config(config, trust_remote_code=False))

    trunk_class = try_or_refuse("read its blocks", name, class_of_trunk)
    # transformers would report the weights of the dropped blocks as unexpected
    with quiet_transformers():
        trunk = load_weights(cut_class(trunk_class, n_blocks), name, dtype, device, quantize)
    trunk = prepare_model(trunk, trunk, gradient_checkpointing)
    ids = torch.tensor([[2, 3]], device=trunk.device)
    # hybrids such as Kimi Linear may need an attention block that stands above
    try_or_refuse(
        f"run its first {n_blocks} blocks alone, choose higher --layers",
        name,
        lambda: hidden_states(trunk, [n_blocks - 1], ids),
    )
    return trunk


def cut_class(trunk_class, n_blocks):
    """A trunk's class whose models have their first n_blocks blocks only.

    Each is built for the whole number of blocks and then cut: in some families that number
    decides how a block computes.
    """

    def build_and_cut(self, *args, **kwargs):
        trunk_class.__init__(self, *args, **kwargs)
        self.parts_of_experts = find_parts_of_experts(self)
        self.path_of_blocks, blocks = find_blocks(self)
        del blocks[n_blocks:]

    # transformers goes by the names of class and module
    members = {"__init__": build_and_cut, "__module__": trunk_class.__module__}
    return type(trunk_class.__name__, (trunk_class,), members)


def loading_options(name):
    """How from_pretrained is to read any model: without code, and without an adapter that lies in
    the model's folder, which it would add where peft is installed."""
    if (Path(name) / "adapter_config.json").is_file():
        print(f"{name}: its adapter_config.json is not read, only the model's own weights are")
    return {
        "trust_remote_code": False,
        "output_loading_info": True,
        "adapter_kwargs": {"subfolder": "no adapter"},
    }


def load_weights(model_class, name, dtype, device, quantize):
    """from_pretrained of a transformers class, onto a device. UserError where the files lack
    weights."""
    # On an H100 and newer PyTorch prefers cuDNN's attention, which plans for about a second each
    # time it meets a new [B, S]. Here nearly every forward pass has one of its own.
    torch.backends.cuda.enable_cudnn_sdp(False)
    options = loading_options(name)
    options["dtype"] = dtype if dtype == "auto" else getattr(torch, dtype)
    if quantize:
        options |= quantizing_options(quantize, options["dtype"], device)

    def load():
        return model_class.from_pretrained(name, config=load_whole_config(name), **options)

    model, info = try_or_refuse("read its weights", name, load)
    if info["missing_keys"]:
        # they would be random numbers
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise UserError(f"--model {name} lacks {missing}: not a complete causal language model")
    if quantize:
        # it is where it was loaded
        check_quantized(name, quantize, model)
        return model
    return model.to(device)


def quantizing_options(quantize, dtype, device):
    """How from_pretrained is to quantize the linear layers: "4bit" or "8bit". What they compute
    in is the dtype."""
    missing = [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]
    if missing:
        raise UserError(f"--quantize {quantize} needs `pip install {' '.join(missing)}`")
    # It says at each call of a layer in 8 bits that it casts.
    logging_of_python.getLogger("bitsandbytes.autograd._functions").setLevel("ERROR")
    # The head stays as it is. (By itself transformers leaves out what comes last, which in a trunk
    # is a part of a block.)
    skipped = {"llm_int8_skip_modules": list(NAMES_OF_HEADS)}
    if quantize == "8bit":
        # With a threshold the columns that count as outliers, and so the state of a token, depend
        # on all tokens of the batch, later ones and padding included.
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, **skipped)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            **skipped,
        )
    return {"quantization_config": config, "device_map": {"": device}}


def check_quantized(name, quantize, model):
    """UserError unless all linear layers of a model's blocks are quantized. Also keeps them from a
    form for inference on some CPUs, which has no gradient: to bitsandbytes a frozen model in
    evaluation mode looks as if it were not trained."""
    linears = find_linears(model.base_model).items()
    whole = [
        path
        for path, linear in linears
        if not hasattr(linear.weight, "quant_type") and not hasattr(linear.weight, "SCB")
    ]
    if whole:
        raise UserError(
            f"--quantize {quantize}: bitsandbytes leaves {whole[0]} of --model {name} as it is: "
            "train it without --quantize"
        )
    for _, linear in linears:
        if hasattr(linear, "support_avx512bf16_for_cpu"):
            linear.support_avx512bf16_for_cpu = False


@contextmanager
def quiet_transformers():
    """Within the context, transformers logs errors only."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def prepare_model(model, trunk, gradient_checkpointing):
    """The model in evaluation mode, its weights fixed. With gradient checkpointing the backward
    keeps only the input of each block of the trunk, and runs the block again."""
    if gradient_checkpointing:
        # transformers' own switch does nothing in evaluation mode
        for block in find_blocks(trunk)[1]:
            block.forward = functools.partial(
                checkpoint_activations, block.forward, use_reentrant=False
            )
    return model.requires_grad_(False).eval()


@torch.no_grad()
def check_decoder_only(name, model):
    """UserError unless a model is a trunk with a head, the trunk is one plain stack of blocks,
    and no hidden state depends on later tokens."""
    kind = type(model).__name__
    if model.base_model is model:
        prefix = model.base_model_prefix
        raise UserError(f"--model {name}: {kind} has no trunk under the name {prefix!r}")
    path, _ = find_blocks(model.base_model)
    ids = torch.tensor([[2, 3], [2, 4]], device=model.device)
    logits = try_or_refuse(
        "run it on token ids", name, lambda: model(input_ids=ids, use_cache=False).logits
    )
    first, second = logits[:, 0].float()
    if (first - second).norm() > 1e-2 * first.norm():
        raise UserError(
            f"--model {name}: {kind} looks ahead: its output at a token depends on later ones; "
            "a decoder-only model is needed"
        )
    if model.get_decoder() is not model.base_model.get_submodule(path.rpartition(".")[0]):
        raise UserError(f"--model {name}: {kind} has more around its blocks than a decoder")


@torch.no_grad()
def check_trunk(name, model, quantize=None):
    """UserError unless the first half of a model has the hidden states that it has in the whole:
    collect.py and align.py run no more than such a part, whose adapter is then for the whole."""
    kind = type(model).__name__
    layer = len(find_blocks(model.base_model)[1]) // 2
    if quantize:
        dtype = str(model.dtype).removeprefix("torch.")
        trunk = load_trunk(name, layer + 1, dtype, model.device, quantize=quantize)
    else:
        # in the files' dtype their weights are only mapped; the model's own tensors take their
        # place
        trunk = load_trunk(name, layer + 1, "auto", torch.device("cpu"))
        trunk.load_state_dict(model.base_model.state_dict(), strict=False, assign=True)
        trunk.to(model.device)
    ids = torch.tensor([[2, 3, 4, 5, 6], [7, 6, 5, 4, 3]], device=model.device)
    [whole] = hidden_states(model.base_model, [layer], ids)
    width = model.config.get_text_config().hidden_size
    if not isinstance(whole, torch.Tensor) or whole.shape != (*ids.shape, width):
        shape = tuple(whole.shape) if isinstance(whole, torch.Tensor) else type(whole).__name__
        raise UserError(
            f"--model {name}: a block of {kind} returns {shape}, not one state of width {width} "
            "for each token"
        )
    [cut] = hidden_states(trunk, [layer], ids)
    difference = ((cut - whole).float().norm() / whole.float().norm()).item()
    if not difference < 1e-2:
        raise UserError(
            f"--model {name}: the first {layer + 1} blocks of {kind} have other states alone than "
            f"in the whole model (off by {difference:.2f} of their norm)"
        )


def model_digest(name):
    """sha256 over names, shapes and the first 4 kB of every tensor in a model's safetensors files.

    It tells two models apart and is quick at any size. Other formats count by name and size.
    """
    load = functools.partial(cached_file, name, "config.json")
    folder = Path(try_or_refuse("read its config", name, load)).parent
    digest = hashlib.sha256()
    safetensors_files = sorted(folder.glob("model*.safetensors"))
    for path in safetensors_files:
        update_digest(digest, path)
    if not safetensors_files:
        for path in sorted(folder.glob("pytorch_model*.bin")):
            digest.update(f"{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()


def model_digests(name, tokenizer):
    """{"model" | "tokenizer" | "chat template": sha256}: what a run's figures depend on.

    Of a tokenizer, its vocabulary and special tokens count, and the ids of one text.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    added = tokenizer.added_tokens_decoder.items()
    special = [tokenizer.special_tokens_map, [(i, str(token), token.special) for i, token in added]]
    probe = tokenizer("How do I cut a plank?\n\n1. Take 12.5 cm; naïve 你好")["input_ids"]
    contents = {
        "tokenizer": [vocabulary, special, probe],
        "chat template": tokenizer.chat_template,
    }
    digests = {"model": model_digest(name)}
    for part, content in contents.items():
        text = json.dumps(content, sort_keys=True, default=str)
        digests[part] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return digests


def check_same_model(name, tokenizer, manifest, folder):
    """UserError unless model, tokenizer and chat template are those that a stage folder, with this
    manifest, was made with. To be called after the model is loaded: only then its files are sure
    to be at hand. Without a chat template in use it may change."""
    in_use = manifest["settings"]["template"] == "chat"
    for part, digest in model_digests(name, tokenizer).items():
        if manifest["inputs"].get(part) != digest and (in_use or part != "chat template"):
            raise UserError(
                f"--model {name}: this is another {part} than {folder} was made with: give that "
                "one, or run the earlier stages again"
            )


def update_digest(digest, path):
    """Add the tensors of one safetensors file to a digest, see model_digest."""
    with open(path, "rb") as file:
        (header_size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_size))
        for key, entry in sorted(header.items()):
            digest.update(f"{key} {entry}".encode())
            if key != "__metadata__":
                start, end = entry["data_offsets"]
                file.seek(8 + header_size + start)
                digest.update(file.read(min(4096, end - start)))


# ---------------------------------------------------------------- blocks and linear layers


def find_blocks(trunk):
    """(path, ModuleList) of the decoder blocks: the list as long as the config says.

    UserError where there is not exactly one such list.
    """
    if hasattr(trunk, "path_of_blocks"):
        # a cut trunk
        return trunk.path_of_blocks, trunk.get_submodule(trunk.path_of_blocks)
    count = trunk.config.get_text_config().num_hidden_layers
    module_lists = {
        path: module for path, module in trunk.named_modules() if isinstance(module, nn.ModuleList)
    }
    stacks = [(path, blocks) for path, blocks in module_lists.items() if len(blocks) == count]
    if len(stacks) != 1:
        names = ", ".join(f"{path} ({len(blocks)})" for path, blocks in module_lists.items())
        raise UserError(
            f"{type(trunk).__name__} has no plain stack of decoder blocks: the config says "
            f"{count}, its lists of modules are {names or 'none'}"
        )
    return stacks[0]


def is_linear(module):
    """Whether a module is a linear layer; GPT-2's Conv1D is one, its weight stored [in, out]."""
    return isinstance(module, (nn.Linear, Conv1D))


def find_linears(trunk, targets="all-linear"):
    """{path in the trunk: linear layer} of its decoder blocks.

    targets: "all-linear"; "attention", those inside attention modules; or the last parts of
    their names, such as "q_proj,v_proj". Of a mixture of experts, those beside experts are left
    out, in dense blocks too: experts are not linear layers, and PEFT takes names such as gate_proj
    for theirs.
    """
    path, blocks = find_blocks(trunk)
    modules = {f"{path}.{name}": module for name, module in blocks.named_modules() if name}
    linears = {name: module for name, module in modules.items() if is_linear(module)}
    parts_of_experts = find_parts_of_experts(trunk)
    not_for_peft = NAMES_OF_EXPERTS if parts_of_experts else ()
    if trunk.config.get_text_config().model_type in MAMBA_TYPES:
        not_for_peft = ("out_proj",)
    for name in list(linears):
        part, last_name = part_of_block(name, path), name.rpartition(".")[2]
        if part in parts_of_experts or last_name in not_for_peft:
            del linears[name]
    if targets == "all-linear":
        chosen, missing = linears, []
    elif targets == "attention":
        chosen, missing = choose_in_attention(linears, modules, blocks), []
    else:
        chosen, missing = choose_by_name(linears, targets)
    if missing or not chosen:
        names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears))
        raise UserError(
            f"--lora-targets {','.join(missing) or targets}: no such linear in "
            f"{type(trunk).__name__}, whose blocks have {names or 'none'}"
        )
    return chosen


def part_of_block(name, path):
    """The child of its block that a module is in: mlp of layers.3.mlp.down_proj."""
    return name.removeprefix(f"{path}.").split(".")[1]


def find_parts_of_experts(trunk):
    """The children of blocks in which there are experts, such as {"mlp"}, of the whole model."""
    if hasattr(trunk, "parts_of_experts"):
        return trunk.parts_of_experts
    path, blocks = find_blocks(trunk)
    names = [f"{path}.{name}" for name, _ in blocks.named_modules() if name]
    return {part_of_block(name, path) for name in names if "experts" in name.split(".")}


def choose_in_attention(linears, modules, blocks):
    """Those of {path: linear} that lie inside attention modules."""
    prefixes = tuple(
        f"{path}."
        for path, module in modules.items()
        # Jamba has whole blocks with Attention in the name of their class
        if "Attention" in type(module).__name__ and module not in blocks
    )
    return {path: linear for path, linear in linears.items() if path.startswith(prefixes)}


def choose_by_name(linears, targets):
    """({path: linear} whose last names are in "q_proj,v_proj", the names that none has)."""
    wanted = targets.replace(" ", "").split(",")
    last_names = {path: path.rpartition(".")[2] for path in linears}
    chosen = {path: linear for path, linear in linears.items() if last_names[path] in wanted}
    missing = [name for name in wanted if name not in last_names.values()]
    return chosen, missing


def choose_layers(layers, n):
    """Sorted target layers of a model of n blocks, counted from 0.

    layers: numbers (negative from the top) and names: `upper` is the upper half of the model, an
    eighth of it from one target to the next, down from the last block; `middle` and `last` are
    thirds, every second block of it where n is 12 or more; `all` is every block. Empty means `all`
    below 12 blocks, else `upper`. UserError for anything else.
    """
    step = 2 if n >= 12 else 1
    names = {
        "upper": range(n - 1, n // 2 - 1, -max(1, n // 8)),
        "middle": range(n // 3, 2 * n // 3, step) or [0],
        "last": range(n - 1, 2 * n // 3 - 1, -step) or [n - 1],
        "all": range(n),
    }
    chosen = set()
    for layer in layers or ["all" if n < 12 else "upper"]:
        try:
            chosen |= set(names[layer]) if layer in names else {range(n)[int(layer)]}
        except (ValueError, IndexError):
            raise UserError(
                f"--layers {layer}: the model has blocks 0 to {n - 1} (or -{n} to -1 from the "
                f"top); names are {', '.join(names)}"
            ) from None
    return sorted(chosen)


# ---------------------------------------------------------------- hidden states, log-probabilities


def hidden_states(trunk, layers, ids):
    """A(π, x, l): the output of decoder block l for each l in layers.

    ids: [B, S]. Returns a list of tensors [B, S, D]. Padding is on the right, where no token of a
    decoder-only model looks, so no attention mask is given and attention takes its fast path.
    """
    _, blocks = find_blocks(trunk)
    states = {}

    def save_output(layer, module, args, output):
        # some families return a tuple: (hidden states, ...)
        states[layer] = output[0] if isinstance(output, tuple) else output

    hooks = [
        blocks[layer].register_forward_hook(functools.partial(save_output, layer))
        for layer in layers
    ]
    try:
        trunk(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [states[layer] for layer in layers]


def response_logprobs(model, batch):
    """log π(r_t | p, q, r_<t) of the response tokens, shifted by one.

    Returns fp32 [B, S-1], 0 outside the response, and the mask of the response, bool [B, S-1].
    Logits are made only for the N positions that predict a response token, and in chunks that the
    backward makes again, so that a large vocabulary does not decide how much memory is needed.
    """
    decoder = model.get_decoder()
    # no attention mask: see hidden_states
    output = decoder(input_ids=batch.ids, use_cache=False)
    # position t predicts token t + 1
    states = output["last_hidden_state"].flatten(0, 1)
    states = states.index_select(0, batch.positions - 1)  # [N, D]
    targets = batch.ids.flatten().index_select(0, batch.positions)  # [N]

    def chunk_logprobs(states, targets):
        """[n, D], [n] -> [n]. Runs the model's own forward with the decoder replaced by its
        states, so that whatever this model does to its logits is done."""
        replaced = type(output)(**{**output, "last_hidden_state": states[None]})
        decoder.forward = lambda *args, **kwargs: replaced
        try:
            # any ids will do: the decoder does not read them
            logits = model(input_ids=targets[None], use_cache=False).logits[0]
        finally:
            del decoder.forward
        return -F.cross_entropy(logits.float(), targets, reduction="none")

    chunk = max(1, MAX_LOGITS // model.config.get_text_config().vocab_size)
    if len(targets) <= chunk:
        logprobs = chunk_logprobs(states, targets)
    else:
        parts = [
            checkpoint_activations(chunk_logprobs, *part, use_reentrant=False)
            for part in zip(states.split(chunk), targets.split(chunk))
        ]
        logprobs = torch.cat(parts)
    dense = torch.zeros(batch.ids.numel(), device=states.device)
    dense = dense.index_copy(0, batch.positions, logprobs).view_as(batch.ids)
    return dense[:, 1:], batch.response[:, 1:]


def token_mean(values, mask):
    """Mean over the marked tokens of each example: [B, S], bool [B, S] -> [B]."""
    return (values * mask).sum(1) / mask.sum(1)
