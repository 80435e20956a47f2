"""The build's refusals, one line each, and what one binary for every torch >= 2.10 rests on."""

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import torchcnn
from torchcnn import _C

ROOT = Path(__file__).resolve().parents[1]

CPU_TORCH = '__version__ = "2.13.0+cpu"\nclass version:\n    cuda = None\n'
TORCH = '__version__ = "2.13.0"\nclass version:\n    cuda = "13.0"\n'
NO_TORCH = 'raise ModuleNotFoundError("No module named torch", name="torch")\n'
GCC_12 = 'echo "#define __GNUC__ 12"'
GCC_10 = 'echo "#define __GNUC__ 10"'
CLANG_13 = 'echo "#define __GNUC__ 4"; echo "#define __clang_major__ 13"'
NVCC_12 = 'echo "Cuda compilation tools, release 12.8, V12.8.93"'
NVCC_11 = 'echo "Cuda compilation tools, release 11.8, V11.8.89"'


@pytest.fixture
def build(tmp_path):
    """Runs setup.py in a folder of its own, with a made-up torch, compiler and nvcc."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "modules").mkdir()

    def script(path, line):
        path = tmp_path / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
        return str(path)

    def run(command, torch=TORCH, compiler=GCC_12, nvcc=None, cuda_sources=False, **environment):
        (tmp_path / "modules" / "torch.py").write_text(torch)
        if nvcc:
            script("toolkit/bin/nvcc", nvcc)
        if cuda_sources:
            (tmp_path / "csrc" / "cuda").mkdir(parents=True)
            (tmp_path / "csrc" / "cuda" / "conv2d.cu").touch()
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("TORCH")},
            "PYTHONPATH": str(tmp_path / "modules"),
            "CXX": script("compiler", compiler),
            "CUDA_HOME": str(tmp_path / "toolkit"),
            **environment,
        }
        command = [sys.executable, "setup.py", "--quiet", command]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize(
    ("reason", "circumstances"),
    [
        ("there is no torch.* install torch >= 2.10.* --no-build-isolation", {"torch": NO_TORCH}),
        ("torch 2.9.1.cpu is too old: install torch >= 2.10", {"torch": '__version__ = "2.9.1+cpu"'}),
        ("compiler' is no C..20 compiler.*install gcc >= 11", {"compiler": GCC_10}),
        ("compiler' is no C..20 compiler.*or clang >= 14", {"compiler": CLANG_13}),
        ("'nowhere' is no C..20 compiler", {"CXX": "nowhere"}),
        ("TORCHCNN_CUDA is 'yes': set it to 0, 1 or auto", {"TORCHCNN_CUDA": "yes"}),
        ("TORCHCNN_CUDA is 1, but there are no CUDA sources", {"TORCHCNN_CUDA": "1"}),
        ("TORCHCNN_CUDA is 1, but there is no nvcc", {"TORCHCNN_CUDA": "1", "cuda_sources": True}),
        (
            "TORCHCNN_CUDA is 1, but nvcc is of CUDA 11: it takes 12 or later",
            {"TORCHCNN_CUDA": "1", "cuda_sources": True, "nvcc": NVCC_11, "torch": CPU_TORCH},
        ),
        (
            "TORCHCNN_CUDA is 1, but torch is for CUDA 13.0 and nvcc is of CUDA 12",
            {"TORCHCNN_CUDA": "1", "cuda_sources": True, "nvcc": NVCC_12},
        ),
        (
            "TORCH_CUDA_ARCH_LIST is 'Ampere': list architectures",
            {
                "TORCHCNN_CUDA": "1",
                "cuda_sources": True,
                "nvcc": NVCC_12,
                "torch": CPU_TORCH,
                "TORCH_CUDA_ARCH_LIST": "Ampere",
            },
        ),
        (
            "TORCH_CUDA_ARCH_LIST is '8.0;7.5.PTX': PTX below 8.0 has no tensor-core kernels",
            {
                "TORCHCNN_CUDA": "1",
                "cuda_sources": True,
                "nvcc": NVCC_12,
                "torch": CPU_TORCH,
                "TORCH_CUDA_ARCH_LIST": "8.0;7.5+PTX",
            },
        ),
    ],
)
def test_build_refuses_in_one_line(build, reason, circumstances):
    result = build("build_ext", **circumstances)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert re.match(f"torchcnn cannot be built: .*{reason}", result.stderr), result.stderr


@pytest.mark.parametrize(
    ("wanted", "flags"),
    [
        ("8.0;9.0a+PTX", "compute_80,code=sm_80 compute_90a,code=sm_90a TORCHCNN_SM90A compute_90a,code=compute_90a"),
        ("9.0+PTX", "compute_90a,code=sm_90a TORCHCNN_SM90A compute_90,code=compute_90"),  # Hopper's own steps
        ("8.6 12.0", "compute_86,code=sm_86 compute_120,code=sm_120"),
        ("", "compute_75,code=sm_75 compute_80,code=sm_80 compute_80,code=compute_80"),  # what both know
    ],
)
def test_architectures_become_flags_of_nvcc(tmp_path, monkeypatch, wanted, flags):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho compute_70 compute_75 compute_80\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    setup = runpy.run_path(str(ROOT / "setup.py"))
    assert setup["architecture_flags"](tmp_path) == [
        f"-D{flag}" if "code" not in flag else f"-gencode=arch={flag}" for flag in flags.split()
    ]


def test_sdist_needs_neither_torch_nor_compiler(build):
    result = build("egg_info", torch=NO_TORCH, CXX="nowhere")
    assert result.returncode == 0, result.stderr


def test_version_is_that_of_the_installed_package():
    assert importlib.metadata.version("torchcnn") == torchcnn.__version__


def test_wheels_are_built_for_every_python_of_the_package():
    """The classifiers, requires-python and cibuildwheel speak of the same ones, and of the oldest torch that setup.py takes."""
    text = (ROOT / "pyproject.toml").read_text()
    classified = re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', text)
    built = re.findall(r'"cp3(\d+)-\*"', text)
    assert built == classified and f'requires-python = ">=3.{built[0]}"' in text
    assert "'torch==2.10.*'" in text and 'dependencies = ["torch>=2.10"' in text


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("readelf"), reason="reads ELF headers with readelf")
def test_extension_needs_torch_and_the_c_libraries_alone():
    """No path of the machine that built it, and of torch only what `import torch` has loaded."""
    command = ["readelf", "--dynamic", "--wide", _C.__file__]
    dynamic = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert not re.findall(r"\((?:RPATH|RUNPATH)\).*", dynamic)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    c_libraries = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6"}
    assert "libtorch_cpu.so" in needed
    c_libraries |= {"libdl.so.2", "librt.so.1", "libpthread.so.0"}  # parts of libc.so.6 since glibc 2.34
    rest = needed - c_libraries - {"libtorch_cpu.so"}
    assert all(name.startswith("ld-linux") for name in rest), rest


def test_pre_commit_has_the_pinned_versions():
    pins = set(re.findall(r"^(ruff|clang-format)==(\S+)", (ROOT / "requirements-dev.txt").read_text(), re.M))
    hooks = set(re.findall(r"\[(ruff|clang-format)==(\S+)\]", (ROOT / ".pre-commit-config.yaml").read_text()))
    assert len(pins) == 2 and hooks == pins


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("nm"), reason="reads ELF symbols with nm")
def test_extension_needs_only_the_stable_abi_of_torch():
    command = ["nm", "--dynamic", "--undefined-only", _C.__file__]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"\baoti_torch_library_def\b", symbols)
    assert not re.findall(r"\b_ZN?K?[RO]?(?:2at|3c10|5torch)\w*", symbols)


def test_a_toolkit_of_pypi_is_found_first(tmp_path, monkeypatch):
    """nvcc beside torch in an environment (requirements-nvcc.txt); its headers alone, which torch brings, are no toolkit."""
    home = tmp_path / "nvidia" / "cu13"
    for name in ("include/cuda_runtime.h", "bin/nvcc"):
        (home / name).parent.mkdir(parents=True)
        (home / name).touch()
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    find_toolkit = runpy.run_path(str(ROOT / "setup.py"))["find_toolkit"]
    assert find_toolkit() == str(home)
    (home / "bin/nvcc").unlink()
    assert find_toolkit() != str(home)
