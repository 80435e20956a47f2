"""The picture and the README's tables from the CSV files of run.py: python benchmarks/plot.py [--readme README.md]

Draws speedup.png and speedup.svg beside the CSV files and prints the tables in markdown. With --readme they also replace what
stands between the marker comments in that file: a pair for the tables of processors, another for those of GPUs, which stays as it
is where no GPU has been measured.
"""

import argparse
import csv
import math
import os
import statistics
from pathlib import Path

import floors

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
GPU_BEGIN, GPU_END = "<!-- benchmarks on a GPU: begin -->", "<!-- benchmarks on a GPU: end -->"
TITLES = {
    "conv": "Convolution, float32",
    "pool": "Pooling, float32",
    "dtypes": "Convolution in other dtypes",
    "networks": "Calls and networks, float32",
    "models": "Models of torchvision, float32",
}
TENSORS = {"nchw": "NCHW tensors", "channels_last": "channels_last tensors"}
COLORS = {
    floors.FORWARD: "#0072b2",
    floors.GRAD_INPUT: "#e69f00",
    floors.GRAD_WEIGHT: "#009e73",
    "backward": "#e69f00",
    floors.TRAIN: "#cc79a7",
    floors.INFERENCE: "#0072b2",
    floors.STEP: "#cc79a7",
}


def rows_in(folder, of_gpus):
    for path in sorted(folder.rglob("*.csv")):
        with open(path, newline="") as file:
            yield from (row for row in csv.DictReader(file) if ("gpu" in row) == of_gpus)


def read(folder):
    """Rows by (table, layout, threads, instruction sets) and then (class, direction); of two for a case the later counts."""
    cases = {}
    for row in rows_in(folder, of_gpus=False):
        table = next(name for name, classes in floors.TABLES.items() if row["class"] in classes)
        setting = table, row["layout"], int(row["threads"]), f"{row['isa']} beside torch's {row['torch_isa']}"
        cases[(*setting, row["class"], row["direction"], row["layer"])] = row
    tables, layouts = list(floors.TABLES), ["nchw", "channels_last"]
    settings = {}

    def place(key):
        table, layout, threads, isa, group, *_ = key
        return isa, tables.index(table), threads, layouts.index(layout), list(floors.TABLES[table]).index(group)

    for key in sorted(cases, key=place):
        settings.setdefault(key[:4], {}).setdefault(key[4:6], []).append(cases[key])
    return settings


def read_gpu(folder):
    """Rows by (table, layout, GPU, torch, cuDNN) and then (class, direction) and arithmetic."""
    settings = {}
    for row in rows_in(folder, of_gpus=True):
        table = "conv" if row["class"] in floors.TABLES["conv"] else "pool"
        setting = table, row["layout"], row["gpu"], row["torch_version"], row["cudnn_version"]
        cells = settings.setdefault(setting, {}).setdefault((row["class"], row["direction"]), {})
        cells.setdefault(row["arithmetic"], []).append(row)
    return settings


def ratios(rows):
    return [float(row["ratio"]) for row in rows]


# ------------------------------------------------------------------------------------------------------------- the tables


def title(setting):
    table, layout, threads, isa = setting
    return f"{TITLES[table]}, {TENSORS[layout]}, {'one thread' if threads == 1 else f'{threads} threads'}, {isa}"


def measured_with(members):
    rows = [row for group in members.values() for row in group]
    return ", ".join([*sorted({f"torch {row['torch_version']}" for row in rows}), *sorted({row["cpu"] for row in rows})])


def markdown(settings):
    """Every setting as a table, a row a class, a column a direction: geometric mean, worst layer."""
    lines = ["Times faster than torch: geometric mean of the class, and in parentheses its slowest layer."]
    lines[0] += " Below 1 torchcnn is slower. torch counts in the better of its layouts, except for a pool's forward and"
    lines[0] += " backward alone, which are compared on NCHW tensors."
    for setting, members in settings.items():
        directions = list(dict.fromkeys(direction for _, direction in members))
        lines += [
            "",
            f"**{title(setting)}, {measured_with(members)}**",
            "",
            f"| class | {' | '.join(directions)} |",
            "| --- |" + " ---: |" * len(directions),
        ]
        for group in dict.fromkeys(group for group, _ in members):
            cells = [cell(members.get((group, direction))) for direction in directions]
            lines.append(f"| {group} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gpu_markdown(settings):
    """Every setting as a table, a row a class and direction, a column an arithmetic."""
    lines = ["Times faster than torch: geometric mean of the class, and in parentheses its slowest layer. Below 1 torchcnn is"]
    lines[0] += " slower. torch counts in the better of its layouts, in convolutions with the fastest algorithm that cuDNN finds."
    for (table, layout, gpu, torch, cudnn), members in settings.items():
        arithmetics = list(dict.fromkeys(arithmetic for cells in members.values() for arithmetic in cells))
        lines += [
            "",
            f"**{TITLES[table].split(',')[0]}, {TENSORS[layout]}, {gpu}, torch {torch}, cuDNN {cudnn}**",
            "",
            f"| class | direction | {' | '.join(arithmetics)} |".replace("tf32", "TF32"),
            "| --- | --- |" + " ---: |" * len(arithmetics),
        ]
        for (group, direction), cells in members.items():
            lines.append(f"| {group} | {direction} | {' | '.join(cell(cells.get(each)) for each in arithmetics)} |")
    return "\n".join(lines)


def cell(rows):
    if not rows:
        return ""
    mean = statistics.geometric_mean(ratios(rows))
    return f"{mean:.2f}" + (f" ({min(ratios(rows)):.2f})" if len(rows) > 1 else "")


def replace_block(path, block, begin=BEGIN, end=END):
    text = path.read_text()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"plot.py: {path} must hold one line {begin} and below it one line {end}")
    path.write_text(text[: text.index(begin) + len(begin)] + f"\n{block}\n" + text[text.index(end) :])


# ------------------------------------------------------------------------------------------------------------ the picture


def draw_setting(axes, setting, members):
    directions = list(dict.fromkeys(direction for _, direction in members))
    groups = list(dict.fromkeys(group for group, _ in members))
    width = 0.8 / len(directions)
    labels = set()

    def once(label):
        fresh = label not in labels
        labels.add(label)
        return label if fresh else None

    for (group, direction), rows in members.items():
        x = groups.index(group) + (directions.index(direction) - (len(directions) - 1) / 2) * width
        mean = statistics.geometric_mean(ratios(rows))
        # A bar from 1: up where torchcnn is faster, down where torch is.
        axes.bar(x, mean - 1, 0.9 * width, bottom=1, color=COLORS[direction], label=once(direction))
        if len(rows) > 1:
            axes.plot([x] * len(rows), ratios(rows), "o", color="black", markersize=2.5, alpha=0.5, label=once("each layer"))
        ends = x - 0.45 * width, x + 0.45 * width
        for column, style, what in (("mean_floor", "-", "mean"), ("worst_floor", ":", "worst layer")):
            if floor := rows[0][column]:
                axes.plot(ends, [float(floor)] * 2, style, color="#d62728", linewidth=1.8, label=once(f"floor of the {what}"))
        axes.annotate(f"{mean:.2g}", (x, 0.01), xycoords=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=8)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_yscale("log", base=2)
    low, high = (round(math.log2(limit)) for limit in axes.get_ylim())
    axes.set_ylim(2 ** (low - 0.8), 2 ** (high + 0.6))  # the means are written below the bars
    exponents = range(low, high + 1)
    axes.set_yticks([2.0**e for e in exponents], [f"{2**e}x" if e >= 0 else f"1/{2**-e}" for e in exponents])
    axes.set_xticks(range(len(groups)), [group.replace("_", "\n") for group in groups])
    axes.set_ylabel("times faster than torch")
    axes.set_title(title(setting), loc="left", fontsize=11)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def draw(settings, folder):
    """The settings on NCHW tensors and one thread, or all if there is none such."""
    os.environ.setdefault("MPLBACKEND", "agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "speedup"  # the same names in the file each time

    shown = {s: members for s, members in settings.items() if s[1:3] == ("nchw", 1)} or settings
    figure, axes = plt.subplots(len(shown), figsize=(11, 3.4 * len(shown)), squeeze=False, layout="constrained")
    for axis, (setting, members) in zip(axes[:, 0], shown.items(), strict=True):
        draw_setting(axis, setting, members)
    paths = [folder / f"speedup.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return paths


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the CSV files")
    parser.add_argument("--readme", type=Path, help="a file with the marker comments")
    args = parser.parse_args(argv)
    settings, on_gpus = read(args.results), read_gpu(args.results)
    if not (settings or on_gpus):
        raise SystemExit(f"plot.py: there are no CSV files in {args.results}; run benchmarks/run.py first")
    tables = []
    if settings:
        draw(settings, args.results)
        tables.append((markdown(settings), BEGIN, END))
    if on_gpus:
        tables.append((gpu_markdown(on_gpus), GPU_BEGIN, GPU_END))
    print("\n\n".join(table for table, *_ in tables))
    if args.readme:
        for table in tables:
            replace_block(args.readme, *table)


if __name__ == "__main__":
    main()
