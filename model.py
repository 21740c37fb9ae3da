"""Models: loading all or the first blocks, finding the blocks and their linears, hidden states, log-probabilities.

A "trunk" is a causal language model without its head: embeddings, decoder blocks, final norm.
"""
import functools
import hashlib
import json
import struct
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file, logging

from files import UserError

LOGITS = 2**26                                # made at a time: 256 MB in fp32

logging.disable_progress_bar()                # of loading and saving: the stages have bars of their own


def pick_device(device):
    """torch.device from a setting; None takes the GPU where there is one."""
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
        if device.index is not None and device.type == "cuda":      # so that peak memory and profiles are of this one
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None


def pick_dtype(dtype, device):
    """The name of a torch.dtype, from a setting; None takes bfloat16 on a GPU and float32 on the CPU."""
    return dtype or ("bfloat16" if device.type == "cuda" else "float32")


def pick_tokens(tokens, device):
    """The most tokens of a forward pass, from a setting; None takes 4,096 on a GPU and 2,048 on the CPU, whose caches are small."""
    return tokens or (4096 if device.type == "cuda" else 2048)


def read_model(what, name, read, setting="--model"):
    """read() with its many ways to fail turned into one line."""
    if ("/" in name and not Path(name).is_dir()) and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"{setting} {name}: no such folder")
    try:
        return read()
    except Exception as error:                # the libraries have many ways to say that a file is not what they expect
        raise UserError(f"{setting} {name}: cannot read its {what}: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from None


def load_config(name):
    """The text configuration of a model folder or hub name."""
    return read_model("config", name, lambda: AutoConfig.from_pretrained(name).get_text_config())


def context_length(name):
    """The longest input that the model was made for (no limit known: 2**30)."""
    return getattr(load_config(name), "max_position_embeddings", None) or 2**30


def load_tokenizer(name):
    """The model's tokenizer; where it has no padding token, the end-of-text token pads (masks tell them apart)."""
    tokenizer = read_model("tokenizer", name, lambda: AutoTokenizer.from_pretrained(name))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_model(name, dtype, device, blocks=None, checkpointing=False):
    """A frozen causal language model, or, with `blocks`, the trunk of its first `blocks` blocks.

    The cut trunk ends at its last block: later blocks and the head are not read, the final norm is dropped.
    checkpointing: keep only the input of each block for the backward, which then runs the block again.
    """
    verbosity = logging.get_verbosity()
    if blocks is not None:                    # the weights of the blocks cut off are reported as unexpected
        logging.set_verbosity_error()
    try:
        if blocks is None:
            model, loaded = read_model("weights", name, lambda: AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True))
            check_decoder(name, model.eval().to(device))
        else:
            config = read_model("config", name, lambda: AutoConfig.from_pretrained(name))
            config.get_text_config().num_hidden_layers = blocks
            model, loaded = read_model("weights", name, lambda: AutoModel.from_pretrained(name, dtype=dtype, config=config, output_loading_info=True))
            drop_final_norm(model)
    finally:
        logging.set_verbosity(verbosity)
    if loaded["missing_keys"]:                # they would be random numbers
        raise UserError(f"--model {name} lacks {', '.join(sorted(loaded['missing_keys'])[:3])}: not a whole causal language model")
    if checkpointing:                         # within the hooks on a block; transformers' own switch does nothing in evaluation mode
        for block in find_blocks(model.base_model)[1]:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return model.requires_grad_(False).eval().to(device)


@torch.no_grad()
def check_decoder(name, model):
    """UserError unless a model is a trunk with a head, its trunk one plain stack of blocks, and no state depends on later tokens."""
    if model.base_model is model:
        raise UserError(f"--model {name}: {type(model).__name__} has no trunk under the name {model.base_model_prefix!r}")
    find_blocks(model.base_model)
    first = model(input_ids=torch.tensor([[2, 3], [2, 4]], device=model.device), use_cache=False).logits[:, 0].float()
    if (first[0] - first[1]).norm() > 1e-2 * first.norm():
        raise UserError(f"--model {name}: {type(model).__name__} looks ahead: what it says after a token depends on later ones; need a decoder-only model")


def drop_final_norm(trunk):
    """Replace the norm after the last block by the identity (norms of the embeddings stay)."""
    owner = find_owner(trunk)
    for name, child in owner.named_children():
        if "Norm" in type(child).__name__ and "embed" not in name:
            setattr(owner, name, nn.Identity())


def model_digest(name):
    """sha256 over the names, shapes and first 4 kB of every tensor in a model's safetensors files, once it was loaded.

    Enough to tell two models apart, and quick at any size. Of weights in other formats only names and sizes count.
    """
    folder = Path(read_model("config", name, lambda: cached_file(name, "config.json"))).parent
    digest = hashlib.sha256()
    for path in sorted(folder.glob("model*.safetensors")):
        with open(path, "rb") as file:
            size, = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
            for key, entry in sorted(header.items()):
                digest.update(f"{key} {entry}".encode())
                if key != "__metadata__":
                    begin, end = entry["data_offsets"]
                    file.seek(8 + size + begin)
                    digest.update(file.read(min(4096, end - begin)))
    for path in sorted(folder.glob("pytorch_model*.bin")) if not any(folder.glob("model*.safetensors")) else ():
        digest.update(f"{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- blocks, linears, hidden states

def find_blocks(trunk):
    """(path, ModuleList) of the decoder blocks: the list that is as long as the config says there are blocks."""
    count = trunk.config.get_text_config().num_hidden_layers
    lists = {path: m for path, m in trunk.named_modules() if isinstance(m, nn.ModuleList)}
    found = [(path, m) for path, m in lists.items() if len(m) == count]
    if len(found) != 1:
        raise UserError(f"{type(trunk).__name__} has no plain stack of decoder blocks: the config says {count}, its lists of modules are "
                        + (", ".join(f"{path} ({len(m)})" for path, m in lists.items()) or "none"))
    return found[0]


def find_owner(trunk):
    """The module that holds the stack of blocks and hands on what the head reads; mostly the trunk itself."""
    return trunk.get_submodule(find_blocks(trunk)[0].rpartition(".")[0])


def find_linears(trunk, targets="all-linear", blocks=None):
    """{path in the trunk: linear} of its first `blocks` decoder blocks (None: all). targets: "all-linear"; "attention", those
    within attention modules; or last names such as "q_proj,v_proj". In a mixture of experts all linears are those of attention:
    experts are no linears, and PEFT takes names such as gate_proj for theirs."""
    path, stack = find_blocks(trunk)
    stack = {f"{path}.{i}.{name}": m for i, block in enumerate(stack[:blocks]) for name, m in block.named_modules()}
    attention = tuple(f"{name}." for name, m in stack.items() if "Attention" in type(m).__name__)
    experts = any("experts" in name.split(".") for name in stack)
    linears = {name: m for name, m in stack.items() if isinstance(m, (nn.Linear, Conv1D)) and (not experts or name.startswith(attention))}
    wanted, last = targets.replace(" ", "").split(","), {name: name.rpartition(".")[2] for name in linears}
    if targets in ("all-linear", "attention"):
        found, missing = {name: m for name, m in linears.items() if targets == "all-linear" or name.startswith(attention)}, []
    else:
        found, missing = {name: m for name, m in linears.items() if last[name] in wanted}, [name for name in wanted if name not in last.values()]
    if missing or not found:
        raise UserError(f"--lora-targets {','.join(missing) or targets}: no such linear in {type(trunk).__name__}, whose blocks have "
                        + (", ".join(dict.fromkeys(last.values())) or "none"))
    return found


def pick_layers(layers, n):
    """Sorted target layers, counted from 0, of a list of numbers (negative ones from the top) and names: middle and last
    are thirds of the model, every second block of it where there are 12 or more; all is every block. Empty means all of
    fewer than 12 blocks, else middle."""
    step, found = 2 if n >= 12 else 1, set()
    names = {"middle": range(n // 3, 2 * n // 3, step) or [0], "last": range(n - 1, 2 * n // 3 - 1, -step) or [n - 1], "all": range(n)}
    for layer in layers or ["all" if n < 12 else "middle"]:
        try:
            found |= set(names[layer]) if layer in names else {range(n)[int(layer)]}
        except (ValueError, IndexError):
            raise UserError(f"--layers {layer}: the model has blocks 0 to {n - 1} (or -{n} to -1 from the top); names are {', '.join(names)}") from None
    return sorted(found)


def hidden_states(trunk, layers, ids):
    """A(π, x, l): the output of decoder block l for each l in layers, by a forward hook. ids: [B, S]. List of [B, S, D].

    Padding is at the right, where no token of a decoder-only model looks: so no mask is given, and attention takes its fast path.
    """
    _, blocks = find_blocks(trunk)
    states = {}

    def keep(layer):
        def hook(module, args, output):       # some families hand a tuple: (hidden states, ...)
            states[layer] = output[0] if isinstance(output, tuple) else output
        return hook
    handles = [blocks[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        trunk(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [states[layer] for layer in layers]


def principal_directions(batches, k):
    """The top k uncentred principal directions of v, per layer, from its second moment Σ v v^T [D, D], summed in fp32.

    batches: iterable of lists of L tensors v [T, D]. Returns L orthonormal U [k, D], and L cumulative shares of Σ|v|² [D]. UserError at NaN.
    """
    moments, directions, shares = None, [], []
    for batch in batches:
        moments = moments or [torch.zeros(v.shape[1], v.shape[1], device=v.device) for v in batch]
        for moment, v in zip(moments, batch):
            moment.addmm_(v.float().T, v.float())
    for moment in moments:
        if not moment.isfinite().all():       # eigh would say less
            raise UserError("h+ - h- is NaN or infinite: take --dtype bfloat16 or float32, or train stage 1 at a lower --lr")
        values, vectors = torch.linalg.eigh(moment)                             # ascending
        directions.append(vectors.flip(1)[:, :k].T.contiguous())
        shares.append((values.flip(0).cumsum(0) / values.sum().clamp(min=1e-30)).tolist())
    return directions, shares


def response_logprobs(model, batch):
    """log π(r_t | p, q, r_<t), shifted by one. Returns fp32 [B, S-1], 0 outside the response, and its mask bool [B, S-1].

    Logits are made for the N positions that predict a response token only, [n, V] at a time, and again in the backward, so that
    a large vocabulary does not set the memory.
    """
    predicts = batch.response[:, 1:]                                            # [B, S-1]: position t predicts t+1
    owner = find_owner(model.base_model)
    output = owner(input_ids=batch.ids, use_cache=False)                        # no mask, as in hidden_states

    def logprobs(states, targets):
        """The model's own forward with the trunk replaced by what it gave, so that only the head works, on n positions, and whatever
        the model does to its logits still happens. [n, D], [n] -> [n]"""
        owner.forward = lambda *args, **kwargs: type(output)(**{**output, "last_hidden_state": states[None]})
        try:
            logits = model(input_ids=targets[None], use_cache=False).logits[0]
        finally:
            del owner.forward
        return -F.cross_entropy(logits.float(), targets, reduction="none")
    states, targets = output["last_hidden_state"][:, :-1][predicts], batch.ids[:, 1:][predicts]           # [N, D], [N]
    chunks = list(zip(states.split(size := max(1, LOGITS // model.config.get_text_config().vocab_size)), targets.split(size)))
    found = [logprobs(*chunk) if len(chunks) == 1 else checkpoint(logprobs, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.zeros(predicts.shape, device=states.device).masked_scatter(predicts, torch.cat(found)), predicts


def token_mean(values, mask):
    """Mean over the marked tokens of each example: [B, S], bool [B, S] -> [B]."""
    return (values * mask).sum(1) / mask.sum(1)
