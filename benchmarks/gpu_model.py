"""What the CUDA kernels have to do, layer by layer: a model, never a measurement. It needs no GPU.

    python benchmarks/gpu_model.py [conv|pool] [--classes 3x3,1x1] [--csv FILE]

For each layer of layers.py, direction and arithmetic: the operations of the formula; the least bytes (every tensor read or
written once); the bytes that thread blocks ask of the caches and memory, tile by tile; the floor, which is the time that a GPU at
its peak takes for the operations or for the least bytes, whichever is longer; and behind the slash the same for the work that is
done: whole tiles, in whole waves of blocks over the multiprocessors, and the bytes of scratch memory too. No kernel that computes
every product is faster than the floor; how much slower ours are, only a GPU can tell. Launches, latencies, caches and clocks
below their peak are left out.

Peaks, without sparsity, are those of NVIDIA's data sheets "A100 Tensor Core GPU" (SXM, 80 GB) and "H100 Tensor Core GPU" (SXM).
The tensor cores of an H100 reach theirs by wgmma alone, which 16-bit kernels use there; TF32 goes by mma.sync.
"""

import argparse
import csv
import math
import sys
from typing import NamedTuple

import layers


class Gpu(NamedTuple):
    name: str
    multiprocessors: int
    peak: dict[str, float]  # flops a microsecond
    bandwidth: float  # bytes a microsecond


def _peak(float32, tf32, float16, float64):
    return {name: 1e6 * value for name, value in locals().items()}


GPUS = [
    Gpu("A100", 108, _peak(19.5, 156, 312, 9.7), 2.039e6),
    Gpu("H100", 132, _peak(66.9, 494.7, 989.4, 33.5), 3.350e6),
]

# The numbers of csrc/cuda. tile_assertions() has the compiler compare those of tiles with the headers (make cuda-check).
BLOCKS_THAT_FILL_A_GPU = 132  # conv2d_host.cuh
TILE_DEPTH_BYTES, VECTOR_BYTES = 128, 16  # conv2d_tile.cuh
BEGIN_AND_END, WEIGHTS_IN_A_TILES_TIME, OF_A_TILE = 6, {2: 1 << 17, 4: 1 << 19, 8: 1 << 19}, 16  # conv2d_grad_weight.cu
STRIP_THREADS, ENOUGH_BLOCKS = 128, 528  # conv2d_depthwise.cu, conv2d_parts.cuh
DIRECT_THREADS, DIRECT_PIXELS = 128, 4  # conv2d_direct.cu: a block, and what a thread mostly has below each other
BYTES = {"float32": 4, "tf32": 4, "float16": 2, "float64": 8}


class Tile(NamedTuple):
    """TileShape of csrc/cuda/conv2d_tile.cuh."""

    bytes: int  # of an element
    block_m: int
    block_n: int
    storage: str  # by_index: forward and grad_input; by_k: grad_weight
    many_threads: bool = False  # of small tiles on tensor cores

    @property
    def block_k(self):
        return TILE_DEPTH_BYTES // self.bytes

    @property
    def threads(self):
        return 256 if self.many_threads else 2 * self.block_m

    @property
    def stages(self):
        if self.block_m * self.block_n == 128 * 128:
            return 3
        return 6 if self.many_threads else 4

    @property
    def shared_bytes(self):
        return self.stages * (self.block_m + self.block_n) * TILE_DEPTH_BYTES


BLOCKS = {"by_index": [(128, 128), (128, 64), (64, 64)], "by_k": [(128, 128), (64, 64)]}
TILES = [Tile(bytes, *block, storage) for bytes in (2, 4, 8) for storage, blocks in BLOCKS.items() for block in blocks]
TILES += [Tile(bytes, 64, 64, "by_index", True) for bytes in (2, 4)]


def tile_assertions():
    """A CUDA source that compiles only if the numbers above are those of the headers."""
    lines = ['#include "conv2d_host.cuh"', "using namespace torchcnn::cuda;"]
    lines.append(f"static_assert(kBlocksThatFillAGpu == {BLOCKS_THAT_FILL_A_GPU});")
    names = {2: "__half", 4: "float", 8: "double"}
    for tile in TILES:
        shape = f"TileShape<{names[tile.bytes]}, {tile.block_m}, {tile.block_n}, Storage::{tile.storage}, {tile.threads}>"
        for member, value in (
            ("block_k", tile.block_k),
            ("threads", tile.threads),
            ("stages", tile.stages),
            ("shared_bytes", tile.shared_bytes),
        ):
            lines.append(f"static_assert({shape}::{member} == {value});")
    return "\n".join(lines) + "\n"


class Work(NamedTuple):
    kernel: str
    flops: float  # of the operator
    least_bytes: float
    asked_bytes: float  # by thread blocks, from whichever cache has them
    done_flops: float  # what stands over the edges of tiles included
    done_bytes: float  # least_bytes and scratch memory, written and read
    blocks: int
    peak: str  # the arithmetic whose peak holds

    def floor(self, gpu):
        """Microseconds."""
        return max(self.flops / gpu.peak[self.peak], self.least_bytes / gpu.bandwidth)

    def bound(self, gpu):
        return "flops" if self.flops / gpu.peak[self.peak] > self.least_bytes / gpu.bandwidth else "bytes"

    def tiled(self, gpu):
        waves = math.ceil(self.blocks / gpu.multiprocessors) * gpu.multiprocessors / self.blocks
        return max(self.done_flops / gpu.peak[self.peak] * waves, self.done_bytes / gpu.bandwidth)


def ceil_div(a, b):
    return -(-a // b)


# ------------------------------------------------------------------------------------------------------------ convolution


def phases(written, size, kernel, stride, pad, dilation, transposed):
    """(results, taps) of each phase of an axis (conv2d_patches.cuh); a forward axis has one."""
    if not transposed:
        return [(written, kernel)]
    taps = [sum((phase + pad - r * dilation) % stride == 0 for r in range(kernel)) for phase in range(stride)]
    return [(ceil_div(size - phase, stride), taps[phase]) for phase in range(min(stride, size))]


def conv_work(layer, direction, arithmetic):
    """The work of one convolution kernel, its packing or its second pass included."""
    R, S = layer.kernel_size
    H, W = layer.size
    P, Q = (
        (size + 2 * pad - layer.dilation * (kernel - 1) - 1) // layer.stride + 1
        for size, pad, kernel in zip(layer.size, layer.padding, layer.kernel_size, strict=True)
    )
    N, C, K, G = layer.N, layer.C, layer.K, layer.groups
    size = BYTES[arithmetic]
    input, weight, output = N * C * H * W, K * (C // G) * R * S, N * K * P * Q
    flops, least = 2 * output * (C // G) * R * S, (input + weight + output) * size
    if C == G and K // G <= 4 and G > 1:
        # A thread reads some rows of some columns for a strip of one column; the layers here have square filters and strides.
        stride, transposed = layer.stride, direction == "grad_input"
        rows, before = {1: 7, 2: 8 if transposed else 4}[stride], (R - 1) // stride
        if transposed:
            read, strips = ((rows - 1) // stride + before + 1) * (before + 1), ceil_div(H, rows) * W
        else:
            read, strips = ((rows - 1) * stride + R) * R, ceil_div(P, rows) * Q
        written = {"forward": output, "grad_input": input, "grad_weight": weight}[direction]
        blocks, scratch, asked = ceil_div(N * C * strips, STRIP_THREADS), 0, N * C * strips * read * size + written * size
        if direction == "grad_weight":  # the strips of a channel in parts
            rounds = ceil_div(N * strips, STRIP_THREADS)
            parts = ceil_div(rounds, ceil_div(rounds * C, ENOUGH_BLOCKS))
            blocks, scratch = parts * C, 2 * parts * weight * 4 if parts > 1 else 0
            asked += output * size + scratch
        peak = "float64" if arithmetic == "float64" else "float32"
        kernel = "conv2d_depthwise_grad_weight_strips" if direction == "grad_weight" else "conv2d_depthwise_strips"
        return Work(kernel, flops, least, asked, flops, least + scratch, blocks, peak)

    vector = VECTOR_BYTES // size

    def whole(channels):
        """Channels of a group in whole vectors."""
        return ceil_div(channels, vector) * vector

    if direction == "grad_weight":
        columns = whole(C // G) * R * S
        large = arithmetic != "float64" and K // G > 64 and columns > 64
        tile = Tile(size, *BLOCKS["by_k"][0 if large else 1], "by_k")
        tiles_m, tiles_n = ceil_div(K // G, tile.block_m), ceil_div(columns, tile.block_n)
        tiles_k = ceil_div(N * P * Q, tile.block_k)
        at_once = (2 if large else 3) * BLOCKS_THAT_FILL_A_GPU
        tiles, part_time = tiles_m * tiles_n * G, ceil_div(weight, WEIGHTS_IN_A_TILES_TIME[size] // OF_A_TILE)

        def time(parts):
            part_tiles = ceil_div(tiles_k, parts) + BEGIN_AND_END
            return ceil_div(tiles * parts, at_once) * part_tiles * OF_A_TILE + parts * part_time

        candidates = [rounds * at_once // tiles for rounds in (1, 2, 3, 4)]
        candidates += [at_once // tiles >> shift for shift in range(1, 10)]
        parts = min((min(max(candidate, 1), tiles_k) for candidate in candidates), key=time)
        parts = ceil_div(tiles_k, ceil_div(tiles_k, parts))
        scratch = 2 * parts * weight * (8 if arithmetic == "float64" else 4)
        asked = N * P * Q * G * (whole(K // G) * tiles_n + columns * tiles_m) * size + scratch + weight * size
        done = 2 * tiles_m * tiles_n * G * tile.block_m * tile.block_n * tiles_k * tile.block_k
        name = f"conv2d_grad_weight_parts {tile.block_m}x{tile.block_n}, {parts} parts"
        return Work(name, flops, least, asked, done, least + scratch, tiles_m * tiles_n * G * parts, arithmetic)

    transposed = direction == "grad_input"
    read, written = (K // G, C // G) if transposed else (C // G, K // G)
    if written <= 8 or (read <= 4 and (size > 2 or written <= 16)):  # suits_direct of conv2d_host.cuh
        # A thread block stages what a tile of pixels reads, once for each chunk of the channels written.
        chunk = next((n for n in (1, 4, 8) if written <= n), 16)
        chunks, step = ceil_div(written, chunk), 1 if transposed else layer.stride
        blocks, asked = 0, (input if transposed else output) * size
        for rows, taps_h in phases(P, H, R, layer.stride, layer.padding[0], layer.dilation, transposed):
            for columns, taps_w in phases(Q, W, S, layer.stride, layer.padding[1], layer.dilation, transposed):
                across = min(32, 8 * ceil_div(columns, 8))
                down = min(rows, DIRECT_PIXELS * DIRECT_THREADS // across)
                tiles = N * G * chunks * ceil_div(columns, across) * ceil_div(rows, down)
                staged = ((across - 1) * step + taps_w) * ((down - 1) * step + taps_h)
                blocks += tiles
                asked += tiles * read * (staged + taps_h * taps_w * min(chunk, written)) * size
        done = flops * chunks * chunk // written
        peak = "float64" if arithmetic == "float64" else "float32"
        return Work(f"conv2d_direct, {chunk} channels", flops, least, asked, done, least, blocks, peak)
    pixels = N * (H * W if transposed else P * Q)
    fitting = [
        block
        for block in BLOCKS["by_index"][:2]
        if ceil_div(pixels, block[0]) * ceil_div(written, block[1]) * G >= BLOCKS_THAT_FILL_A_GPU
        and (written > 64 or block[1] == 64)
    ]
    if arithmetic == "float64" or not fitting:
        fitting = [BLOCKS["by_index"][2]]
    tile = Tile(size, *fitting[0], "by_index")
    tiles_n = ceil_div(written, tile.block_n)
    packed = 2 * weight // read * whole(read) * size  # written and read, of a weight in NCHW
    asked, done, blocks = (input if transposed else output) * size + weight * size + packed / 2, 0, 0
    for rows, taps_h in phases(P, H, R, layer.stride, layer.padding[0], layer.dilation, transposed):
        for columns, taps_w in phases(Q, W, S, layer.stride, layer.padding[1], layer.dilation, transposed):
            tiles_m = ceil_div(N * rows * columns, tile.block_m)
            depth = ceil_div(taps_h * taps_w * whole(read), tile.block_k) * tile.block_k
            asked += G * depth * (N * rows * columns * tiles_n + written * tiles_m) * size
            done += 2 * tiles_m * tiles_n * G * tile.block_m * tile.block_n * depth
            blocks += tiles_m * tiles_n * G
    name = f"conv2d_gather {tile.block_m}x{tile.block_n}"
    return Work(name, flops, least, asked, done, least + packed, blocks, arithmetic)


def conv_rows(classes):
    for group, members in layers.CONV.items():
        if group.startswith(classes):
            for layer in members:
                for direction in ("forward", "grad_input", "grad_weight"):
                    for arithmetic in ("float32", "tf32", "float16"):
                        yield group, layer.name, direction, arithmetic, conv_work(layer, direction, arithmetic)


# ---------------------------------------------------------------------------------------------------------------- pooling


def pool_work(layer, kind, direction, arithmetic, index_bytes=0):
    """index_bytes: of each position that a max pool's forward writes (8: indices, 1: offsets) or its backward reads."""
    size = BYTES[arithmetic]
    if layer.output:
        P, taps = layer.output, ceil_div(layer.H, layer.output) ** 2
    else:
        P, taps = (layer.H + 2 * layer.pad - layer.kernel) // layer.stride + 1, layer.kernel**2
    input, output = layer.N * layer.C * layer.H**2, layer.N * layer.C * P**2
    # A thread gathers: a window in forward, in backward the windows that an element of the input lies in.
    written = output if direction == "forward" else input
    flops, least = output * taps, (input + output) * size + output * index_bytes
    asked = output * taps * (size + (0 if direction == "forward" else index_bytes)) + written * size
    asked += output * index_bytes if direction == "forward" else 0
    name = f"{kind} pool {direction}"
    return Work(name, flops, least, asked, flops, least, ceil_div(written, 256), "float32")


def pool_rows(classes):
    tables = {"max": layers.POOL, "avg": layers.POOL}
    tables |= {f"global {kind}": layers.GLOBAL_POOL for kind in ("max", "avg")}
    tables |= {f"adaptive {kind}": layers.ADAPTIVE_POOL for kind in ("max", "avg")}
    for group, members in tables.items():
        if group.startswith(classes):
            for layer in members:
                for direction in ("forward", "backward"):
                    for arithmetic in ("float32", "float16"):
                        offsets = 1 if group.endswith("max") else 0
                        work = pool_work(layer, group, direction, arithmetic, offsets)
                        yield group, layer.name, direction, arithmetic, work


# ------------------------------------------------------------------------------------------------------------- the report


def row_of(group, layer, direction, arithmetic, work):
    row = {"class": group, "layer": layer, "direction": direction, "arithmetic": arithmetic, "kernel": work.kernel}
    row |= {"blocks": work.blocks, "gflop": 1e-9 * work.flops, "done_gflop": 1e-9 * work.done_flops}
    row |= {"least_mb": 1e-6 * work.least_bytes, "asked_mb": 1e-6 * work.asked_bytes}
    for gpu in GPUS:
        row |= {f"{gpu.name}_floor_us": work.floor(gpu), f"{gpu.name}_tiled_us": work.tiled(gpu)}
        row[f"{gpu.name}_bound"] = work.bound(gpu)
    return row


def line(row):
    text = f"{row['layer']:28} {row['direction']:12} {row['arithmetic']:8} {row['gflop']:8.3f} {row['least_mb']:8.2f}"
    text += f" {row['asked_mb']:9.2f}"
    for gpu in GPUS:
        text += f" {row[gpu.name + '_floor_us']:8.1f} /{row[gpu.name + '_tiled_us']:8.1f} {row[gpu.name + '_bound']}"
    return f"{text} {row['blocks']:7}  {row['kernel']}"


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=["conv", "pool"], default="conv")
    parser.add_argument("--classes", help="only the classes whose names begin with one of these, separated by commas")
    parser.add_argument("--csv", help="where to write the rows")
    args = parser.parse_args(argv)
    classes = tuple(args.classes.split(",")) if args.classes else ("",)
    rows = [row_of(*each) for each in (conv_rows if args.table == "conv" else pool_rows)(classes)]
    if not rows:
        raise SystemExit(f"gpu_model.py: no class of {args.table} begins with {args.classes!r}")
    print("A model, not a measurement: floor / time of whole tiles at the peak, in microseconds.")
    shown = None
    for row in rows:
        if row["class"] != shown:
            shown = row["class"]
            gpus = "".join(f" {gpu.name + ' us':>24}" for gpu in GPUS)
            print(f"\n{shown:50} {'GFLOP':>8} {'least MB':>8} {'asked MB':>9}{gpus} {'blocks':>7}  kernel")
        print(line(row))
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            for row in rows:
                writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()})


if __name__ == "__main__":
    main(sys.argv[1:])
