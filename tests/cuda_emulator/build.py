"""Builds torchcnn with its CUDA kernels compiled for the processor, as a package of its own: build/cuda-emulator/MODE/torchcnn.

    python tests/cuda_emulator/build.py [fast] [check] [asan]

fast    numbers
check   every access of a kernel is checked: races, bounds, uninitialised memory (memory.cpp)
asan    the address sanitizer, whose library has to be loaded first; the command that is printed says how

Then PYTHONPATH=build/cuda-emulator/MODE pytest tests/test_conv2d.py runs the kernels on CPU tensors.
Needed: `make setup` before, g++ on x86-64, and the CUDA headers: a toolkit, or
pip install nvidia-cuda-runtime==13.0.* nvidia-cuda-crt==13.0.* nvidia-cuda-cccl==13.0.*
Environment: CUDA_HOME, EMULATOR_CXX (a g++), MAX_JOBS, LDFLAGS.
"""

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "cuda-emulator"

# The processor's multiply-add serves a * b + c as nvcc's does. PyTorch's build of extensions sets the macros of cuda_fp16.h.
FLAGS = [
    *["-std=c++20", "-fPIC", "-march=x86-64-v3", "-ffp-contract=fast", "-fno-math-errno", "-fno-strict-aliasing", "-g1"],
    *["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DTORCHCNN_CUDA", "-DTORCHCNN_CUDA_EMULATOR", "-DTORCHCNN_SM90A"],
    *[f"-D__CUDA_NO_{what}__" for what in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")],
]
# Compiling takes as long as the tests that make cuda-check runs: little is optimised.
KERNEL_FLAGS = {
    "fast": ["-O1"],
    "check": ["-O1", "-fsanitize=thread", "-fsanitize=bounds-strict,alignment"],
    "asan": ["-O0", "-fsanitize=address", "-fsanitize=bounds-strict,alignment"],
}
EMULATOR_FLAGS = {"fast": ["-O2"], "check": ["-O2", "-DEMULATOR_CHECKS_MEMORY"], "asan": ["-O1", "-fsanitize=address"]}
LINK_FLAGS = {"fast": [], "check": [], "asan": ["-fsanitize=address"]}


def compiler():
    return os.environ.get("EMULATOR_CXX", "g++")


def find_headers():
    """The folder that holds cuda_fp16.h; None where there is none."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    folders = [Path(home) / "include" for home in homes if home]
    folders += [Path(path) / "nvidia" / "cu13" / "include" for path in sys.path]
    return next((folder for folder in folders if (folder / "cuda_fp16.h").exists() and (folder / "nv/target").exists()), None)


def obstacle():
    """Why the emulator cannot be built here; None where it can."""
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        return "the emulator needs Linux on x86-64"
    if "avx2" not in Path("/proc/cpuinfo").read_text():
        return "the emulator needs a processor with AVX2"
    if shutil.which(compiler()) is None or "Free Software" not in output_of(compiler(), "--version"):
        return "the emulator needs g++ (EMULATOR_CXX)"
    if find_headers() is None:
        return "there are no CUDA headers (tests/cuda_emulator/build.py says where they come from)"
    return None


def output_of(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def asan_environment():
    """What Python needs before it can load the build `asan`."""
    libraries = [output_of(compiler(), f"-print-file-name={name}").strip() for name in ("libasan.so", "libstdc++.so.6")]
    return {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


def run(command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, cwd=ROOT)
    sys.stderr.write(done.stderr)
    if done.returncode != 0:
        raise SystemExit(f"failed: {shlex.join(str(word) for word in command)}")


def is_current(target, inputs):
    return target.exists() and all(Path(i).exists() and Path(i).stat().st_mtime <= target.stat().st_mtime for i in inputs)


def compile_all(jobs):
    """Compile (source, object, flags) where a file that the source includes, or the command, has changed; the longest first."""

    def compile_one(job):
        source, target, flags = job
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [*flags, "-c", str(source), "-o", str(target)]
        depends, used = target.with_suffix(".d"), target.with_suffix(".command")
        if depends.exists() and used.exists() and used.read_text() == shlex.join(command):
            inputs = shlex.split(depends.read_text().replace("\\\n", " "))[1:]
            if is_current(target, [ROOT / path for path in inputs]):
                return
        used.unlink(missing_ok=True)
        run([*command[:1], "-MMD", "-MF", depends, *command[1:]])
        used.write_text(shlex.join(command))

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
        list(pool.map(compile_one, sorted(jobs, key=lambda job: -(ROOT / job[0]).stat().st_size)))


def link(library, objects, flags):
    if not is_current(library, objects):
        run([compiler(), "-shared", *objects, "-o", library, *flags, *shlex.split(os.environ.get("LDFLAGS", ""))])


def kernel_jobs(mode, sources, folder):
    """What compile_all has to compile for a library of .cu files and the emulator, of which all libraries of a mode have one."""
    shared_objects, objects = BUILD / mode / "objects", folder / "kernels"
    includes = ["-I", str(HERE), "-I", str(ROOT / "csrc"), "-isystem", str(find_headers())]
    # The emulator comes first: of the functions of std that both use, the linker then takes the copies without checks.
    jobs = []
    for source in (HERE / "threads.cpp", HERE / "memory.cpp", HERE / "mma.cpp"):
        jobs.append((source, shared_objects / f"{source.stem}.o", [compiler(), *FLAGS, *EMULATOR_FLAGS[mode], *includes]))
    for source in map(Path, sources):
        flags = [compiler(), *FLAGS, *KERNEL_FLAGS[mode], *includes, "-x", "c++"]
        jobs.append((source, objects / f"{source.stem}.o", flags))
    return jobs


def build_kernels(mode, sources, library):
    """A shared library of .cu files and the emulator. Nothing else may be in it: its thread-local memory is the shared memory."""
    jobs = kernel_jobs(mode, sources, library.parent)
    compile_all(jobs)
    link(library, [target for _, target, _ in jobs], [*LINK_FLAGS[mode], "-Wl,-Bsymbolic", "-Wl,-z,defs", "-ldl"])


def ordinary_build():
    """Of the build that `make setup` made: its ninja file, the command that compiles, {source: object}."""
    path = Path("build") / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "build.ninja"
    if not (ROOT / path).exists():
        raise SystemExit(f"there is no {path}: run `make setup` first.")
    text = (ROOT / path).read_text().replace("$$", "$")
    values = [re.search(rf"^{name} = (.*)$", text, re.MULTILINE)[1] for name in ("cxx", "cflags", "post_cflags")]
    objects = {source: target for target, source in re.findall(r"^build (\S+): compile (\S+)$", text, re.MULTILINE)}
    return path, [word for value in values for word in shlex.split(value)], objects


def product_kernels():
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


CALLERS = ["csrc/conv2d.cpp", "csrc/pool2d.cpp"]  # what asks the kernels for something; the rest is that of the ordinary build


def caller_jobs():
    _, command, _ = ordinary_build()
    flags = [*command, "-O1", "-DTORCHCNN_CUDA", "-DTORCHCNN_CUDA_EMULATOR", "-I", str(HERE)]
    return [(source, BUILD / "callers" / f"{Path(source).stem}.o", flags) for source in CALLERS]


def build_package(mode, kernels=None, folder=None):
    """Builds the package for a mode; `kernels` may replace csrc/cuda/*.cu. Returns the folder for PYTHONPATH."""
    folder = folder or BUILD / mode
    package = folder / "torchcnn"
    package.mkdir(parents=True, exist_ok=True)
    for source in (ROOT / "torchcnn").glob("*.py"):
        if not (package / source.name).exists():
            (package / source.name).symlink_to(os.path.relpath(source, package))
    library = package / "libtorchcnn_kernels.so"
    build_kernels(mode, kernels or product_kernels(), library)

    ninja_file, _, objects = ordinary_build()
    jobs = caller_jobs()
    compile_all(jobs)
    rest = [target for source, target in objects.items() if source not in CALLERS]
    run([sys.executable, "-m", "ninja", "--quiet", "-f", ninja_file, *rest])
    rest = [ROOT / target for target in rest]
    import torch

    torch_libraries = Path(torch.__file__).parent / "lib"
    extension = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = [library, "-Wl,-rpath,$ORIGIN", f"-L{torch_libraries}", "-ltorch_cpu"]
    link(extension, [target for _, target, _ in jobs] + rest + [library], flags[1:])
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", choices=KERNEL_FLAGS, nargs="+", metavar="mode")
    modes = parser.parse_args().modes
    if obstacle():
        raise SystemExit(f"{obstacle()}.")
    # All at once: with the long ones first no processor waits at the end of a mode.
    compile_all(
        caller_jobs() + [job for mode in modes for job in kernel_jobs(mode, product_kernels(), BUILD / mode / "torchcnn")]
    )
    for mode in modes:
        folder = os.path.relpath(build_package(mode))
        settings = {**(asan_environment() if mode == "asan" else {}), "PYTHONPATH": folder}
        print(*(f"{name}='{value}'" for name, value in settings.items()), "pytest tests/test_conv2d.py")
