"""Compile the kernels for GPUs that need not be there; what ptxas and the disassembler say, as JSON. Not under TRITON_INTERPRET=1."""
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

L = 5
STATES = ("hidden", "base", "plus", "minus", "directions")


def compiled(capability, D, squared=False, upstream=False, differenced=False, low_rank=False, gradient=True):
    """Registers, stack bytes (spills) and the widths of loads and stores of bf16 rows of D."""
    block = triton.next_power_of_2(D)
    constants = dict(K=8 if low_rank else 0, L=L, BLOCK=block, ACC=tl.float32, SQUARED=squared, DIFFERENCED=differenced, LOW_RANK=low_rank, GRADIENT=gradient, UPSTREAM=upstream)
    types = {**dict.fromkeys(STATES, ("*bf16",) * L), "index": "*i32", "alpha": "*fp64", "upstream": "*fp32", "grad": "*bf16", "terms": "*fp32", "norms": "*fp32",
             "scale": "fp64", **dict.fromkeys(("stride_b", "stride_s", "S", "N", "T", "D"), "i32"), **dict.fromkeys(constants, "constexpr")}
    aligned = [["tt.divisibility", 16]]       # what Triton finds out itself when it launches: 16-byte pointers, D a multiple of 16
    names, attrs = list(types), {}
    for name in STATES:
        attrs |= {(names.index(name), i): aligned for i in range(L)}
    specialized = {parameter.name for parameter in loss_kernel.params if not parameter.do_not_specialize}
    sizes = ("stride_b", "stride_s", "D", "S", "N", "T") if D % 16 == 0 else ()
    for name in specialized.intersection(("index", "alpha", "upstream", "grad", "terms", "norms", *sizes)):
        attrs[names.index(name),] = aligned
    kernel = triton.compile(ASTSource(loss_kernel, types, constants, attrs), target=GPUTarget("cuda", capability, 32),
                            options={"num_warps": min(16, max(1, block // 512))})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (subprocess.run([Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", flag, file.name], capture_output=True,
                                      text=True, check=True).stdout for flag in ("--dump-resource-usage", "--dump-sass"))
    return {"registers": int(re.search(r"REG:(\d+)", usage)[1]), "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
            "local": len(re.findall(r"\b(?:LDL|STL)\b", code)), "wide_loads": len(re.findall(r"\bLDG\.\S*128", code)),
            "wide_stores": len(re.findall(r"\bSTG\.\S*128", code)),
            "offsets_32": len(re.findall(r"arith\.muli .*: i32", kernel.asm["ttir"])), "narrow": len(re.findall(r"\bLDG\.\S*U16", code))}


if __name__ == "__main__":
    print(json.dumps([{"capability": capability, "D": D, **options, **compiled(capability, D, **options)}
                      for capability in (90, 80) for D, options in (
                          (100, {}), (896, {}), (4096, {}), (4096, {"squared": True, "upstream": True}), (4096, {"differenced": True}), (4096, {"low_rank": True}), (16384, {}))]))
