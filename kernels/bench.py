"""The alignment loss timed: the fused kernel against plain PyTorch and torch.compile, correctness first.

    python -m kernels.bench                              all shapes; without a GPU, predictions and a CPU comparison
    python -m kernels.bench --shapes headline            only the shapes whose names begin so
    python -m kernels.bench --save                       also write kernels/results/<GPU>.json

On a GPU, each form first has to agree with float64 on new random inputs, in memory that was filled with NaN before; one
that does not, or does not compile, gets its error printed and no time. Then come the medians of triton.testing.do_bench,
twice. Backward is forward+backward less forward: the fused form has its gradient from the forward pass and would compute
it anew in a second backward. A copy within the GPU's memory, in the same run, is the ceiling. There are no CUDA graphs,
so small shapes show what launches cost. The last line is one JSON object.
"""
import json
import math
import re
import sys
import tempfile
import time
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch.utils.benchmark import Timer

from files import UserError, run, setting, versions, write_json
from kernels.bench_forms import check, forms, prepare
from kernels.representation_loss import FusedLoss, bytes_moved, loss_kernel

PREDICTED_COPY = 3.0e12                                    # bytes/s, an H100's: for predictions where no copy was measured

Shape = namedtuple("Shape", "L T D f")                     # layers, response tokens, hidden size, share of [B, S] that is response
SHAPES = {
    "dual": Shape(6, 512, 4096, 0.5),                      # first: launches decide here, and a profiler comes after each shape
    "headline": Shape(5, 16384, 4096, 0.5),
    "headline-all": Shape(5, 16384, 4096, 1.0),
    "scit": Shape(5, 8192, 4096, 0.5),
    **{f"width-{D}": Shape(5, 8192, D, 0.5) for D in (896, 2304, 5120, 8192)},
}


@dataclass
class Config:
    shapes: list[str] | None = setting(None, f"shapes, by how their names begin; empty takes all: {', '.join(SHAPES)}")
    save: bool = setting(False, "write the JSON to kernels/results/<GPU>.json too")


def attempt(function, *arguments):
    """What function returns, or {"failed": why}: what one form or version cannot do must not cost the other figures."""
    try:
        return function(*arguments)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


# ---------------------------------------------------------------- on a GPU

COLUMNS = {"forward_ms": ".3f", "backward_ms": ".3f", "both_ms": ".3f", "both_20_ms": ".3f", "both_80_ms": ".3f", "again_both_ms": ".3f",
           "gb_per_s": ".0f", "of_copy": ".2f", "own_gb_per_s": ".0f", "predicted_ms": ".3f", "peak_gb": ".2f", "gradient_error": ".1e"}

def bench(function):
    """[median, 20th, 80th percentile] in ms, the L2 cache cleared before each call."""
    import triton.testing
    return list(triton.testing.do_bench(function, warmup=25, rep=200, quantiles=[0.5, 0.2, 0.8]))


def measure_copy():
    """Bytes per second, read and written, of a copy of 4 GiB within the GPU's memory: the better of two medians."""
    source = torch.ones(2**32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return max(2 * source.nbytes / bench(lambda: target.copy_(source))[0] * 1e3 for _ in range(2))


def measure(form, shape, seed, copy):
    """One row of the table: correctness, then memory, times, bytes."""
    x, forward, step = prepare(form, shape, seed, "cuda", torch.bfloat16)
    found = check(x, step, form.upstream)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    (forward_ms, *_), (both, low, high), again_forward, again = bench(forward), bench(step), bench(forward)[0], bench(step)[0]
    own = form.own_bytes(shape.f) * shape.L * shape.T * shape.D
    rate = bytes_moved(x.hidden, x.base, x.plus, x.minus, x.directions) / both * 1e3
    return {"forward_ms": forward_ms, "backward_ms": both - forward_ms, "both_ms": both, "both_20_ms": low, "both_80_ms": high,
            "again_forward_ms": again_forward, "again_both_ms": again, "gb_per_s": rate / 1e9, "of_copy": rate / copy,
            "own_gb_per_s": own / both / 1e6, "predicted_ms": own / copy * 1e3, "peak_gb": peak / 1e9, **found}


def launches(form, shape):
    """Kernels, copies and fills that one forward and backward pass puts on the GPU; None where the profiler sees none."""
    _, _, step = prepare(form, shape, 0, "cuda", torch.bfloat16)
    step()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:          # by way of the trace, whose categories are the same in all versions
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text(errors="replace"))["traceEvents"]
    return sum(event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") for event in events) or None


def measure_shape(shape, copy, first_seed):
    """All forms on one shape, {form: row}, printed as they come."""
    torch.compiler.reset()                                 # each shape is compiled for itself
    table, rows = forms(), {}
    print(f"  {'':20} " + " ".join(COLUMNS))
    for seed, (name, form) in enumerate(table.items(), first_seed):
        row = rows[name] = attempt(measure, form, shape, seed, copy)
        print(f"  {name:20} " + (f"FAILED {row['failed']}" if "failed" in row else
                                 " ".join(f"{row[key]:{len(key)}{style}}" for key, style in COLUMNS.items())), flush=True)
    for name, row in rows.items():                         # after all times, which a profiler may spoil
        if "failed" not in row:
            row["launches"] = attempt(launches, table[name], shape)
            print(f"  {name:20} {row['launches']} launches in both passes", flush=True)
    return rows


class WithWarps:
    """The kernel launched with another number of warps a program than the loss asks for."""
    def __init__(self, kernel, warps):
        self.kernel, self.warps = kernel, warps

    def __getitem__(self, grid):
        return lambda *arguments, **settings: self.kernel[grid](*arguments, **{**settings, "num_warps": self.warps})


def measure_warps(shape):
    """Median ms of the fused form by warps: is the number that the loss takes a good one?"""
    _, _, step = prepare(forms()["fused"], shape, 0, "cuda", torch.bfloat16)
    found = {}
    for warps in (2, 4, 8, 16):
        with mock.patch.object(sys.modules[FusedLoss.__module__], "loss_kernel", WithWarps(loss_kernel, warps)):
            found[warps] = bench(step)[0]
    return found


def judge(rows):
    """What was said of the headline before any time was taken, and what came of it: hit is None where it was not measured."""
    def value(name, key):
        return rows[name].get(key, math.nan)
    best_compiled = min((row["both_ms"] for name, row in rows.items() if name.endswith("compiled") and "failed" not in row), default=math.nan)
    claims = [("at least 0.85 of the copy's bytes per second", value("fused", "of_copy"), 0.85),
              ("at least 5 times faster than packed eager", value("packed, eager", "both_ms") / value("fused", "both_ms"), 5.0),
              ("at least 1.3 times faster than the best torch.compile form", best_compiled / value("fused", "both_ms"), 1.3),
              ("at most half of packed eager's peak memory over the inputs", value("fused", "peak_gb") / value("packed, eager", "peak_gb"), 0.5)]
    hit = {claim: None if math.isnan(found) else found <= bound if "at most" in claim else found >= bound for claim, found, bound in claims}
    return [{"claim": claim, "value": None if hit[claim] is None else found, "hit": hit[claim]} for claim, found, _ in claims]


def on_gpu(chosen):
    copy = measure_copy()
    result = {"copy_gb_per_s": copy / 1e9, "shapes": {}}
    print(f"copy: {copy / 1e9:.0f} GB/s, the ceiling. bf16; gb_per_s counts the fewest bytes that loss and gradient take, own_gb_per_s the "
          "form's own (counted), predicted_ms is own bytes / copy, peak_gb is over the inputs")
    for number, (name, shape) in enumerate(chosen.items()):
        print(f"{name}: L {shape.L}, T {shape.T}, D {shape.D}, f {shape.f}")
        result["shapes"][name] = {**shape._asdict(), "forms": measure_shape(shape, copy, 100 * number)}
    if "headline" in chosen:
        result["warps_ms"] = attempt(measure_warps, SHAPES["headline"])
        print(f"headline, fused, ms of both passes by warps a program: {result['warps_ms']}")
        result["claims"] = judge(result["shapes"]["headline"]["forms"])
        print("said in advance, for headline:")
        for claim in result["claims"]:
            verdict = {None: "not measured", True: "hit", False: "MISS"}[claim["hit"]]
            print(f"  {claim['claim']}: {verdict}" + ("" if claim["hit"] is None else f" ({claim['value']:.2f})"))
    return result


# ---------------------------------------------------------------- without a GPU

def on_cpu():
    table, (L, T, D, _), result = forms(), SHAPES["headline"], {"predicted": {}, "cpu": {}}
    print("no GPU here: only what a GPU would have to move, and PyTorch's two forms on the CPU\n"
          "bytes per element of a response token in bf16, where a share f of the rows are responses; and PREDICTED, not measured:\n"
          f"ms at L {L}, T {T}, D {D} with a copy of {PREDICTED_COPY / 1e12:.1f} TB/s (H100)\n  {'':20}  bytes, f = 1  f = .5   ms, f = 1  f = .5")
    for name, form in table.items():
        counts = [form.own_bytes(f) for f in (1.0, 0.5)]
        ms = [1e3 * count * L * T * D / PREDICTED_COPY for count in counts]
        result["predicted"][name] = {"bytes_per_element": counts, "ms": ms}
        print(f"  {name:20} {counts[0]:13.0f} {counts[1]:7.0f} {ms[0]:11.2f} {ms[1]:7.2f}")

    shape, names, steps, times = Shape(5, 1024, 512, 0.5), ("authors, eager", "torch backend"), [], []
    print(f"measured, {torch.get_num_threads()} threads, fp32, {shape}: ms of forward and backward, median (20-80%)")
    for name in names:
        x, _, step = prepare(table[name], shape, 0, "cpu", torch.float32)
        result["cpu"][name] = found = attempt(check, x, step, 1.0)
        steps.append(step)
        if "failed" in found:
            print(f"  {name:20} FAILED {found['failed']}")
            return result
    for _ in range(11):
        for step in steps:                                 # in turn: what else the machine does falls on both
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
    ratios = [a / b for a, b in zip(times[::2], times[1::2])]
    for name, values in ((names[0], times[::2]), (names[1], times[1::2]), ("authors / backend", ratios)):
        middle, low, high = torch.tensor(values).quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()
        result["cpu"].setdefault(name, {}).update({"median": middle, "20_80": [low, high]})
        found = result["cpu"][name].get("gradient_error")
        print(f"  {name:20} {middle:8.2f} ({low:.2f}-{high:.2f})" + (f", gradient_error {found:.1e}" if found is not None else ""))
    return result


def profile(step, loss, moved, path):
    """`align.py --profile`: trace five calls of step() for a browser; time step() and loss(), which are loss and gradient alone and move `moved` bytes."""
    step()                                                 # compilation and the allocator's first calls stay out
    with torch.profiler.profile() as profiler:
        for _ in range(5):
            with torch.profiler.record_function("step"):
                step()
    profiler.export_chrome_trace(str(path))
    whole, part = (Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads()).blocked_autorange(min_run_time=1).median
                   for f in (step, loss))
    print(f"a step {whole * 1e3:.3g} ms; loss and gradient {part * 1e3:.3g} ms of it ({part / whole:.1%}), {moved / 1e6:.3g} MB at "
          f"{moved / part / 1e9:.3g} GB/s" + (" (states that fit the GPU's cache may come from there)" if torch.cuda.is_available() else ""))
    print(f"wrote {path}: open it in a browser at chrome://tracing or ui.perfetto.dev")


def main(config):
    chosen = {name: shape for name, shape in SHAPES.items() if not config.shapes or name.startswith(tuple(config.shapes))}
    for name in config.shapes or ():
        if not any(shape.startswith(name) for shape in SHAPES):
            raise UserError(f"--shapes {name}: there are {', '.join(SHAPES)}")
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = None
    gpu, start = torch.cuda.get_device_name() if torch.cuda.is_available() else None, time.time()
    made_by = {**versions(), "cuda": torch.version.cuda, "triton": triton_version}
    print(f"{gpu or 'CPU'}: " + ", ".join(f"{name} {version}" for name, version in made_by.items()))
    result = {"gpu": gpu, "versions": made_by, **(on_gpu(chosen) if gpu else on_cpu()), "seconds": round(time.time() - start, 1)}
    if config.save:
        path = Path(__file__).parent / "results" / (re.sub("[^a-z0-9]+", "-", (gpu or "cpu").lower()).strip("-") + ".json")
        path.parent.mkdir(exist_ok=True)
        write_json(path, result)
        print(f"wrote {path}")
    print(json.dumps(result))


if __name__ == "__main__":
    run(main, Config)
