"""torchcnn beside cuDNN on one GPU: python benchmarks/run.py conv|pool --device cuda [--layout ...] [--classes ...] [--csv FILE]

Every case is one layer in one direction and arithmetic: float32, tf32, float16, bfloat16. First the result is compared with
float64. Then torch, on NCHW and on channels_last tensors, with cuDNN's deterministic algorithms and with all of them
(benchmark=True: cuDNN times them and takes the fastest), and torchcnn take turns. Time is taken by CUDA events around one call.
Before each call a buffer twice as large as the L2 cache is written: no tensor is in the cache then, and the call is in the queue
before its turn comes, so that its launch does not count. What counts is the median. The ratio is the time of torch's fastest over
torchcnn's; `floor` is what part of torchcnn's time the floor of gpu_model.py is, on the GPUs that it knows. The aims stand in
floors.py; the exit status is 1 if one is missed or a result is wrong.
"""

import csv
import math
import re
import statistics
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
PEERS = [f"{layout}_{kind}" for layout in LAYOUTS for kind in ("any", "deterministic")]
ROUNDS, QUICK_ROUNDS = 25, 5


def require_gpu():
    """The device; SystemExit with the reason where the benchmark cannot run."""
    if not torch.cuda.is_available():
        build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs alone"
        raise SystemExit(f"run.py: --device cuda needs a GPU, and torch sees none; torch {torch.__version__} was built {build}")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("torchcnn::conv2d", "CUDA"):
        raise SystemExit("run.py: torchcnn was built without CUDA kernels; build it again with TORCHCNN_CUDA=1")
    return "cuda"


def use_arithmetic(arithmetic):
    torch.backends.cudnn.conv.fp32_precision = "tf32" if arithmetic == "tf32" else "ieee"
    torch.backends.cudnn.benchmark = True


def deterministic(function, value):
    """The function under cuDNN's switch, which cuDNN's choice of an algorithm is remembered with."""

    def call():
        torch.backends.cudnn.deterministic = value
        return function()

    return call


def with_both(calls):
    """{layout: {direction: function}} to {direction: {peer: function}}."""
    return {
        direction: {
            f"{layout}_{kind}": deterministic(calls[layout][direction], kind == "deterministic")
            for layout in calls
            for kind in ("any", "deterministic")
        }
        for direction in calls["nchw"]
    }


# -------------------------------------------------------------------------------------------------------------- the cases


def conv_cases(group, layer, layout, device):
    """(row, peers, torchcnn's function, exact function, the model's work) of each direction and arithmetic."""
    for arithmetic, dtype in DTYPES.items():
        use_arithmetic(arithmetic)
        tensors = [x.to(device) for x in contenders.conv_tensors(layer, dtype)]
        theirs = with_both({name: contenders.torch_conv(layer, *contenders.in_layout(name, *tensors)) for name in LAYOUTS})
        ours = contenders.torchcnn_conv(layer, *contenders.in_layout(layout, *tensors), layout)
        exact = contenders.torch_conv(layer, *(x.double() for x in tensors))
        for direction in floors.CONV[group]:
            modelled = "float16" if arithmetic == "bfloat16" else arithmetic
            work = gpu_model.conv_work(layer, direction.removesuffix("+bias"), modelled)
            row = {"class": group, "layer": layer.name, "direction": direction, "arithmetic": arithmetic}
            yield row, theirs[direction], ours[direction], exact[direction], work


def pool_cases(group, layer, layout, device):
    theirs, ours, options = contenders.pools(group, layer)
    for arithmetic in ("float32", "float16", "bfloat16"):
        input = torch.randn(layer.N, layer.C, layer.H, layer.H).to(device, DTYPES[arithmetic])
        grad_output = torch.randn_like(theirs(input))
        calls = {
            name: contenders.pool_calls(theirs, options, *contenders.in_layout(name, input, grad_output)) for name in LAYOUTS
        }
        mine = contenders.pool_calls(ours, options, *contenders.in_layout(layout, input, grad_output))
        exact = contenders.pool_calls(theirs, options, input.double(), grad_output.double())
        peers = with_both(calls)
        index_bytes = {"forward": 8, "backward": 1} if options else {}
        for direction in floors.POOL[group]:
            work = None
            if direction != floors.TRAIN:
                modelled = "float16" if arithmetic == "bfloat16" else arithmetic
                work = gpu_model.pool_work(layer, group, direction, modelled, index_bytes.get(direction, 0))
            row = {"class": group, "layer": layer.name, "direction": direction, "arithmetic": arithmetic}
            yield row, peers[direction], mine[direction], exact[direction], work


def cases(table, groups, layout, quick, device):
    for group in groups:
        if table == "conv":
            members, of = layers.CONV[group], conv_cases
        else:
            members = {"global": layers.GLOBAL_POOL, "adaptive": layers.ADAPTIVE_POOL}.get(group.split()[0], layers.POOL)
            of = pool_cases
        for layer in members:
            if not (quick and table == "conv" and contenders.too_large_to_be_quick(layer)):
                yield from of(group, layer, layout, device)


# ------------------------------------------------------------------------------------------------------------ measurement


def flush_buffer():
    size = torch.cuda.get_device_properties().L2_cache_size
    return torch.empty(2 * max(size, 64 << 20), dtype=torch.int8, device="cuda")


def microseconds(functions, rounds):
    """The median time of each function, taken in turns."""
    flush = flush_buffer()
    for function in functions.values():
        for _ in range(3):  # cuDNN times its algorithms, kernels are loaded
            function()
    events = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(2_000_000)  # about a millisecond, in which the call reaches the queue
            flush.zero_()
            begin.record()
            function()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: 1e3 * statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}


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


# ------------------------------------------------------------------------------------------------------------- the report


def line(row):
    text = f"{row['layer']:28} {row['direction']:16} {row['arithmetic']:8} {row['error']:8.1e}"
    text += "".join(f" {row[peer + '_us']:9.1f}" for peer in PEERS)
    text += f" {row['torchcnn_us']:9.1f} {row['ratio']:6.2f}x {row['deterministic_ratio']:6.2f}x"
    text += f" {row['floor']:6.0%}" if "floor" in row else ""
    return text + ("  WRONG" if row["wrong"] else "")


def verdicts(rows):
    """The closing lines, one for each class, direction and arithmetic, and whether all pass."""
    keys, lines, passed = ("class", "direction", "arithmetic"), [], True
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        members = [row for row in rows if tuple(row[name] for name in keys) == key]
        mean = math.exp(statistics.fmean(math.log(row["ratio"]) for row in members))
        worst, aim = min(members, key=lambda row: row["ratio"]), aim_of(key[0], key[2])
        wrong = [row["layer"] for row in members if row["wrong"]]
        good = not wrong and (aim is None or mean >= aim)
        passed &= good
        what = "no aim" if aim is None else f"aim {aim:.2f}"
        text = f"{key[0]:18} {key[1]:16} {key[2]:8} mean {mean:5.2f} ({what}) worst {worst['ratio']:5.2f} {worst['layer']:28}"
        lines.append(text + (" pass" if good else f" MISS {'wrong: ' * bool(wrong)}{', '.join(wrong)}"))
    return lines, passed


def main(args, machine=None):
    device = require_gpu()
    machine = machine or {"gpu": torch.cuda.get_device_name(), "torch_version": torch.__version__, "layout": args.layout}
    table = {"conv": floors.CONV, "pool": floors.POOL}[args.table]
    prefixes = tuple(args.classes.split(",")) if args.classes else ("",)
    groups = [name for name in table if name.startswith(prefixes)]
    if not groups:
        raise SystemExit(f"run.py: no class of {args.table} begins with {args.classes!r}: {', '.join(table)}")
    gpu = known_gpu(machine["gpu"])
    print(
        f"{args.table}, torchcnn {torchcnn.__version__} {args.layout} beside torch {torch.__version__} on {machine['gpu']}, in us"
    )
    torch.manual_seed(0)
    rows, shown = [], None
    mode = torch.inference_mode if args.table == "conv" else torch.enable_grad
    with mode():
        for row, peers, ours, exact, work in cases(args.table, groups, args.layout, args.quick, device):
            use_arithmetic(row["arithmetic"])
            allowed = floors.CUDA_ERROR[row["arithmetic"]]
            row["error"], row["wrong"] = contenders.check(ours(), exact(), DTYPES[row["arithmetic"]], allowed)
            times = microseconds({**peers, "torchcnn": ours}, QUICK_ROUNDS if args.quick else ROUNDS)
            row |= {f"{name}_us": time for name, time in times.items()}
            row["ratio"] = min(times[peer] for peer in PEERS) / times["torchcnn"]
            row["deterministic_ratio"] = min(times[peer] for peer in PEERS if "deterministic" in peer) / times["torchcnn"]
            if gpu and work:
                row["floor"] = work.floor(gpu) / times["torchcnn"]
            if row["class"] != shown:
                shown = row["class"]
                heads = "".join(f" {head:>9}" for head in ("nchw", "determ.", "last", "determ.", "ours"))
                print(f"\n{shown:54} {'error':>8}{heads}   ratio determ.  floor")
            print(line(row), flush=True)
            rows.append(row)
    lines, passed = verdicts(rows)
    print("", *lines, sep="\n")
    path = (
        Path(args.csv) if args.csv else RESULTS / f"{args.table}_{args.layout}_{re.sub('[^A-Za-z0-9]+', '_', machine['gpu'])}.csv"
    )
    if args.csv or not (args.quick or args.classes):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as file:
            columns = list(dict.fromkeys(column for row in rows for column in [*machine, *row]))
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for row in rows:
                writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in {**machine, **row}.items()})
    return 0 if passed else 1
