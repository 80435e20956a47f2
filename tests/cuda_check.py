"""What can be known of the CUDA kernels without a GPU: make cuda-check, make cuda-check-full.

    python tests/cuda_check.py [--full] [--only STEP,...]

Compiles csrc/cuda with warnings, spills and local memory as errors; links the extension (into build/cuda-check, beside the one in
use) and imports it; reads the machine code; runs the operator tests on the kernels in the emulator of tests/cuda_emulator. At the
end stands a table of what ran, what was skipped and why; the exit status is 1 if something failed. Without nvcc the part of the
emulator is left.
"""

import argparse
import functools
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE / "cuda_emulator"), str(ROOT / "benchmarks")]

import cuda_sass  # noqa: E402
import gpu_model  # noqa: E402

FOLDER = ROOT / "build" / "cuda-check"
DOCS = ROOT / "docs" / "cuda_kernels.md"
SETUP = runpy.run_path(str(ROOT / "setup.py"))
ARCHITECTURES = ["8.0+PTX", "9.0"]  # --full: all of setup.py's
# Besides those of setup.py, whose warnings they turn into errors. The same machine code comes out.
STRICT = "-Werror=all-warnings -Xptxas=-Werror"
# What the emulator runs, a process for each entry: in its fast build every operator test, and those of 16-bit numbers as GPUs
# without tensor-core steps and with the steps of Hopper; in the build that checks memory, those with exact results, which have
# the geometries at the borders of tiles, with the threads of a block in three orders; some of these once more under the address
# sanitizer, for the arrays of a kernel's own.
OPERATOR_TESTS = ["test_conv2d test_depthwise test_cuda", "test_conv_transpose test_pool2d test_pool_backward"]
CHECKED_TESTS = "test_conv2d test_pool2d"
CHECKED = os.environ.get("TORCHCNN_CHECKED_TESTS", "exact and not sliced and not (float64 and channels_last)")  # pytest -k
LARGE_TILES = "(test_exact and float32 and block_136_filters)"  # which shared memory before sm_80 has no room for
SANITIZED = "exact and contiguous and not float64 and not bfloat16"
ORDERS = os.environ.get("TORCHCNN_EMULATOR_ORDERS", "ascending,descending,random").split(",")


class FailedError(Exception):
    """With what went wrong."""


class SkippedError(Exception):
    """With the reason."""


def run(*command, folder=ROOT, **environment):
    """What a command prints; FailedError with the end of it where the command fails."""
    command = [str(word) for word in command]
    environment = {**os.environ, **environment}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise FailedError(f"{done.stdout[-6000:]}\n{' '.join(command)}: status {done.returncode}")
    return done.stdout


def nvcc():
    path = Path(SETUP["find_toolkit"]()) / "bin" / "nvcc"
    if not path.exists():
        raise SkippedError("there is no nvcc (CUDA_HOME)")
    return path


def objects():
    nvcc()
    return sorted(ROOT.glob(f"build/temp.*-{sys.implementation.cache_tag}/cuda/csrc/cuda/*.o"))


# -------------------------------------------------------------------------------------------------------------- the steps


def check_build(args):
    """compile and link"""
    nvcc()
    shutil.rmtree(FOLDER, ignore_errors=True)
    for old in objects():
        if not (ROOT / "csrc" / "cuda" / f"{old.stem}.cu").exists():
            old.unlink()
    wanted = ";".join(SETUP["CUDA_ARCHITECTURES"]) + "+PTX" if args.full else ";".join(ARCHITECTURES)
    build = [sys.executable, "setup.py", "build", "--build-lib", FOLDER]
    output = run(*build, TORCHCNN_CUDA="1", TORCH_CUDA_ARCH_LIST=wanted, NVCC_FLAGS=STRICT)
    if warnings := re.findall(r"^csrc/.*warning:.*$", output, re.MULTILINE):
        raise FailedError("\n".join(warnings))
    return f"{len(objects())} .cu files for {wanted}, no warning, no spill"


IMPORT = """
import subprocess, sys, torch, torchcnn
from torchcnn import _C
assert torchcnn.__file__.startswith(sys.argv[1]), torchcnn.__file__
has = torch._C._dispatch_has_kernel_for_dispatch_key
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("torchcnn::")]
on_cpu = [name for name in names if has(name, "CPU")]
without = [name for name in on_cpu if not has(name, "CUDA")]
assert on_cpu and not without, f"no CUDA kernel: {without}"
needed = subprocess.run(["readelf", "--dynamic", _C.__file__], capture_output=True, text=True, check=True).stdout
assert "libtorch_cpu" in needed and "libtorch_cuda" not in needed and "libcudart" not in needed, needed
assert torchcnn.Conv2d(3, 8, 3)(torch.randn(2, 3, 9, 9)).shape == (2, 8, 7, 7)
gpu = "a GPU is there" if torch.cuda.is_available() else "no GPU"
print(f"{len(on_cpu)} operators for CPU and CUDA, torch {torch.__version__}, {gpu}, no library of CUDA")
"""


def check_import(args):
    """import the extension"""
    nvcc()
    if not list(FOLDER.glob("torchcnn/_C.*")):
        raise SkippedError("it was not built")
    return run(sys.executable, "-c", IMPORT, FOLDER, folder=FOLDER, PYTHONPATH=str(FOLDER)).strip()


def check_model(args):
    """numbers of benchmarks/gpu_model.py"""
    FOLDER.mkdir(parents=True, exist_ok=True)
    source = FOLDER / "tiles.cu"
    source.write_text(gpu_model.tile_assertions())
    run(nvcc(), *SETUP["NVCC_FLAGS"], "-arch=sm_80", "-Icsrc/cuda", "-c", source, "-o", source.with_suffix(".o"))
    return f"{len(gpu_model.TILES)} tiles are those of the headers"


@functools.cache
def kernels():
    tools = cuda_sass.find_tools()
    if not objects():
        raise SkippedError("nothing was compiled")
    if not tools:
        raise SkippedError("there is no cuobjdump and nvdisasm (PyPI: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm)")
    return cuda_sass.read(tools, objects(), sorted(cuda_sass.SHARED_KIB))


def check_sass(args):
    """machine code"""
    read = kernels()
    complaints = [complaint for kernel in read for complaint in kernel.complaints()]
    names = [kernel.name for kernel in read]
    complaints += [
        f"no kernel is called {fact[0]}" for fact in cuda_sass.FACTS if not any(re.search(fact[0], name) for name in names)
    ]
    if complaints:
        raise FailedError("\n".join(complaints))

    def having(opcode):
        return sum(any(each.startswith(opcode) for each in kernel.opcodes) for kernel in read)

    counts = ", ".join(f"{having(opcode)} with {opcode}" for opcode in ("HMMA", "HGMMA", "LDGSTS"))
    return f"{len(read)} kernels of sm_80 and sm_90a: {counts}, no local memory"


def check_docs(args):
    """table of docs/cuda_kernels.md"""
    release = re.search(r"release (\S+),", run(nvcc(), "--version"))[1]
    text = DOCS.read_text()
    written = re.search(r"nvcc (\S+)", text)[1].rstrip(",.:;")
    if release != written:
        raise SkippedError(f"it is of nvcc {written}, here is {release}")
    if cuda_sass.table(kernels()) not in text:
        raise FailedError("it is not that of these kernels: make cuda-docs")
    return f"as nvcc {release} compiles them"


def check_emulator_build(args):
    """emulator: compile"""
    build_emulator()
    return "kernels and emulator in the builds fast, check and asan"


@functools.cache
def build_emulator():
    import build

    if reason := build.obstacle():
        raise SkippedError(reason)
    run(sys.executable, "tests/cuda_emulator/build.py", "fast", "check", "asan")


def emulator_runs(full):
    """The runs of pytest, the longest first: what it is about, build of the emulator or "", test files, options, environment.

    A process takes four seconds before its first test: few of them.
    """

    def run(kind, mode, tests, keyword, sm="", order="", examples="3"):
        marks = [] if full and kind in ("operators", "the emulator itself") else ["-m", "not slow"]
        environment = {"TORCHCNN_EMULATOR_SM": sm, "TORCHCNN_EMULATOR_ORDER": order, "TORCHCNN_TEST_EXAMPLES": examples}
        keyword = ["-k", keyword] if keyword else []
        return kind, mode, tests, [*marks, *keyword], {name: value for name, value in environment.items() if value}

    memory = f"memory, threads {', '.join(ORDERS)}"
    return [
        *[run("operators", "fast", tests, "", examples="" if full else "5") for tests in OPERATOR_TESTS],
        *[run(memory, "check", CHECKED_TESTS, "exact" if full else CHECKED, order=order) for order in ORDERS],
        run("sm_75 and sm_90", "fast", "test_conv2d test_cuda", "half or tf32", sm="90"),
        run("sm_75 and sm_90", "fast", "test_conv2d", f"(exact and float16) or {LARGE_TILES}", sm="75"),
        # Hopper's steps are those of the same kernels: once.
        run(memory, "check", "test_conv2d test_cuda", "(half_exact and float16) or tf32_exact", sm="90", order="random"),
        run("the address sanitizer", "asan", CHECKED_TESTS, "exact" if full else SANITIZED),
        run("the emulator itself", "", "test_cuda_emulator", ""),
    ]


def check_emulator_tests(args):
    """emulator: operators, races, bounds"""
    build_emulator()
    import build

    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ROOT, "-c", ROOT / "pyproject.toml"]

    def outcome(run_of_pytest):
        kind, mode, tests, options, environment = run_of_pytest
        folder = ROOT
        if mode:  # from the folder of the package, which then comes before the one in the root
            folder = ROOT / "build" / "cuda-emulator" / mode
            library = build.asan_environment() if mode == "asan" else {}
            environment = {"PYTHONPATH": str(folder), "OMP_WAIT_POLICY": "passive", **library, **environment}
        files = [HERE / f"{test}.py" for test in tests.split()]
        output = run(*pytest, *options, *files, folder=folder, **environment)
        numbers = {status: int(number) for number, status in re.findall(r"(\d+) (passed|skipped)", output.splitlines()[-1])}
        if "passed" not in numbers:
            raise FailedError(f"{output[-1000:]}\nno test of {kind} ran")
        return kind, numbers

    passed_tests, skipped_tests, failures = Counter(), Counter(), []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in [pool.submit(outcome, each) for each in emulator_runs(args.full)]:
            try:
                kind, numbers = done.result()
            except FailedError as error:
                failures.append(str(error))
                continue
            passed_tests[kind] += numbers["passed"]
            skipped_tests[kind] += numbers.get("skipped", 0)
    if failures:
        raise FailedError("\n".join(failures))
    return "; ".join(f"{count} tests of {kind} ({skipped_tests[kind]} skipped)" for kind, count in passed_tests.items())


STEPS = [check_build, check_import, check_model, check_sass, check_docs]
STEPS += [check_emulator_build, check_emulator_tests]


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every architecture, every test")
    parser.add_argument("--only", help="only the steps whose function's names begin with check_ and one of these words")
    args = parser.parse_args(argv)
    rows = []
    for step in STEPS:
        if args.only and not step.__name__.startswith(tuple(f"check_{word}" for word in args.only.split(","))):
            continue
        print(f"... {step.__doc__}", flush=True)
        begin = time.monotonic()
        try:
            status, what = "passed", step(args)
        except SkippedError as reason:
            status, what = "skipped", str(reason)
        except FailedError as error:
            print(error)
            status, what = "FAILED", "see above"
        rows.append((step.__doc__, status, time.monotonic() - begin, what))
    print()
    for name, status, seconds, what in rows:
        print(f"{name:34} {status:8} {seconds:6.1f} s  {what}")
    count = {status: sum(row[1] == status for row in rows) for status in ("passed", "FAILED", "skipped")}
    print(f"{count['passed']} passed, {count['FAILED']} failed, {count['skipped']} skipped")
    return 1 if count["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
