"""The alignment loss timed: the fused kernel against plain PyTorch and torch.compile.

    python -m kernel.bench                       all shapes
    python -m kernel.bench --shapes headline     only the shapes whose names begin with headline
    python -m kernel.bench --save                also write kernel/results/<GPU>.json

On a GPU every form must first agree with float64 on fresh random inputs, in memory that was
filled with NaN. A form that does not, or that does not compile, gets its error printed and no
time. Then come medians of triton.testing.do_bench, taken twice. Backward is forward and backward
minus forward, because the fused form computes its gradient in the forward pass. A copy within the
GPU's memory, timed in the same run, is the ceiling. No CUDA graphs are used, so small shapes show
what launches cost.

Without a GPU it prints the bytes that each form would move, the times that these predict, and
a comparison of two eager forms on the CPU. All results follow as one JSON object on one line.
"""

import importlib.metadata
import json
import math
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from common.config import UserError, run, setting
from common.stages import versions, write_json
from kernel.bench_forms import Shape, check, forms, prepare
from kernel.representation_loss import bytes_moved

# Bytes per second of a copy on an H100, for predictions where none was measured.
PREDICTED_COPY_RATE = 3.0e12

# What others publish for kernels that do next to nothing but move bytes, on an H100: what can be
# had of its 3.35 TB/s.
PUBLISHED_RATES = {
    "quack, softmax": 3.01e12,
    "PyTorch, clone": 3.0e12,
    "Liger, RMSNorm in bf16": 2.83e12,
}


def of_width(D):
    """A shape of this hidden size and of the headline's size T * D: small ones time the launch."""
    return Shape(L=5, T=round(2**26 / D / 512) * 512, D=D, f=0.5)


# The first is the smallest: there launches decide.
SHAPES = {
    "dual": Shape(L=6, T=512, D=4096, f=0.5),
    "headline": Shape(L=5, T=16384, D=4096, f=0.5),
    "headline-all": Shape(L=5, T=16384, D=4096, f=1.0),
    "scit": Shape(L=5, T=8192, D=4096, f=0.5),
    "width-896": of_width(896),
    "width-2304": of_width(2304),
    "width-5120": of_width(5120),
    "width-8192": of_width(8192),
}
CPU_SHAPE = Shape(L=5, T=1024, D=512, f=0.5)
CPU_ROUNDS = 11

# What a table shows of a measured form, and how.
COLUMNS = {
    "forward_ms": ".3f",
    "backward_ms": ".3f",
    "both_ms": ".3f",
    "both_20_ms": ".3f",
    "both_80_ms": ".3f",
    "repeated_both_ms": ".3f",
    "gb_per_s": ".0f",
    "of_copy": ".2f",
    "own_gb_per_s": ".0f",
    "predicted_ms": ".3f",
    "peak_gb": ".2f",
    "gradient_error": ".1e",
}


@dataclass
class Config:
    shapes: list[str] | None = setting(
        None,
        f"shapes, by how their names begin; empty takes all: {', '.join(SHAPES)}",
        group="run",
    )
    save: bool = setting(False, "also write the JSON to kernel/results/<GPU>.json", group="run")


def main(config):
    shapes = choose_shapes(config.shapes)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    made_by = {**versions(), "cuda": torch.version.cuda, "triton": triton_version()}
    named_versions = [f"{name} {version}" for name, version in made_by.items()]
    print(f"{gpu or 'CPU'}: {', '.join(named_versions)}")

    start = time.time()
    measured = on_gpu(shapes) if gpu else on_cpu()
    seconds = round(time.time() - start, 1)
    result = {"gpu": gpu, "versions": made_by, **measured, "seconds": seconds}
    if config.save:
        name = re.sub("[^a-z0-9]+", "-", (gpu or "cpu").lower()).strip("-")
        path = Path(__file__).parent / "results" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, result)
        print(f"wrote {path}")
    print(json.dumps(result))


def choose_shapes(prefixes):
    """The shapes whose names begin with one of the prefixes; all without prefixes."""
    if not prefixes:
        return SHAPES
    chosen = {}
    for prefix in prefixes:
        matching = {name: shape for name, shape in SHAPES.items() if name.startswith(prefix)}
        if not matching:
            raise UserError(f"--shapes {prefix}: choose from {', '.join(SHAPES)}")
        chosen |= matching
    return chosen


def triton_version():
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def attempt(function, *arguments):
    """What function returns, or {"failed": error}: the other forms are still measured."""
    try:
        return function(*arguments)
    except Exception as error:
        text = " ".join(str(error).split())
        return {"failed": f"{type(error).__name__}: {text[:300]}"}


# ---------------------------------------------------------------- on a GPU


def on_gpu(shapes):
    copy_rate = measure_copy()
    print(f"copy: {copy_rate / 1e9:.0f} GB/s, the ceiling. All states in bf16.")
    for name, rate in PUBLISHED_RATES.items():
        print(f"  published for an H100: {name} {rate / 1e9:.0f} GB/s")
    print("gb_per_s counts the minimum bytes of loss and gradient, own_gb_per_s the form's own;")
    print("predicted_ms is own bytes / copy rate; peak_gb is above the inputs.")
    result = {"copy_gb_per_s": copy_rate / 1e9, "shapes": {}}
    for number, (name, shape) in enumerate(shapes.items()):
        print(f"{name}: L {shape.L}, T {shape.T}, D {shape.D}, f {shape.f}")
        rows = measure_shape(name, shape, copy_rate, first_seed=100 * number)
        result["shapes"][name] = {**shape._asdict(), "forms": rows}
    if "headline" in shapes:
        print("headline, fused, in other ways:")
        result["variants"] = measure_variants(SHAPES["headline"], copy_rate)
        result["claims"] = check_claims(result["shapes"]["headline"]["forms"])
        print_claims(result["claims"])
    return result


def time_ms(function):
    """[median, 20th, 80th percentile] in ms; the L2 cache is cleared before every call."""
    import triton.testing

    quantiles = [0.5, 0.2, 0.8]
    return list(triton.testing.do_bench(function, warmup=25, rep=200, quantiles=quantiles))


def measure_copy():
    """Bytes per second, read and written, of a 4 GiB copy on the GPU: the better of two medians."""
    source = torch.ones(2**32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    medians = [time_ms(lambda: target.copy_(source))[0] for _ in range(2)]
    return 2 * source.nbytes / min(medians) * 1e3


def measure_shape(shape_name, shape, copy_rate, first_seed):
    """All forms on one shape: {form: row}, printed as they are measured."""
    # each shape is compiled for itself
    torch.compiler.reset()
    table = forms()
    rows = {}
    print(f"  {'':20} {' '.join(COLUMNS)}")
    for seed, (name, form) in enumerate(table.items(), first_seed):
        rows[name] = attempt(measure, form, shape, seed, copy_rate)
        print(f"  {name:20} {format_row(rows[name])}", flush=True)
        print_json(shape_name, name, rows[name])
    # after all times, which a profiler may spoil
    for name, row in rows.items():
        if "failed" not in row:
            row["launches"] = attempt(count_launches, table[name], shape)
            print(f"  {name:20} {row['launches']} launches in both passes", flush=True)
    return rows


def print_json(shape_name, name, row):
    """A row as one line of JSON, as soon as it is there: a run that is cut off loses nothing."""
    print(json.dumps({"shape": shape_name, "form": name, **row}), flush=True)


def format_row(row):
    if "failed" in row:
        return f"FAILED {row['failed']}"
    return " ".join(f"{row[key]:{len(key)}{style}}" for key, style in COLUMNS.items())


def measure(form, shape, seed, copy_rate):
    """One row of the table: correctness, then memory and times."""
    inputs, forward, step = prepare(form, shape, seed, "cuda", torch.bfloat16)
    errors = check(inputs, step, form.upstream)
    peak = peak_memory(step)
    forward_ms, _, _ = time_ms(forward)
    both_ms, both_20_ms, both_80_ms = time_ms(step)
    repeated_forward_ms, _, _ = time_ms(forward)
    repeated_both_ms, _, _ = time_ms(step)

    own_bytes = form.own_bytes(shape.f) * shape.L * shape.T * shape.D
    minimum_bytes = bytes_moved(inputs.hidden, inputs.base, inputs.plus, inputs.minus)
    rate = minimum_bytes / both_ms * 1e3
    return {
        "forward_ms": forward_ms,
        "backward_ms": both_ms - forward_ms,
        "both_ms": both_ms,
        "both_20_ms": both_20_ms,
        "both_80_ms": both_80_ms,
        "repeated_forward_ms": repeated_forward_ms,
        "repeated_both_ms": repeated_both_ms,
        "gb_per_s": rate / 1e9,
        "of_copy": rate / copy_rate,
        "own_gb_per_s": own_bytes / both_ms / 1e6,
        "predicted_ms": own_bytes / copy_rate * 1e3,
        "peak_gb": peak / 1e9,
        **errors,
    }


def peak_memory(step):
    """Peak bytes that a step allocates on the GPU, above those already in use."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def count_launches(form, shape):
    """Kernels, copies and fills of a forward and backward pass; None if the profiler sees none."""
    _, _, step = prepare(form, shape, 0, "cuda", torch.bfloat16)
    step()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        step()
        torch.cuda.synchronize()
    # the trace names its categories alike in all versions of PyTorch
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    categories = [event.get("cat") for event in events]
    return sum(categories.count(name) for name in ("kernel", "gpu_memcpy", "gpu_memset")) or None


def measure_variants(shape, copy_rate):
    """{variant: row} of the fused form launched or written in other ways, see bench_variants.py."""
    # needs Triton
    from kernel.bench_variants import VARIANTS, variant

    rows = {}
    for seed, name in enumerate(VARIANTS):
        with variant(name):
            rows[name] = attempt(measure, forms()["fused"], shape, seed, copy_rate)
        print(f"  {name:20} {format_row(rows[name])}", flush=True)
        print_json("headline", name, rows[name])
    return rows


def check_claims(rows):
    """What was predicted of the headline shape before any time was taken, and what was measured."""

    def value(name, key):
        return rows[name].get(key, math.nan)

    compiled_ms = [value(name, "both_ms") for name in rows if name.endswith("compiled")]
    best_compiled_ms = min((ms for ms in compiled_ms if not math.isnan(ms)), default=math.nan)
    fused_ms = value("fused", "both_ms")
    speedup = value("packed, eager", "both_ms") / fused_ms
    memory = value("fused", "peak_gb") / value("packed, eager", "peak_gb")
    return [
        claim("at least 0.85 of the copy's bandwidth", value("fused", "of_copy"), minimum=0.85),
        claim("at least 5 times as fast as packed eager", speedup, minimum=5.0),
        claim(
            "at least 1.3 times as fast as the best torch.compile form",
            best_compiled_ms / fused_ms,
            minimum=1.3,
        ),
        claim("at most half of packed eager's peak memory", memory, maximum=0.5),
    ]


def claim(text, value, minimum=-math.inf, maximum=math.inf):
    """A claim and whether it holds: hit is None where the value was not measured."""
    if math.isnan(value):
        return {"claim": text, "value": None, "hit": None}
    return {"claim": text, "value": value, "hit": minimum <= value <= maximum}


def print_claims(claims):
    print("predicted in advance, for headline:")
    for result in claims:
        if result["hit"] is None:
            verdict = "not measured"
        else:
            verdict = f"{'hit' if result['hit'] else 'MISS'} ({result['value']:.2f})"
        print(f"  {result['claim']}: {verdict}")


# ---------------------------------------------------------------- without a GPU


def on_cpu():
    table = forms()
    print("No GPU here: the bytes that a GPU would have to move, and two eager forms on the CPU.")
    return {"predicted": predict(table, SHAPES["headline"]), "cpu": compare_on_cpu(table)}


def predict(table, shape):
    """{form: bytes per element and predicted ms, for f = 1 and f = 0.5}, printed as a table."""
    elements = shape.L * shape.T * shape.D
    copy_rate = f"{PREDICTED_COPY_RATE / 1e12:.1f} TB/s (H100)"
    print("Bytes per element of a response token in bf16, for a share f of response rows.")
    print(f"PREDICTED ms at L {shape.L}, T {shape.T}, D {shape.D} for a copy at {copy_rate}:")
    print(f"  {'':20}  bytes, f = 1  f = .5   ms, f = 1  f = .5")
    predicted = {}
    for name, form in table.items():
        counts = [form.own_bytes(1.0), form.own_bytes(0.5)]
        ms = [1e3 * count * elements / PREDICTED_COPY_RATE for count in counts]
        predicted[name] = {"bytes_per_element": counts, "ms": ms}
        print(f"  {name:20} {counts[0]:13.0f} {counts[1]:7.0f} {ms[0]:11.2f} {ms[1]:7.2f}")
    return predicted


def compare_on_cpu(table):
    """{form: median ms of both passes and errors} for the authors' form and the torch backend."""
    print(f"Measured in fp32 with {torch.get_num_threads()} threads, {CPU_SHAPE}:")
    print("ms of forward and backward, median (20th to 80th percentile)")
    results = {}
    steps = {}
    for name in ("authors, eager", "torch backend"):
        inputs, _, steps[name] = prepare(table[name], CPU_SHAPE, 0, "cpu", torch.float32)
        results[name] = attempt(check, inputs, steps[name], 1.0)
        if "failed" in results[name]:
            print(f"  {name:20} FAILED {results[name]['failed']}")
            return results

    times = {name: [] for name in steps}
    for _ in range(CPU_ROUNDS):
        # in turn, so that other load on the machine falls on both
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - start))
    pairs = zip(times["authors, eager"], times["torch backend"])
    times["authors / backend"] = [authors / backend for authors, backend in pairs]
    for name, values in times.items():
        quantiles = torch.tensor(values).quantile(torch.tensor([0.5, 0.2, 0.8]))
        median, low, high = quantiles.tolist()
        result = results.setdefault(name, {})
        result |= {"median": median, "20_80": [low, high]}
        line = f"  {name:20} {median:8.2f} ({low:.2f}-{high:.2f})"
        if "gradient_error" in result:
            line += f", gradient_error {result['gradient_error']:.1e}"
        print(line)
    return results


if __name__ == "__main__":
    run(main, Config)
