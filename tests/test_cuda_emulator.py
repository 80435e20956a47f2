"""The emulator of CUDA kernels finds the mistakes that it is there for, and gives right numbers where there are none.

Kernels and mistakes stand in cuda_emulator/self_test.cu. In the fast build a mistake shows as an error or as wrong numbers in
one of the orders in which threads run; `check` has to find each in every order.
"""

import ctypes
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent / "cuda_emulator"
sys.path.insert(0, str(HERE))
import build  # noqa: E402

pytestmark = pytest.mark.skipif(build.obstacle() is not None, reason=str(build.obstacle()))

ORDERS = [(0, 0), (1, 0), (2, 1), (2, 2)]  # ascending, descending, random with two seeds
BLOCKS, THREADS, TILES = 3, 64, 5

# What `check` says of a mistake. A value that comes too late may not be there at all in some orders.
UNORDERED = "race|nothing has written so far"
MISTAKES = {
    "rotate: no barrier after write": UNORDERED,
    "rotate: no barrier before overwrite": "race",
    "rotate: uninitialised shared read": "nothing has written",
    "rotate: shared index overflow": "index out of bounds",
    "rotate: exit before barrier": "divergence",
    "rotate: divergent barrier": "divergence",
    "scale: read past the end": "out of bounds: reads",
    "scale: write past the end": "out of bounds: writes",
    "scale: uninitialised global read": "nothing has written",
    "scale: write by two blocks": "of another block",
    "scale: read of another block": UNORDERED,
    "scale: misaligned vector": "misaligned",
    "scale: failed assert": "assert",
    "reverse: no syncwarp": UNORDERED,
    "reverse: syncwarp of half": UNORDERED,
    "sum: no wait": "still under way",
    "sum: no commit": "still under way",
    "sum: copy over a copy": "still under way",
    "sum: copy over a read": "race",
    "sum: read before barrier": UNORDERED,
    "sum: misaligned copy": "not 16-byte aligned",
    "sum: copy past the end": "out of bounds: reads",
    "sum: too little shared memory": "outside of shared memory",
    "multiply bf16: too little shared memory": "out of bounds: writes 2 bytes of shared memory",
    "multiply f16: partial warp": "divergence",
    "multiply tf32: partial warp": "divergence",
    "multiply f16: misaligned row": "not 16-byte aligned",
    "multiply f16: no barrier before matrices": UNORDERED,
}
FOUND_BY_ASAN = {
    "rotate: shared index overflow": "index out of bounds",
    "scale: read past the end": "AddressSanitizer: heap-buffer-overflow",
    "scale: write past the end": "AddressSanitizer: heap-buffer-overflow",
    "scale: misaligned vector": "misaligned",
    "sum: copy past the end": "AddressSanitizer: heap-buffer-overflow",
    "multiply bf16: too little shared memory": "AddressSanitizer: use-after-poison",
}
NOT_FOUND_BY_FAST = {
    "rotate: shared index overflow",  # beyond the array is unused memory of the segment
    "scale: read past the end",
    "scale: write past the end",
    "scale: misaligned vector",
    "sum: copy past the end",
    "multiply bf16: too little shared memory",
    "multiply f16: no barrier before matrices",  # the lanes of a warp meet there anyway
}
RIGHT = ["rotate", "scale", "reverse", "sum", "multiply f16", "multiply bf16", "multiply tf32"]


@cache
def library_of(mode):
    path = build.BUILD / mode / "self_test.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    build.build_kernels(mode, [HERE / "self_test.cu"], path)
    return path


@cache
def loaded(path):
    return ctypes.CDLL(str(path))


def problem(kernel):
    """The input of a kernel and, from NumPy, its output: small integers, which every format holds."""
    draw = np.random.default_rng(0).integers
    if kernel == "sum":
        values = draw(-9, 9, (BLOCKS, TILES, THREADS, 4))
        return values, np.roll(values.sum(1), -1, axis=1)
    if kernel.startswith("multiply"):
        a, b = draw(-9, 9, (16, 16)), draw(-9, 9, (16, 8))
        return np.concatenate([a.ravel(), b.ravel()]), a @ b
    values = draw(-9, 9, (BLOCKS, THREADS))
    if kernel == "scale":
        return values.ravel()[:-5], 2 * values.ravel()[:-5]
    if kernel == "reverse":
        return values, values.reshape(-1, 32)[:, ::-1]
    return values, np.roll(values, -2, axis=1)


def run(mode_library, name, order, seed):
    """The message of an error, and whether the numbers are right."""
    values, expected = problem(name.split(":")[0])
    values, expected = (np.ascontiguousarray(array, dtype=np.float32).ravel() for array in (values, expected))
    output, message = np.empty_like(expected), ctypes.create_string_buffer(4096)
    pointer = ctypes.POINTER(ctypes.c_float)
    failed = loaded(mode_library).self_test(
        name.encode(),
        order,
        ctypes.c_uint(seed),
        values.ctypes.data_as(pointer),
        ctypes.c_size_t(values.size),
        output.ctypes.data_as(pointer),
        ctypes.c_size_t(output.size),
        message,
        ctypes.c_size_t(len(message)),
    )
    return message.value.decode() if failed else "", np.array_equal(output, expected)


def run_under_asan(names):
    environment = {**os.environ, **build.asan_environment()}
    command = [sys.executable, __file__, str(library_of("asan")), *names]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("mode", ["fast", "check"])
@pytest.mark.parametrize("name", RIGHT)
def test_right_kernel(mode, name):
    for order, seed in ORDERS:
        assert run(library_of(mode), name, order, seed) == ("", True), (order, seed)


def test_right_kernels_under_asan():
    done = run_under_asan(RIGHT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [repr(("", True))] * len(RIGHT) * len(ORDERS)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_found_in_every_order(name):
    for order, seed in ORDERS:
        message, _ = run(library_of("check"), name, order, seed)
        assert re.search(MISTAKES[name], message), (order, seed, message)
        assert "self_test.cu:" in message


@pytest.mark.parametrize("name", [name for name in MISTAKES if name not in NOT_FOUND_BY_FAST])
def test_mistake_shows_in_the_fast_build(name):
    results = [run(library_of("fast"), name, order, seed) for order, seed in ORDERS]
    assert any(result != ("", True) for result in results)


@pytest.mark.parametrize("name", FOUND_BY_ASAN)
def test_mistake_is_found_by_asan(name):
    done = run_under_asan([name])
    assert FOUND_BY_ASAN[name] in done.stderr + done.stdout
    assert "self_test.cu" in done.stderr + done.stdout


def find_cute():
    """The headers of CUTLASS: build/cutlass, where `make cuda-check` puts them, or CUTLASS_HOME."""
    folders = [Path(os.environ["CUTLASS_HOME"]) / "include"] if "CUTLASS_HOME" in os.environ else []
    folders += [build.ROOT / "build" / "cutlass" / "cutlass_library" / "source" / "include"]
    return next((folder for folder in folders if (folder / "cute" / "tensor.hpp").exists()), None)


@pytest.mark.skipif(find_cute() is None, reason="there are no headers of CUTLASS (make build/cutlass)")
def test_fragments_are_those_of_cute(tmp_path):
    program, headers = tmp_path / "compare", build.find_headers()
    includes = [word for folder in (headers, headers / "cccl", find_cute()) for word in ("-isystem", folder)]
    source = HERE / "compare_with_cute.cpp"
    subprocess.run([build.compiler(), "-std=c++20", "-w", "-I", HERE, *includes, source, "-o", program], check=True)
    results = build.output_of(program).splitlines()
    assert len(results) == 11
    for result in results:
        assert re.fullmatch(r".*: (64|128|256) compared, 0 elsewhere", result), result


if __name__ == "__main__":  # library, names
    for test in sys.argv[2:]:
        for test_order in ORDERS:
            print(run(sys.argv[1], test, *test_order))
