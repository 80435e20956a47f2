"""Builds the one extension, torchcnn._C; what is fixed about the package stands in pyproject.toml.

Environment: TORCHCNN_CUDA=0|1|auto (auto, the default: where nvcc and a CUDA build of torch are both there),
CUDA_HOME, TORCH_CUDA_ARCH_LIST, CXX, CFLAGS, MAX_JOBS.
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

# The target version hides what torch 2.10 does not have: one binary then serves 2.10 and every later torch.
COMMON_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-std=c++20", "-O3"]
CXX_FLAGS = ["-g0", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-lineinfo", "-Xcompiler=-fvisibility=hidden"]
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


def choose_cuda(torch):
    """Whether to build the CUDA kernels; if so, set what torch would have to guess."""
    choice = os.environ.get("TORCHCNN_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        fail(f"TORCHCNN_CUDA is {choice!r}: set it to 0, 1 or auto.")
    guesses = [os.path.realpath(shutil.which("nvcc") or "").removesuffix("/bin/nvcc"), "/usr/local/cuda"]
    guess = next((folder for folder in guesses if os.path.exists(f"{folder}/include/cuda.h")), "")
    home = os.environ.get("CUDA_HOME") or guess
    release = re.search(r"release (\d+)", output_of(f"{home}/bin/nvcc", "--version"))
    obstacle = None
    if not glob("csrc/cuda/*.cu"):
        obstacle = "there are no CUDA sources (csrc/cuda/*.cu)"
    elif not release:
        obstacle = "there is no nvcc: install the CUDA toolkit, or set CUDA_HOME to its folder"
    elif not torch.version.cuda:
        obstacle = f"torch {torch.__version__} was built without CUDA: install a CUDA build of torch"
    elif torch.version.cuda.split(".")[0] != release[1]:
        obstacle = f"torch is for CUDA {torch.version.cuda} and nvcc is of CUDA {release[1]}: set CUDA_HOME"
    if choice == "1" and obstacle:
        fail(f"TORCHCNN_CUDA is 1, but {obstacle}.")
    if choice == "0" or obstacle:
        return False
    os.environ["CUDA_HOME"] = home
    known = output_of(f"{home}/bin/nvcc", "--list-gpu-arch").split()
    usable = [arch for arch in CUDA_ARCHITECTURES if "compute_" + arch.replace(".", "") in known]
    os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(usable) + "+PTX"
    return True


def extension():
    """The arguments of setup() that build torchcnn._C."""
    if sys.platform == "win32":
        fail("Windows is not supported: use Linux, macOS on arm64, or WSL 2.")
    # Where the environment is used without being activated, its ninja is found only this way.
    os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", "")
    torch, pybind11 = import_torch()
    choose_compiler()
    cuda = choose_cuda(torch)
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

    # No warnings from system headers. pybind11 goes first: the target version bars torch's copy of it.
    headers = [pybind11.get_include(), *include_paths("cuda" if cuda else "cpu")]
    system = [word for path in headers for word in ("-isystem", path)]

    class BuildExt(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # pip's editable install would take a temporary folder and so compile everything each time.
            self.build_temp = f"build/temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

        def build_extensions(self):
            try:
                super().build_extensions()
            except RuntimeError as error:
                fail(f"{error} (the compiler's messages stand above).")

    module = Extension(
        "torchcnn._C",
        sorted(
            glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp") + glob("csrc/cpu/isa/*.cpp") + (glob("csrc/cuda/*.cu") if cuda else [])
        ),
        depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True)),
        include_dirs=[os.path.abspath("csrc")],
        library_dirs=library_paths("cuda" if cuda else "cpu"),
        libraries=["torch_cpu", "torch_cuda", "cudart"] if cuda else ["torch_cpu"],
        extra_compile_args={
            "cxx": COMMON_FLAGS + CXX_FLAGS + system,
            "nvcc": COMMON_FLAGS + NVCC_FLAGS + system,
        },
        language="c++",
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExt}}


# An sdist, and the egg_info that goes before everything, need neither torch nor a compiler.
BUILDS = {"build", "build_ext", "bdist_wheel", "develop", "dist_info", "editable_wheel", "install"}
setup(**(extension() if BUILDS & set(sys.argv) else {}))
