"""Correctness, then speed, of torchcnn beside torch on one machine: python benchmarks/run.py TABLE [options]

conv, pool: layers in float32; dtypes: convolution in others; networks: a call that computes next to nothing, and LeNet-5 and a
block of ResNet-18, eager and compiled; models: some of torchvision (pip install torchvision), untrained,
through torchcnn.convert.

Every case is one kind of layer in one direction. First its result and torch's are compared with float64: the error is the
largest difference, relative to the largest value (of all of a model's gradients, for its training step). Then torch on NCHW
tensors, torch on channels_last tensors and torchcnn take turns, in random order, in this one process, until 5 rounds and 0.3 s
are over. What counts is processor time on one thread, where other programs disturb it least, and elapsed time on more.
Milliseconds are the least of the rounds. The ratio is torch's time over torchcnn's, the median over the rounds, against torch's
better layout (pools without autograd: NCHW alone, as their floors are meant); a ~ marks one that the ratio of the least times
puts more than 10% elsewhere. On more threads it is the ratio of the least times. In parentheses the ratio in a second process,
where the allocator is in its default state. At the end each class has a line: geometric mean and worst ratio, with their floors;
exit status 1 if one is missed or a result is wrong.
"""

import argparse
import csv
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import floors
import timing

RESULTS = Path(__file__).parent / "results"
# fmt: off
COLUMNS = [
    "class", "layer", "direction", "layout", "threads", "dtype", "torch_nchw_ms", "torch_channels_last_ms", "torchcnn_ms",
    "ratio", "default_allocator_ratio", "gflops", "error", "torch_error", "isa", "algorithm", "torch_version", "cpu", "torch_isa",
    "ratio_of_minima", "one_thread_ratio", "scaling", "copy_scaling", "copy_bandwidth_fraction", "float32_ratio", "saved_us",
    "wrong", "mean_floor", "worst_floor",
]
# fmt: on
ARITHMETICS = ("float32", "tf32", "float16", "bfloat16")  # of GPUs


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["conv", "pool", "dtypes", "networks", "models"])
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="cuda: beside cuDNN, as gpu.py says; conv and pool"
    )
    parser.add_argument("--threads", type=int, default=1, help="with 2, conv also measures what the second thread gains")
    parser.add_argument(
        "--layout", choices=["nchw", "channels_last"], help="of torchcnn's tensors: nchw without it, both with --device cuda"
    )
    parser.add_argument("--classes", help="only the classes whose names begin with one of these, separated by commas")
    parser.add_argument("--arithmetics", help=f"with --device cuda, only these of {', '.join(ARITHMETICS)}, separated by commas")
    parser.add_argument("--seconds", type=int, help="with --device cuda, begin no case after so many; cuDNN's searches take long")
    parser.add_argument("--kernels", action="store_true", help="with --device cuda, only the kernels of torchcnn and their times")
    parser.add_argument("--quick", action="store_true", help="no large layers, few rounds, no second process; under a minute")
    parser.add_argument("--csv", help="where to write the rows; a whole run writes into benchmarks/results/ anyway")
    parser.add_argument("--torch-isa", choices=["native", "avx2"], default="native", help="avx2: keep torch from AVX-512 and AMX")
    parser.add_argument("--allocator", choices=["warm", "default"], default="warm", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == "cuda" and args.table not in ("conv", "pool"):
        parser.error("--device cuda measures conv and pool, in every dtype")
    if args.device == "cpu" and (args.arithmetics or args.seconds is not None or args.kernels):
        parser.error("--arithmetics, --seconds and --kernels are options of --device cuda")
    if unknown := set((args.arithmetics or ARITHMETICS[0]).split(",")) - set(ARITHMETICS):
        parser.error(f"--arithmetics must be of {', '.join(ARITHMETICS)}, got {', '.join(sorted(unknown))}")
    if args.device == "cpu":
        args.layout = args.layout or "nchw"
    return args


def prepare(args):
    """What must be done before torch is imported."""
    if args.allocator == "warm":
        timing.warm_allocator()
    if args.torch_isa == "avx2":
        os.environ.update(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2")


def default_allocator_ratios(argv):
    """The ratios that the same command finds in a process of its own, whose allocator is left as it is."""
    print("(first the same in a process with the default allocator, for the ratios in parentheses)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        command = [sys.executable, __file__, *argv, "--allocator", "default", "--csv", str(path)]
        result = subprocess.run(command, stdout=subprocess.DEVNULL)
        if result.returncode not in (0, 1) or not path.exists():
            raise SystemExit(f"run.py: the run with the default allocator ended with status {result.returncode}")
        with open(path, newline="") as file:
            return {(row["class"], row["layer"], row["direction"]): float(row["ratio"]) for row in csv.DictReader(file)}


# ------------------------------------------------------------------------------------------------------------ measurement


def measure(case, args):
    """One row of the table."""
    import contenders
    import torch

    use_threads = torch.set_num_threads
    use_threads(args.threads)
    row = {"class": case.group, "layer": case.layer, "direction": case.direction, "dtype": case.dtype}
    if args.allocator == "warm":
        allowed, as_checked = floors.ERROR[case.dtype], contenders.tuples
        if case.direction == floors.STEP:
            allowed = floors.NETWORK_GRADIENT_ERROR
        if case.direction == floors.STEP and args.table == "models":
            as_checked = contenders.one_vector
        truth = as_checked(case.truth())
        dtype = getattr(torch, case.dtype)
        row["error"], row["wrong"] = contenders.check(as_checked(case.contenders["torchcnn"]()), truth, dtype, allowed)
        row["torch_error"], _ = contenders.check(as_checked(case.contenders["torch_nchw"]()), truth, dtype, allowed)
        del truth

    scaling = args.table == "conv" and args.threads > 1 and args.allocator == "warm"
    functions = {**case.contenders, **case.extras}
    if scaling:
        functions["copy"] = contenders.copy_of(case.bytes)
    turns = {name: (function, args.threads) for name, function in functions.items()}
    if scaling:
        turns |= {f"{name} alone": (function, 1) for name, function in functions.items()}
    if args.allocator == "default":
        seconds, rounds = 0.1, 3
    else:
        seconds, rounds = (0.05, 5) if args.quick else (0.3, 5)
    times = timing.interleave(turns, seconds, rounds, use_threads)
    least = {name: min(taken) for name, taken in times.items()}

    def ratio(numerator, denominator):
        # On more threads one that loses its core for a moment stalls the others, so that most rounds can be bad.
        if args.threads > 1:
            return least[numerator] / least[denominator]
        return timing.ratio(times[numerator], times[denominator])

    def best(suffix=""):
        return min((name + suffix for name in case.peers), key=least.get)

    row |= {f"{name}_ms": 1e3 * least[name] for name in case.contenders}
    row["ratio"], row["ratio_of_minima"] = ratio(best(), "torchcnn"), least[best()] / least["torchcnn"]
    if case.flops:
        row |= {"gflops": 1e-9 * case.flops / least["torchcnn"], "algorithm": case.algorithm}
    if scaling:
        row["one_thread_ratio"] = ratio(best(" alone"), "torchcnn alone")
        row["scaling"] = ratio("torchcnn alone", "torchcnn")
        row["copy_scaling"] = ratio("copy alone", "copy")
        heavy = case.flops / case.bytes >= floors.COMPUTE_BOUND_INTENSITY
        heavy &= 1e3 * least["torchcnn alone"] > floors.COMPUTE_BOUND_MS
        if args.threads == 2:
            row["scaling_floor"] = floors.COMPUTE_BOUND_SCALING if heavy else floors.COPY_SCALING * row["copy_scaling"]
    elif "copy" in case.extras:
        row["copy_bandwidth_fraction"] = ratio("copy", "torchcnn")
    if (case.group, case.direction) == ("one call", floors.FORWARD):
        row["saved_us"] = 1e6 * (least[best()] - least["torchcnn"])
    if "float32" in case.extras:
        row["float32_ratio"] = ratio("float32", "torchcnn")
    return row


# ------------------------------------------------------------------------------------------------------------- the report


def line(row):
    """A row of the table as it is printed."""
    error = f"{row['error']:8.1e} {row['torch_error']:8.1e}" if "error" in row else ""
    unsure = "~" if abs(math.log(row["ratio"] / row["ratio_of_minima"])) > math.log(1.1) else " "
    default = f"({row['default_allocator_ratio']:.2f}x)" if "default_allocator_ratio" in row else ""
    text = f"{row['layer']:28} {row['direction']:16} {error} {row['torch_nchw_ms']:9.3f} {row['torch_channels_last_ms']:9.3f}"
    text += f" {row['torchcnn_ms']:9.3f} {row['ratio']:6.2f}x{unsure}{default:>9}"
    text += f" {row['gflops']:6.1f} {row['algorithm']}" if "gflops" in row else ""
    if "scaling" in row:
        text += f"  one thread {row['one_thread_ratio']:.2f}x, scaling {row['scaling']:.2f}, a copy {row['copy_scaling']:.2f}"
    if "copy_bandwidth_fraction" in row:
        text += f"  {row['copy_bandwidth_fraction']:.0%} of a copy's bandwidth"
    if "saved_us" in row:
        text += f"  {-row['saved_us']:.1f} us longer"
    if "float32_ratio" in row:
        text += f"  {row['float32_ratio']:.2f}x own float32"
    return text + ("  WRONG" if row.get("wrong") else "")


def geometric_mean(values):
    return math.exp(statistics.fmean(map(math.log, values)))


def torch_is_fast_with_halves(args):
    return args.torch_isa == "native" and bool(timing.cpu_flags() & {"avx512_bf16", "amx_tile", "bf16"})


def floors_of(group, direction, args):
    """The floors of a class's geometric mean and of its worst layer; None where there is none."""
    if args.table == "conv" and args.threads > 1:
        return None, None
    if args.table == "conv":
        return (floors.CONV if args.layout == "nchw" else floors.CONV_CHANNELS_LAST)[group][direction]
    if args.layout != "nchw" or (group.split()[0] in ("bfloat16", "float16") and torch_is_fast_with_halves(args)):
        return None, None
    return floors.TABLES[args.table][group][direction]


def verdict(group, direction, rows, args):
    """The closing lines of one class in one direction, and whether it passes."""
    floors_met, missed = 0, [f"a wrong result: {row['layer']}" for row in rows if row.get("wrong")]

    def against(what, value, floor):
        nonlocal floors_met
        if floor is None:
            return f"{value:6.2f}{'':14}"
        if value >= floor:
            floors_met += 1
        else:
            missed.append(f"{what}: {value:.2f}, floor {floor:.2f}")
        return f"{value:6.2f} (floor {floor:5.2f})"

    def each(column, what, floor):
        """The least of a column, every row of which must reach a floor."""
        of = [row for row in rows if column in row]
        if not of:
            return ""
        for row in of:
            against(f"{what}, {row['layer']}", row[column], row.get("scaling_floor") if column == "scaling" else floor)
        return f"  {what} {min(row[column] for row in of):.2f} or more"

    mean, worst = geometric_mean([row["ratio"] for row in rows]), min(rows, key=lambda row: row["ratio"])
    text = f"{group:18} {direction:16} mean {against('mean', mean, rows[0]['mean_floor'])}"
    text += f" worst {against('worst, ' + worst['layer'], worst['ratio'], worst['worst_floor'])} {worst['layer']:28}"
    if "one_thread_ratio" in rows[0]:
        kept = mean / geometric_mean([row["one_thread_ratio"] for row in rows])
        text += f" of one thread's {against('of the ratio on one thread', kept, floors.TWO_THREADS_RATIO)}"
    text += each("scaling", "scaling", None)
    text += each("copy_bandwidth_fraction", "of a copy's bandwidth", floors.COPY_BANDWIDTH if args.layout == "nchw" else None)
    text += each("float32_ratio", "of torchcnn's float32 speed", 1 / floors.HALF_SLOWDOWN)
    text += each("saved_us", "us saved", floors.CALL_SAVES_US)
    if missed:
        return "\n    ".join([text + "  MISS", *missed]), False
    return text + ("  pass" if floors_met else "  no floor"), True


def write_csv(path, rows, machine):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in {**machine, **row}.items()})


def main(argv):
    args = parse(argv)
    if args.device == "cuda":
        import gpu

        return gpu.main(args)
    prepare(args)
    import contenders
    import torch

    import torchcnn

    table, names, mode = contenders.TABLES[args.table]
    prefixes = tuple(args.classes.split(",")) if args.classes else ("",)
    groups = [name for name in names if name.startswith(prefixes)]
    if not groups:
        raise SystemExit(f"run.py: no class of {args.table} begins with {args.classes!r}: {', '.join(names)}")
    machine = {
        "layout": args.layout,
        "threads": args.threads,
        "isa": torchcnn.isa(),
        "torch_version": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability().lower(),
        "cpu": timing.cpu_name(),
    }
    print(
        f"{args.table}, torchcnn {args.layout} on {args.threads} thread(s): torchcnn {torchcnn.__version__} ({machine['isa']}) "
        f"beside torch {torch.__version__} ({machine['torch_isa']}) on {machine['cpu']} under {platform.system()}"
    )
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > 1:
        print(f"(other programs are running, about {load:.0f} of them on {os.cpu_count()} cores: the times suffer)")
    default_ratios = default_allocator_ratios(argv) if args.allocator == "warm" and not args.quick else {}

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    rows, shown = [], None
    with mode():
        for case in table(groups, args.layout, args.quick):
            row = measure(case, args)
            row["mean_floor"], row["worst_floor"] = floors_of(case.group, case.direction, args)
            key = case.group, case.layer, case.direction
            if key in default_ratios:
                row["default_allocator_ratio"] = default_ratios[key]
            if case.group != shown:
                heading = (
                    f"\n{case.group:45} {'error':>8} {'torch':>8} {'nchw ms':>9} {'last ms':>9} {'ours ms':>9}   ratio (default)"
                )
                print(heading + ("   GF/s" if case.flops else ""))
                shown = case.group
            print(line(row), flush=True)
            rows.append(row)

    print()
    passed = True
    for group, direction in dict.fromkeys((row["class"], row["direction"]) for row in rows):
        members = [row for row in rows if (row["class"], row["direction"]) == (group, direction)]
        text, good = verdict(group, direction, members, args)
        print(text)
        passed &= good
    if args.csv:
        write_csv(Path(args.csv), rows, machine)
    elif not (args.quick or args.classes):
        write_csv(RESULTS / f"{args.table}_{args.layout}_{args.threads}.csv", rows, machine)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
