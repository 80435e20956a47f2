"""Builds the one extension, torchcnn._C; what is fixed about the package stands in pyproject.toml.

csrc/cuda is part of it where CUDA is chosen. That takes nvcc, but nothing of torch's: CUDA's runtime is linked statically, and
torch's stream is looked up when an operator runs (csrc/device.h), so a CPU build of torch links and imports it too.

Environment: TORCHCNN_CUDA=0|1|auto (auto, the default: where nvcc and a torch for the same major version of CUDA are both there),
CUDA_HOME, TORCH_CUDA_ARCH_LIST, CXX, CFLAGS, NVCC_FLAGS (added to nvcc's), MAX_JOBS.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# The target version hides what torch 2.10 does not have: one binary then serves 2.10 and every later torch.
CXX_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-std=c++20", "-O3", "-g0", "-fvisibility=hidden"]
CXX_FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
NVCC_FLAGS += ["-Xptxas=-warn-spills,-warn-lmem-usage"]
CUDA_ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]


def fail(reason):
    raise SystemExit(f"torchcnn cannot be built: {reason}")


def output_of(*command):
    """What the command prints; nothing where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def import_torch():
    try:
        import pybind11
        import torch
    except ModuleNotFoundError as error:
        fail(
            f"there is no {error.name}, or pip hides it. The build uses the torch that torchcnn will run "
            "with: install torch >= 2.10, pybind11 and setuptools, then call pip with --no-build-isolation."
        )
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < (2, 10):
        fail(f"torch {torch.__version__} is too old: install torch >= 2.10.")
    return torch, pybind11


def choose_compiler():
    """Set CXX, which torch's compile step and setuptools' link step both obey."""
    cxx = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if cxx is None:
        fail("there is no C++ compiler: install one (on Debian and Ubuntu: apt install g++) or set CXX.")
    macros = output_of(*shlex.split(cxx), "-std=c++20", "-dM", "-E", "-x", "c++", os.devnull)
    gcc, clang = (re.search(rf"#define __{name}__ (\d+)", macros) for name in ("GNUC", "clang_major"))
    if not (int(clang[1]) >= 14 if clang else gcc and int(gcc[1]) >= 11):
        fail(f"{cxx!r} is no C++20 compiler: install gcc >= 11 or clang >= 14, or name one in CXX.")
    os.environ["CXX"] = cxx


def find_toolkit():
    """The folder of the CUDA toolkit, whether or not nvcc is in it; "" where there is none."""
    guesses = [f"{path}/nvidia/cu13" for path in sys.path if os.path.exists(f"{path}/nvidia/cu13/bin/nvcc")]  # of PyPI
    guesses += [os.path.realpath(shutil.which("nvcc") or "").removesuffix("/bin/nvcc"), "/usr/local/cuda"]
    guess = next((folder for folder in guesses if os.path.exists(f"{folder}/include/cuda_runtime.h")), "")
    return os.environ.get("CUDA_HOME") or guess


def choose_cuda(torch):
    """The folder of the CUDA toolkit to build with; None: without CUDA."""
    choice = os.environ.get("TORCHCNN_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        fail(f"TORCHCNN_CUDA is {choice!r}: set it to 0, 1 or auto.")
    home = find_toolkit()
    release = re.search(r"release (\d+)", output_of(f"{home}/bin/nvcc", "--version"))
    cuda_of_torch = torch.version.cuda
    obstacle = None
    if choice == "auto" and not cuda_of_torch:
        return None
    if not glob("csrc/cuda/*.cu"):
        obstacle = "there are no CUDA sources (csrc/cuda/*.cu)"
    elif not release:
        obstacle = "there is no nvcc: install the CUDA toolkit, or set CUDA_HOME to its folder"
    elif int(release[1]) < 12:
        obstacle = f"nvcc is of CUDA {release[1]}: it takes 12 or later to compile C++20"
    elif cuda_of_torch and cuda_of_torch.split(".")[0] != release[1]:
        obstacle = f"torch is for CUDA {cuda_of_torch} and nvcc is of CUDA {release[1]}: set CUDA_HOME"
    if obstacle and choice == "1":
        fail(f"TORCHCNN_CUDA is 1, but {obstacle}.")
    if obstacle and choice == "auto":
        print(f"torchcnn is built without CUDA kernels: {obstacle}.")
    return None if obstacle or choice == "0" else home


def architecture_flags(home):
    """What TORCH_CUDA_ARCH_LIST means to nvcc; without it the architectures that both we and this nvcc know."""
    known = output_of(f"{home}/bin/nvcc", "--list-gpu-arch").split()
    usable = [arch for arch in CUDA_ARCHITECTURES if "compute_" + arch.replace(".", "") in known]
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(usable) + "+PTX"
    flags = []
    for arch in re.split("[; ]+", wanted.strip("; ")):
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            fail(f"TORCH_CUDA_ARCH_LIST is {wanted!r}: list architectures as in 8.0;9.0+PTX.")
        number = arch.removesuffix("+PTX").replace(".", "")
        if arch.endswith("+PTX") and int(number.rstrip("af")) < 80:  # csrc/cuda/mma.cuh
            fail(f"TORCH_CUDA_ARCH_LIST is {wanted!r}: PTX below 8.0 has no tensor-core kernels for the GPUs that would run it.")
        own = "90a" if number == "90" else number  # code runs on its architecture alone, so Hopper's may use what only Hopper has
        flags += [f"-gencode=arch=compute_{own},code=sm_{own}", *(["-DTORCHCNN_SM90A"] if own == "90a" else [])]
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def in_ninja(words):
    return shlex.join(words).replace("$", "$$")


class BuildExt(build_ext):
    """Compiles with ninja, which recompiles what has changed, and links with setuptools."""

    nvcc = None  # its command line, where CUDA kernels are built

    def finalize_options(self):
        super().finalize_options()
        # pip's editable install would take a temporary folder and so compile everything each time.
        self.build_temp = f"build/temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

    def build_extension(self, extension):
        includes = [f"-I{folder}" for folder in [*extension.include_dirs, *self.include_dirs]]
        cxx = shlex.split(os.environ["CXX"])
        compiler = [word for word in cxx if not word.startswith("-")][-1]  # of "ccache g++ -m64" say
        nvcc = [*self.nvcc, "-ccbin", compiler, *shlex.split(os.environ.get("NVCC_FLAGS", ""))] if self.nvcc else []
        lines = [f"builddir = {self.build_temp}", f"nvcc = {in_ninja(nvcc)}", f"cxx = {in_ninja(cxx)}"]
        lines += [f"cflags = {in_ninja([*self.compiler.compiler_so[1:], *includes])}"]
        lines += [f"post_cflags = {in_ninja(extension.extra_compile_args)}"]
        for rule, command in {"compile": "$cxx $cflags $post_cflags $define", "cuda_compile": "$nvcc"}.items():
            lines += [f"rule {rule}", f"  command = {command} -MD -MF $out.d -c $in -o $out", "  description = $in"]
            lines += ["  depfile = $out.d", "  deps = gcc"]
        objects = []
        for source in extension.sources:
            base, suffix = os.path.splitext(source)
            # Only the operators are compiled otherwise where there are CUDA kernels: both builds share the CPU kernels' objects.
            knows_cuda = self.nvcc and not source.startswith("csrc/cpu/")
            objects.append(f"{self.build_temp}/{'cuda' if knows_cuda else 'cpu'}/{base}.o")
            lines.append(f"build {objects[-1]}: {'cuda_compile' if suffix == '.cu' else 'compile'} {source}")
            lines.append(f"  define = {'-DTORCHCNN_CUDA' if knows_cuda else ''}")
        os.makedirs(self.build_temp, exist_ok=True)
        with open(f"{self.build_temp}/build.ninja", "w") as file:
            file.write("\n".join(lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run(["ninja", "-f", file.name, *jobs]).returncode:
            fail("the compiler's messages stand above.")
        extension.sources, extension.extra_objects = [], objects
        self.force = True  # the library that is there may be newer, but of other objects: those without CUDA
        super().build_extension(extension)


def extension():
    """The arguments of setup() that build torchcnn._C."""
    if sys.platform == "win32":
        fail("Windows is not supported: use Linux, macOS on arm64, or WSL 2.")
    # Where the environment is used without being activated, its ninja is found only this way.
    os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", "")
    torch, pybind11 = import_torch()
    choose_compiler()
    home = choose_cuda(torch)
    if home:
        BuildExt.nvcc = [f"{home}/bin/nvcc", *NVCC_FLAGS, *architecture_flags(home)]
    if not shutil.which("ninja"):
        fail("there is no ninja: install it (pip install ninja).")
    from torch.utils.cpp_extension import include_paths, library_paths

    # No warnings from system headers. pybind11 goes first: the target version bars torch's copy of it.
    headers = [pybind11.get_include(), *include_paths("cpu")]
    module = Extension(
        "torchcnn._C",
        sorted(
            glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp") + glob("csrc/cpu/isa/*.cpp") + (glob("csrc/cuda/*.cu") if home else [])
        ),
        include_dirs=["csrc"],
        library_dirs=library_paths("cpu") + ([f"{home}/lib64", f"{home}/lib"] if home else []),
        libraries=["torch_cpu"] + (["cudart_static", "rt", "pthread", "dl"] if home else []),
        extra_compile_args=CXX_FLAGS + [word for path in headers for word in ("-isystem", path)],
        language="c++",
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExt}}


# An sdist, and the egg_info that goes before everything, need neither torch nor a compiler.
BUILDS = {"build", "build_ext", "bdist_wheel", "develop", "dist_info", "editable_wheel", "install"}
if __name__ == "__main__":
    setup(**(extension() if BUILDS & set(sys.argv) else {}))
