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

from kernels.representation_loss import loss_kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
L = 5
STATES = ("hidden", "base", "plus", "minus")
STATE_POINTERS = ("*bf16",) * L
ARGUMENT_TYPES = {
    "hidden": STATE_POINTERS,
    "base": STATE_POINTERS,
    "plus": STATE_POINTERS,
    "minus": STATE_POINTERS,
    "index": "*i32",
    "alpha": "*fp64",
    "grad": "*bf16",
    "terms": "*fp32",
    "norms": "*fp32",
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
    (4096, {"squared": True}),
    (4096, {"differenced": True}),
    (16384, {}),
)


def compile_kernel(capability, D, squared=False, differenced=False):
    """The kernel for bf16 states of hidden size D, compiled for a compute capability."""
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
    source = ASTSource(loss_kernel, types, constants, alignment(list(types), D))
    options = {"num_warps": min(16, max(1, block // 512))}
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
    aligned = ["index", "alpha", "grad", "terms", "norms"]
    if D % 16 == 0:
        aligned += ["stride_b", "stride_s", "S", "N", "T", "D"]
    for parameter in loss_kernel.params:
        if parameter.name in aligned and not parameter.do_not_specialize:
            attributes[(names.index(parameter.name),)] = divisible
    return attributes


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
        "offsets_32": len(re.findall(r"arith\.muli .*: i32", kernel.asm["ttir"])),
    }


def disassemble(flag, path):
    done = subprocess.run([CUOBJDUMP, flag, path], capture_output=True, text=True, check=True)
    return done.stdout


def main():
    results = []
    for capability in (90, 80):
        for D, options in VARIANTS:
            kernel = compile_kernel(capability, D, **options)
            results.append({"capability": capability, "D": D, **options, **inspect(kernel)})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
