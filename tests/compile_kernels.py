"""Compile loss_kernel for GPUs that need not be there; print what the machine code holds, as JSON.

Run as a script, and without TRITON_INTERPRET=1: a process that interprets kernels cannot compile.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernel.bench_variants import persistent_kernel
from kernel.representation_loss import loss_kernel, scale_kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
L = 5
STATES = ("hidden", "base", "plus", "minus")
STATE_POINTERS = ("*bf16",) * L
ARGUMENT_TYPES = {
    "hidden": STATE_POINTERS,
    "base": STATE_POINTERS,
    "plus": STATE_POINTERS,
    "minus": STATE_POINTERS,
    "rows": "*i32",
    "grad": "*bf16",
    "terms": "*fp32",
    "norms": "*fp32",
    "alpha": "fp64",
    "inverse_denom": "fp64",
    "stride_b": "i32",
    "stride_s": "i32",
    "S": "i32",
    "N": "i32",
    "T": "i32",
    "D": "i32",
}
VARIANTS = (
    (100, {}),
    (896, {}),
    (4096, {}),
    (4096, {"warps": 8}),
    (4096, {"squared": True}),
    (4096, {"differenced": True}),
    (16384, {}),
    (896, {"kernel": persistent_kernel}),
    (4096, {"kernel": persistent_kernel}),
)


def compile_kernel(capability, D, squared=False, differenced=False, kernel=loss_kernel, warps=None):
    """A kernel for bf16 states of hidden size D, compiled for a compute capability; warps: by
    default as many as the loss takes."""
    block = triton.next_power_of_2(D)
    constants = {
        "L": L,
        "BLOCK": block,
        "ACC": tl.float32,
        "SQUARED": squared,
        "DIFFERENCED": differenced,
        "GRADIENT": True,
    }
    types = {**ARGUMENT_TYPES, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, types, constants, alignment(list(types), D))
    options = {"num_warps": warps or min(16, max(1, block // 256))}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def alignment(names, D):
    """What Triton sees when it launches: pointers to 16 bytes, and sizes that are multiples of 16.

    The keys are paths: (argument,), or (argument, element) in a tuple.
    """
    divisible = [["tt.divisibility", 16]]
    attributes = {}
    for name in STATES:
        for layer in range(L):
            attributes[names.index(name), layer] = divisible
    aligned = ["rows", "grad", "terms", "norms"]
    if D % 16 == 0:
        aligned += ["stride_b", "stride_s", "S", "N", "T", "D"]
    for parameter in loss_kernel.params:
        if parameter.name in aligned and not parameter.do_not_specialize:
            attributes[(names.index(parameter.name),)] = divisible
    return attributes


def compile_scaling(capability):
    """scale_kernel for a bf16 gradient."""
    types = {"grad": "*bf16", "scale": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    attributes = {(0,): [["tt.divisibility", 16]], (2,): [["tt.divisibility", 16]]}
    source = ASTSource(scale_kernel, types, {"BLOCK": 4096}, attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": 8})


def bytes_in_flight(code, threads):
    """The most bytes that a program of so many threads has loaded and not yet used, at any point
    of its machine code: what it asks of the memory at a time."""
    sizes = {"128": 16, "64": 8, "U16": 2, "U8": 1}
    loaded, most = {}, 0
    for instruction in re.findall(r"^\s+/\*\w{4,5}\*/\s+(?:@!?U?P\w+ )?(.*?);", code, re.MULTILINE):
        operation, _, operands = instruction.strip().partition(" ")
        registers = [(int(n), bool(pair)) for n, pair in re.findall(r"\bR(\d+)(\.64)?", operands)]
        # the first register is written, but for stores and jumps
        read = registers if operation.startswith(("ST", "BRA")) else registers[1:]
        used = {n for n, _ in read} | {n + 1 for n, pair in read if pair}
        for first, size in list(loaded.items()):
            if used & set(range(first, first + max(1, size // 4))):
                del loaded[first]
        if operation.split(".")[0] == "LDG":
            width = [size for name, size in sizes.items() if name in operation.split(".")]
            loaded[registers[0][0]] = width[0] if width else 4
            most = max(most, threads * sum(loaded.values()))
    return most


def inspect(kernel):
    """Registers, spills, and the widths of loads and stores in the machine code of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = disassemble("--dump-resource-usage", file.name)
        code = disassemble("--dump-sass", file.name)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "local": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "wide_loads": len(re.findall(r"\bLDG\.\S*128", code)),
        "wide_stores": len(re.findall(r"\bSTG\.\S*128", code)),
        "narrow_loads": len(re.findall(r"\bLDG\.\S*U16", code)),
        "bytes_in_flight": bytes_in_flight(code, 32 * kernel.metadata.num_warps),
        "copies_to_shared": len(re.findall(r"\bLDGSTS\b", code)),
        "offsets_32": len(re.findall(r"arith\.muli .*: i32", kernel.asm["ttir"])),
    }


def disassemble(flag, path):
    done = subprocess.run([CUOBJDUMP, flag, path], capture_output=True, text=True, check=True)
    return done.stdout


def main():
    results = []
    for capability in (90, 80):
        for D, options in VARIANTS:
            found = inspect(compile_kernel(capability, D, **options))
            name = options.get("kernel", loss_kernel).__name__
            results.append({"capability": capability, "D": D, **options, "kernel": name, **found})
        found = inspect(compile_scaling(capability))
        results.append({"capability": capability, "D": 0, "kernel": "scale_kernel", **found})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
