"""The reader of machine code finds what it looks for, and the resources of kernels are counted as NVIDIA counts them."""

import subprocess
from collections import Counter
from pathlib import Path

import cuda_check
import cuda_sass
import pytest

NVCC = Path(cuda_check.SETUP["find_toolkit"]()) / "bin" / "nvcc"
needs_nvcc = pytest.mark.skipif(not NVCC.exists() or not cuda_sass.find_tools(), reason="no nvcc, or no cuobjdump and nvdisasm")


def kernel(name="f<float>", architecture="sm_80", registers=32, shared=0, threads=256, local=0, opcodes=()):
    return cuda_sass.Kernel(name, architecture, registers, shared, local, threads, Counter(opcodes))


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "a100", "h100"),
    [
        (32, 0, 256, 8, 8),  # 2048 threads are the most
        (33, 0, 256, 6, 6),  # 40 registers are given
        (128, 0, 256, 2, 2),
        (129, 0, 256, 1, 1),
        (255, 0, 128, 2, 2),
        (16, 0, 32, 32, 32),  # 32 blocks are the most
        (32, 48 << 10, 128, 3, 4),  # 49 KiB of 164 and of 228
    ],
)
def test_blocks_of_a_multiprocessor(registers, shared, threads, a100, h100):
    for architecture, blocks in (("sm_80", a100), ("sm_90a", h100)):
        assert kernel("f", architecture, registers, shared, threads).blocks == blocks


def test_tiles_take_dynamic_shared_memory():
    """Three stages of two operands of 128 rows of 128 bytes; four where there are fewer rows, six where many threads."""
    assert kernel("conv2d_gather<TensorMath<TileShape<__half, 128, 128, by_index, 256>>>").shared == 3 * 2 * 128 * 128
    assert kernel("conv2d_gather<SimtMath<TileShape<float, 128, 64, by_index, 256>>>").shared == 4 * (128 + 64) * 128
    assert kernel("conv2d_gather<SimtMath<TileShape<float, 64, 64, by_index, 128>>>").shared == 4 * (64 + 64) * 128
    assert kernel("conv2d_gather<TensorMath<TileShape<float, 64, 64, by_index, 256>>>").shared == 6 * (64 + 64) * 128


TENSOR = "conv2d_gather<TensorMath<TileShape<__half, 64, 64, by_index, 256>>>"
COMPLETE = ["HMMA.16816.F32", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128"]


def test_complaints():
    assert kernel(TENSOR, opcodes=COMPLETE).complaints() == []
    for missing in COMPLETE:
        (complaint,) = kernel(TENSOR, opcodes=set(COMPLETE) - {missing}).complaints()
        assert f"no {missing.split('.')[0]}" in complaint
    for opcode, what in (
        ("LDL", "local memory"),
        ("STL.64", "local memory"),
        ("RED.E.ADD.F32", "atomic"),
        ("ATOMG.E.ADD", "atomic"),
    ):
        (complaint,) = kernel(TENSOR, opcodes=[*COMPLETE, opcode]).complaints()
        assert what in complaint
    assert kernel(opcodes=["REDUX.SUM"]).complaints() == []
    assert len(kernel(local=8).complaints()) == 1
    assert len(kernel("avg_pool2d_forward_by_teams<__half, 8>", opcodes=["LDG.E.U16", "STG.E.128"]).complaints()) == 1


SOURCE = """
namespace torchcnn::cuda {
template <class T> __global__ void __launch_bounds__(96) plain(const T* from, T* to) { to[threadIdx.x] = from[threadIdx.x] * 2; }
template __global__ void plain(const float*, float*);
__global__ void spilling(const int* from, int* to) {
  int table[64] = {};
  for (int i = 0; i < 64; ++i) table[from[i] & 63] += i;
  to[threadIdx.x] = table[from[threadIdx.x] & 63];
}
__global__ void adding(float* to) { if (threadIdx.x % 2) atomicAdd(to, 1.0f); }
}
"""


@needs_nvcc
def test_real_code_is_read(tmp_path):
    (tmp_path / "code.cu").write_text(SOURCE)
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90)]
    subprocess.run([NVCC, *targets, "-O3", "-c", "code.cu", "-o", "code.o"], cwd=tmp_path, check=True, capture_output=True)
    for architecture in ("sm_80", "sm_90a"):
        kernels = {each.name: each for each in cuda_sass.read(cuda_sass.find_tools(), [tmp_path / "code.o"], [architecture])}
        assert set(kernels) == {"plain<float>", "spilling", "adding"}
        plain = kernels["plain<float>"]
        assert (plain.threads, plain.static_shared, plain.local, plain.complaints()) == (96, 0, 0, [])
        assert any(opcode.startswith("STG") for opcode in plain.opcodes)
        assert kernels["spilling"].local >= 256 and "local memory" in " ".join(kernels["spilling"].complaints())
        assert "atomic" in " ".join(kernels["adding"].complaints())


def test_table_goes_between_its_markers(tmp_path):
    path = tmp_path / "kernels.md"
    path.write_text(f"before\n{cuda_sass.BEGIN}\nold\n{cuda_sass.END}\nafter\n")
    text = cuda_sass.table([kernel("f", "sm_80"), kernel("f", "sm_90a", registers=64)])
    assert text.splitlines()[-1] == "| `f` | 256 | 32 | 0.0 | 8 | 100% | 64 | 0.0 | 4 | 50% |"
    assert cuda_sass.replace_block(path, text)
    assert not cuda_sass.replace_block(path, text)
    assert path.read_text() == f"before\n{cuda_sass.BEGIN}\n{text}\n{cuda_sass.END}\nafter\n"
    path.write_text("nothing\n")
    with pytest.raises(SystemExit, match="must hold one line"):
        cuda_sass.replace_block(path, text)


def test_check_says_what_failed_and_what_was_skipped(monkeypatch, capsys):
    def check_good(args):
        """good"""
        return "fine"

    def check_bad(args):
        """bad"""
        cuda_check.run("sh", "-c", "echo the reason; exit 3")

    def check_left(args):
        """left"""
        raise cuda_check.SkippedError("nothing here")

    monkeypatch.setattr(cuda_check, "STEPS", [check_good, check_left])
    assert cuda_check.main([]) == 0
    assert "1 passed, 0 failed, 1 skipped" in capsys.readouterr().out
    monkeypatch.setattr(cuda_check, "STEPS", [check_good, check_bad, check_left])
    assert cuda_check.main([]) == 1
    printed = capsys.readouterr().out
    assert "the reason\n" in printed and "status 3" in printed and "1 passed, 1 failed, 1 skipped" in printed


def test_without_nvcc_the_emulator_is_left(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for step in (cuda_check.check_build, cuda_check.check_import, cuda_check.check_model, cuda_check.check_sass):
        cuda_check.kernels.cache_clear()
        with pytest.raises(cuda_check.SkippedError, match="no nvcc"):
            step(None)
