"""Reads the machine code of the CUDA kernels: which instructions they are made of, which resources they take.

    python tests/cuda_sass.py [OBJECT...] [--docs FILE]

OBJECT: compiled .cu files; without any those of the last build. The facts that must hold stand in FACTS. --docs writes the table
of resources into FILE, between its two markers. cuobjdump and nvdisasm are needed, from a CUDA toolkit or from PyPI
(nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm).

How many blocks a multiprocessor holds at once is the least of what its threads, registers and shared memory allow ("CUDA C++
Programming Guide", section "Compute Capabilities"): registers are given to warps in units of 256, and every block takes 1 KiB of
shared memory that the system reserves.
"""

import argparse
import importlib.metadata
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_model  # noqa: E402

BEGIN, END = "<!-- kernels: begin -->", "<!-- kernels: end -->"
SHARED_KIB = {"sm_80": 164, "sm_90a": 228}  # of a multiprocessor
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of a multiprocessor, both architectures
USUAL_THREADS = 256  # of kernels without __launch_bounds__

# What the names of kernels promise: a regular expression of the name, those of instructions that must be there.
FACTS = [
    (r"TensorMath<", ["HMMA"], "steps on the tensor cores"),
    (r"TensorMath<TileShape<(__half|__nv_bfloat16|float, \d+, \d+, by_index)", [r"LDSM.*\.4"], "fragments by ldmatrix, by fours"),
    (r"WarpgroupMath<", ["HGMMA"], "steps of a warpgroup"),
    (r"SimtMath<TileShape<double", ["DFMA"], "multiply-adds in double"),
    (r"SimtMath<TileShape<(float|__)", ["FFMA"], "multiply-adds in float"),
    (r"conv2d_direct<(float|__)", ["FFMA", r"LDS.*\.128"], "multiply-adds in float, four places of taps or weights at a time"),
    (r"conv2d_direct<double", ["DFMA", r"LDS.*\.128"], "multiply-adds in double, four places of taps or weights at a time"),
    (r"pool2d\w*<[\w ]+, [248]\b", [r"LDG\.E.*\.128", r"STG\.E.*\.128"], "16-byte vectors of channels, read and written"),
    (r"pool2d_forward_(channels<|planes<[\w ]+, true, [248]\b)", [r"LDG\.E.*\.128"], "16-byte vectors, read"),
    (r"pool2d_grad_input_planes<", [r"STG\.E.*\.128"], "16-byte vectors, written"),
    (r"TileShape<", [r"LDGSTS.*\.128"], "16-byte asynchronous copies from global to shared memory"),
]
FORBIDDEN = [(r"LDL|STL", "local memory"), (r"(REDG?|ATOMG?)\b", "atomic operations on global memory")]


@dataclass
class Kernel:
    name: str
    architecture: str
    registers: int
    static_shared: int
    local: int  # bytes a thread, its stack included
    threads: int
    opcodes: Counter = field(default_factory=Counter)

    @property
    def shared(self):
        """Bytes of a block, dynamic ones included: the tiles of conv2d_tile.cuh."""
        shape = re.search(r"TileShape<(\w+), (\d+), (\d+), (\w+), (\d+)>", self.name)
        if not shape:
            return self.static_shared
        size, block_m, block_n = {"float": 4, "double": 8}.get(shape[1], 2), int(shape[2]), int(shape[3])
        tile = gpu_model.Tile(size, block_m, block_n, shape[4], int(shape[5]) > 2 * block_m)
        return self.static_shared + tile.shared_bytes

    @property
    def blocks(self):
        """How many a multiprocessor holds at once."""
        warps = -(-self.threads // 32)
        registers = -(-self.registers * 32 // 256) * 256 * warps
        shared = self.shared + 1024
        return min(BLOCKS, WARPS // warps, REGISTERS // registers, SHARED_KIB[self.architecture] * 1024 // shared)

    @property
    def occupancy(self):
        return self.blocks * -(-self.threads // 32) / WARPS

    def complaints(self):
        found = []
        for pattern, wanted, what in FACTS:
            if re.search(pattern, self.name):
                for opcode in wanted:
                    if not any(re.match(opcode, each) for each in self.opcodes):
                        found.append(f"{self.architecture} {self.name}: no {opcode} ({what})")
        for opcode, what in FORBIDDEN:
            if any(re.match(opcode, each) for each in self.opcodes):
                found.append(f"{self.architecture} {self.name}: {what}")
        if self.local:
            found.append(f"{self.architecture} {self.name}: {self.local} bytes of local memory a thread")
        return found


def find_tools():
    """The folder of cuobjdump and nvdisasm; None where there is none."""
    folders = [shutil.which("cuobjdump"), f"{os.environ.get('CUDA_HOME')}/bin/cuobjdump", "/usr/local/cuda/bin/cuobjdump"]
    try:
        files = importlib.metadata.files("nvidia-cuda-cuobjdump") or []
        folders += [file.locate() for file in files if file.name == "cuobjdump"]
    except importlib.metadata.PackageNotFoundError:
        pass
    found = (Path(path).parent for path in folders if path)
    return next((folder for folder in found if (folder / "cuobjdump").exists() and (folder / "nvdisasm").exists()), None)


def dump(tools, option, architecture, path):
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    command = [tools / "cuobjdump", option, "-arch", architecture, path]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def readable(mangled):
    """Name by name: what stands before the parameters, without the namespaces."""
    filter = shutil.which("c++filt") or shutil.which("llvm-cxxfilt")
    if not filter or not mangled:
        return {name: name for name in mangled}
    lines = subprocess.run([filter], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout.splitlines()
    names = {}
    for name, line in zip(mangled, lines, strict=True):
        text = re.sub(r"torchcnn::(cuda::)?((depthwise|direct)::)?|\(anonymous namespace\)::|^void ", "", line)
        text = text.replace("(Storage)0", "by_index").replace("(Storage)1", "by_k").replace("> >", ">>").replace("> >", ">>")
        depth = 0
        for at, letter in enumerate(text):
            depth += {"<": 1, ">": -1}.get(letter, 0)
            if letter == "(" and depth == 0:
                text = text[:at]
                break
        names[name] = text
    return names


def kernels_of(tools, path, architecture):
    usage = dump(tools, "-res-usage", architecture, path)
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    kernels = {}
    for name, registers, stack, shared, local in re.findall(pattern, usage):
        # From sm_90 on the system's 1 KiB is counted as the kernel's.
        reserved = 1024 if architecture == "sm_90a" and int(shared) >= 1024 else 0
        kernels[name] = Kernel(name, architecture, int(registers), int(shared) - reserved, int(stack) + int(local), USUAL_THREADS)
    bounds = r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+(0x[0-9a-f]+) (0x[0-9a-f]+) (0x[0-9a-f]+)"
    for section in re.split(r"^\.nv\.info\.(?=\S+$)", dump(tools, "-elf", architecture, path), flags=re.MULTILINE)[1:]:
        name, attributes = section.split("\n", 1)
        if found := re.search(bounds, attributes.split("\n.", 1)[0]):
            x, y, z = (int(number, 16) for number in found.groups())
            kernels[name].threads = x * y * z
    code = re.split(r"^\s*Function : (?=\S+$)", dump(tools, "-sass", architecture, path), flags=re.MULTILINE)[1:]
    for text in code:
        name, instructions = text.split("\n", 1)
        kernels[name].opcodes.update(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", instructions))
    names = readable(list(kernels))
    for name, kernel in kernels.items():
        kernel.name = names[name]
    return list(kernels.values())


def read(tools, objects, architectures):
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        of_objects = pool.map(lambda pair: kernels_of(tools, *pair), itertools.product(objects, architectures))
        kernels = [kernel for kernels in of_objects for kernel in kernels]
    # Elsewhere than on Hopper its own kernels are a trap.
    kernels = [kernel for kernel in kernels if kernel.architecture == "sm_90a" or "WarpgroupMath" not in kernel.name]
    return sorted(kernels, key=lambda kernel: (kernel.name, kernel.architecture))


def table(kernels):
    """A line for each kernel, for Markdown."""
    architectures = sorted({kernel.architecture for kernel in kernels})
    heads = [f"{name} {what}" for name in architectures for what in ("registers", "shared KiB", "blocks", "warps")]
    lines = [f"| kernel | threads | {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) + 1)}"]
    rows = {}
    for kernel in kernels:
        cells = [str(kernel.registers), f"{kernel.shared / 1024:.1f}", str(kernel.blocks), f"{kernel.occupancy:.0%}"]
        rows.setdefault((kernel.name, kernel.threads), {})[kernel.architecture] = cells
    for (name, threads), of in sorted(rows.items()):
        cells = [cell for architecture in architectures for cell in of.get(architecture, [""] * 4)]
        lines.append(f"| `{name}` | {threads} | {' | '.join(cells)} |")
    return "\n".join(lines)


def replace_block(path, text):
    """Puts the text between the markers of a file; returns whether that changed it."""
    old = path.read_text()
    if old.count(BEGIN) != 1 or old.count(END) != 1:
        raise SystemExit(f"{path} must hold one line {BEGIN} and one {END}")
    new = f"{old[: old.index(BEGIN) + len(BEGIN)]}\n{text}\n{old[old.index(END) :]}"
    path.write_text(new)
    return new != old


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objects", nargs="*", type=Path, metavar="OBJECT")
    parser.add_argument("--docs", type=Path, help="the file that the table is written into")
    args = parser.parse_args(argv)
    tools = find_tools()
    objects = args.objects or sorted(ROOT.glob("build/temp.*/cuda/csrc/cuda/*.o"))
    if not tools or not objects:
        raise SystemExit("cuda_sass.py: there is no cuobjdump" if not tools else "cuda_sass.py: there are no objects")
    kernels = read(tools, objects, sorted(SHARED_KIB))
    print(table(kernels))
    complaints = [complaint for kernel in kernels for complaint in kernel.complaints()]
    print(*complaints, sep="\n")
    if args.docs:
        replace_block(args.docs, table(kernels))
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
