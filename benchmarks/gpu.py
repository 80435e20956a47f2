"""torchcnn beside cuDNN on one GPU: python benchmarks/run.py conv|pool --device cuda [--layout ...] [--classes ...] [--csv FILE]

Every case is one layer in one direction and arithmetic: float32, tf32, float16, bfloat16. Torch, on NCHW and on channels_last
tensors, with the fastest algorithm that cuDNN finds by trial (benchmark=True) and with a deterministic one of its own choice
(deterministic=True, benchmark=False), and torchcnn in either layout take turns, once the results of torchcnn have been compared
with float64. CUDA events around one call take the time. Before each call a buffer twice as large as the L2 cache is written: no
tensor is in the cache then, and a pause lets the call be in the queue before its turn comes, so that its launch does not count.
What counts is the median. Each layout of
torchcnn has a row: the ratio is the time of torch's fastest over torchcnn's; `floor` is what part of torchcnn's time the floor of
gpu_model.py is, on the GPUs that it knows. The aims stand in floors.py; the exit status is 1 if one is missed or a result is
wrong. --kernels lists which kernels torchcnn's calls launch and how long each takes instead, which is much faster: cuDNN's
searches take most of the time.
"""

import collections
import contextlib
import csv
import functools
import math
import re
import statistics
import time
from pathlib import Path

import contenders
import floors
import gpu_model
import layers
import torch

import torchcnn

RESULTS = Path(__file__).parent / "results" / "cuda"
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = ("nchw", "channels_last")
KINDS = {"any": (True, False), "deterministic": (False, True)}  # cuDNN's switches: benchmark, deterministic
PEERS = [f"{layout}_{kind}" for layout in LAYOUTS for kind in KINDS]
ROUNDS, QUICK_ROUNDS = 11, 5
PAUSE, LONGEST_PAUSE = 200_000, 6_400_000  # cycles: 0.1 ms to 4 ms


def require_gpu():
    """The device; SystemExit with the reason where the benchmark cannot run."""
    if not torch.cuda.is_available():
        build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs alone"
        raise SystemExit(f"run.py: --device cuda needs a GPU, and torch sees none; torch {torch.__version__} was built {build}")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("torchcnn::conv2d", "CUDA"):
        raise SystemExit("run.py: torchcnn was built without CUDA kernels; build it again with TORCHCNN_CUDA=1")
    return "cuda"


def cudnn_version(number):
    """90102 is 9.1.2; before cuDNN 9, 8907 was 8.9.7."""
    thousands = 10_000 if number >= 90_000 else 1000
    return f"{number // thousands}.{number % thousands // 100}.{number % 100}"


def use_arithmetic(arithmetic):
    torch.backends.cudnn.conv.fp32_precision = "tf32" if arithmetic == "tf32" else "ieee"


def switched(function, benchmark, deterministic):
    """The function under cuDNN's switches; its choice of an algorithm is remembered with the second."""

    def call():
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, deterministic
        return function()

    return call


def by_direction(of_torch, ours, exact):
    """{layout: {direction: function}}, twice, and {direction: function} to {direction: (peers, torchcnn's, truth)}.

    The truth is computed once, whatever it is compared with, and without a search among algorithms: in float64 that takes long.
    """
    return {
        direction: (
            {
                f"{layout}_{kind}": switched(of_torch[layout][direction], *switches)
                for layout in LAYOUTS
                for kind, switches in KINDS.items()
            },
            {layout: calls[direction] for layout, calls in ours.items()},
            functools.cache(switched(exact[direction], False, True)),
        )
        for direction in exact
    }


# -------------------------------------------------------------------------------------------------------------- the cases


def conv_cases(group, layer, layouts, device):
    """(row, peers, torchcnn's functions by layout, the truth, the model's work) of each direction and arithmetic."""
    calls = {}
    for arithmetic, dtype in DTYPES.items():
        if dtype not in calls:
            tensors = contenders.conv_tensors(layer, dtype, device)
            of_layout = {layout: contenders.in_layout(layout, *tensors) for layout in LAYOUTS}
            calls = {
                dtype: by_direction(
                    {layout: contenders.torch_conv(layer, *of_layout[layout]) for layout in LAYOUTS},
                    {layout: contenders.torchcnn_conv(layer, *of_layout[layout], layout) for layout in layouts},
                    contenders.torch_conv(layer, *(x.double() for x in tensors)),
                )
            }
        for direction in floors.CONV[group]:
            work = gpu_model.conv_work(layer, direction.removesuffix("+bias"), modelled(arithmetic))
            yield row_of(group, layer, direction, arithmetic), *calls[dtype][direction], work


def pool_cases(group, layer, layouts, device):
    theirs, ours, options = contenders.pools(group, layer)
    for arithmetic in ("float32", "float16", "bfloat16"):
        input = torch.randn(layer.N, layer.C, layer.H, layer.H, device=device).to(DTYPES[arithmetic])
        grad_output = torch.randn_like(theirs(input))
        of_layout = {layout: contenders.in_layout(layout, input, grad_output) for layout in LAYOUTS}
        calls = by_direction(
            {layout: contenders.pool_calls(theirs, options, *of_layout[layout]) for layout in LAYOUTS},
            {layout: contenders.pool_calls(ours, options, *of_layout[layout]) for layout in layouts},
            contenders.pool_calls(theirs, options, input.double(), grad_output.double()),
        )
        index_bytes = {"forward": 8, "backward": 1} if options else {}
        for direction in floors.POOL[group]:
            work = None
            if direction != floors.TRAIN:
                work = gpu_model.pool_work(layer, group, direction, modelled(arithmetic), index_bytes.get(direction, 0))
            yield row_of(group, layer, direction, arithmetic), *calls[direction], work


def row_of(group, layer, direction, arithmetic):
    return {"class": group, "layer": layer.name, "direction": direction, "arithmetic": arithmetic}


def modelled(arithmetic):
    return "float16" if arithmetic == "bfloat16" else arithmetic


def cases(table, groups, layouts, quick, device):
    for group in groups:
        if table == "conv":
            members, of = layers.CONV[group], conv_cases
        else:
            members = {"global": layers.GLOBAL_POOL, "adaptive": layers.ADAPTIVE_POOL}.get(group.split()[0], layers.POOL)
            of = pool_cases
        for layer in members:
            if not (quick and table == "conv" and contenders.too_large_to_be_quick(layer)):
                yield from of(group, layer, layouts, device)


# ------------------------------------------------------------------------------------------------------------ measurement


def flush_buffer():
    size = torch.cuda.get_device_properties().L2_cache_size
    return torch.empty(2 * max(size, 64 << 20), dtype=torch.int8, device="cuda")


def warm_up(functions):
    """cuDNN times its algorithms, kernels are loaded."""
    for function in functions.values():
        for _ in range(2):
            function()


def microseconds(functions, rounds):
    """The median time of each function, taken in turns."""
    flush, events = flush_buffer(), {name: [] for name in functions}
    pauses = dict.fromkeys(functions, PAUSE)
    for _ in range(rounds):
        for name, function in functions.items():
            while True:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(pauses[name])
                flush.zero_()
                begin.record()
                function()
                end.record()
                # Its turn came before the whole call was in the queue: once more, after a longer pause.
                if begin.query() and pauses[name] < LONGEST_PAUSE:
                    pauses[name] *= 2
                else:
                    break
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: 1e3 * statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}


def kernels_of(function):
    """{name: microseconds} of the CUDA kernels that a call launches, with cold caches; the profiler takes the time."""
    flush, calls, taken = flush_buffer(), 4, collections.Counter()
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            flush.zero_()
            function()
        torch.cuda.synchronize()
    for event in profile.events():
        of_flush = "FillFunctor<signed char>" in event.name or "Memset" in event.name
        if event.device_type == torch.autograd.DeviceType.CUDA and not of_flush:
            taken[event.name] += event.device_time / calls
    return taken


def aim_of(group, arithmetic):
    """The least geometric mean of a class's ratios; None where there is none."""
    if "pool" in group or group.split()[0] in ("global", "adaptive", "small", "depthwise"):
        return floors.CUDA_SMALL
    return None if arithmetic == "float32" else floors.CUDA_TENSOR_CORES


def known_gpu(name):
    """The GPU of gpu_model.py that it is; the boards with another memory or fewer multiprocessors are not."""
    if re.search("PCIE|NVL|40GB", name.upper()):
        return None
    return next((gpu for gpu in gpu_model.GPUS if re.search(rf"\b{gpu.name}\b", name)), None)


@contextlib.contextmanager
def counted(seconds, what):
    begin = time.perf_counter()
    yield
    seconds[what] += time.perf_counter() - begin


# ------------------------------------------------------------------------------------------------------------- the report


def line(row):
    text = f"{row['layer']:28} {row['direction']:16} {row['arithmetic']:8} {row['layout']:13} {row['error']:8.1e}"
    text += "".join(f" {row[peer + '_us']:9.1f}" for peer in PEERS)
    text += f" {row['torchcnn_us']:9.1f} {row['ratio']:6.2f}x {row['deterministic_ratio']:6.2f}x"
    text += f" {row['floor']:6.0%}" if "floor" in row else ""
    return text + ("  WRONG" if row["wrong"] else "")


def verdicts(rows):
    """The closing lines, one for each class, direction, arithmetic and layout, and whether all pass."""
    keys, lines, passed = ("class", "direction", "arithmetic", "layout"), [], True
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        members = [row for row in rows if tuple(row[name] for name in keys) == key]
        mean = math.exp(statistics.fmean(math.log(row["ratio"]) for row in members))
        worst, aim = min(members, key=lambda row: row["ratio"]), aim_of(key[0], key[2])
        wrong = [row["layer"] for row in members if row["wrong"]]
        good = not wrong and (aim is None or mean >= aim)
        passed &= good
        what = "no aim" if aim is None else f"aim {aim:.2f}"
        text = f"{key[0]:13} {key[1]:16} {key[2]:8} {key[3]:13} mean {mean:5.2f} ({what}) worst {worst['ratio']:5.2f}"
        text += f" {worst['layer']:28}" + (" pass" if good else " MISS")
        lines.append(text + (f" wrong: {', '.join(wrong)}" if wrong else ""))
    return lines, passed


def main(args, machine=None):
    device = require_gpu()
    machine = machine or {
        "gpu": torch.cuda.get_device_name(),
        "torch_version": torch.__version__,
        "cudnn_version": cudnn_version(torch.backends.cudnn.version()),
    }
    table = {"conv": floors.CONV, "pool": floors.POOL}[args.table]
    prefixes = tuple(args.classes.split(",")) if args.classes else ("",)
    groups = [name for name in table if name.startswith(prefixes)]
    if not groups:
        raise SystemExit(f"run.py: no class of {args.table} begins with {args.classes!r}: {', '.join(table)}")
    gpu, layouts = known_gpu(machine["gpu"]), [args.layout] if args.layout else LAYOUTS
    print(
        f"{args.table}, torchcnn {torchcnn.__version__} beside torch {machine['torch_version']} and cuDNN "
        f"{machine['cudnn_version']} on {machine['gpu']}, in us"
    )
    torch.manual_seed(0)
    rows, shown, seconds = [], None, collections.Counter()
    wanted = args.arithmetics.split(",") if args.arithmetics else list(DTYPES)
    partly = bool(args.quick or args.classes or args.layout or set(wanted) != set(DTYPES))
    mode = torch.inference_mode if args.table == "conv" else torch.enable_grad
    with mode():
        for case, peers, ours, exact, work in cases(args.table, groups, layouts, args.quick, device):
            if args.seconds is not None and sum(seconds.values()) > args.seconds:
                print(f"\nThe rest is left out: {args.seconds} seconds are over.")
                partly = True
                break
            if case["arithmetic"] not in wanted:
                continue
            dtype, allowed = DTYPES[case["arithmetic"]], floors.CUDA_ERROR[case["arithmetic"]]
            use_arithmetic(case["arithmetic"])
            functions = peers | {f"torchcnn_{layout}": function for layout, function in ours.items()}
            with counted(seconds, "comparing with float64"):
                checked = {layout: contenders.check(function(), exact(), dtype, allowed) for layout, function in ours.items()}
            if args.kernels:
                for layout, function in ours.items():
                    kernels = kernels_of(function)
                    what = f"{case['layer']} {case['direction']} {case['arithmetic']} {layout}"
                    print(f"\n{what}: {sum(kernels.values()):.1f} us" + "  WRONG" * checked[layout][1])
                    for name, taken in kernels.items():
                        print(f"{taken:10.1f}  {name[:140]}", flush=True)
                continue
            with counted(seconds, "warming up, with cuDNN's searches"):
                warm_up(functions)
            with counted(seconds, "measuring"):
                times = microseconds(functions, QUICK_ROUNDS if args.quick else ROUNDS)
            if case["class"] != shown:
                shown = case["class"]
                heads = "".join(f" {head:>9}" for head in ("nchw", "determ.", "last", "determ.", "ours"))
                print(f"\n{shown:54} {'ours':13} {'error':>8}{heads}   ratio determ.  floor")
            for layout, (error, wrong) in checked.items():
                mine = times[f"torchcnn_{layout}"]
                row = case | {"layout": layout, "error": error, "wrong": wrong}
                row |= {f"{peer}_us": times[peer] for peer in PEERS} | {"torchcnn_us": mine}
                row["ratio"] = min(times[peer] for peer in PEERS) / mine
                row["deterministic_ratio"] = min(times[peer] for peer in PEERS if "deterministic" in peer) / mine
                if gpu and work:
                    row["floor"] = work.floor(gpu) / mine
                print(line(row), flush=True)
                rows.append(row)
    if args.kernels:
        return 0
    if not rows:
        raise SystemExit(f"run.py: no case of {args.table} was measured: not one in {', '.join(wanted)} before the time was over")
    lines, passed = verdicts(rows)
    print("", *lines, "", "; ".join(f"{what} {taken:.0f} s" for what, taken in seconds.items()), sep="\n")
    path = Path(args.csv) if args.csv else RESULTS / f"{args.table}_{re.sub('[^A-Za-z0-9]+', '_', machine['gpu'])}.csv"
    if args.csv or not partly:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as file:
            columns = list(dict.fromkeys(column for row in rows for column in [*machine, *row]))
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for row in rows:
                writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in {**machine, **row}.items()})
    return 0 if passed else 1
