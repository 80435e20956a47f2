"""examples/train_mnist.py in several processes, with torch.compile and in bfloat16."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

for package in ("matplotlib", "mlxtend", "safetensors", "tqdm"):
    pytest.importorskip(package, reason="the examples need `pip install torchcnn[train]`")

from safetensors.torch import load_file  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torchrun is tried, and its processes are found, on Linux")

TRAIN = Path(__file__).parents[1] / "examples" / "train_mnist.py"
SHORT = ("--validation", "0.8", "--threads", "1", "--augment", "--batch-size", "8")  # 800 training digits


def command(out, *arguments, processes=None):
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}") if processes else ()
    return [sys.executable, *torchrun, TRAIN, *SHORT, "--out", out, *arguments]


def run(*arguments, **options):
    result = subprocess.run(command(*arguments, **options), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def history(run_dir):
    with open(run_dir / "metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def assert_same_within_rounding(run_dir, other):
    for row, expected in zip(history(run_dir), history(other), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run_dir, other))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    run(out, "--epochs", "2")
    return out


def test_two_processes_are_one(alone, tmp_path):
    """Each takes half of every batch; losses and weights are those of the whole. One process writes, once."""
    output = run(tmp_path / "run", "--epochs", "2", processes=2)
    assert "in each of 2 processes" in output and output.count("test accuracy") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert_same_within_rounding(tmp_path / "run", alone)


def workers_of(launcher):
    """{rank: process id} of the processes that a torchrun has started."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        except (OSError, IndexError):
            continue
        if parent == launcher:
            found.update({int(entry[5:]): int(folder.name) for entry in environment if entry.startswith("RANK=")})
    return found


def ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_checkpoint_resumes(alone, tmp_path):
    """Two processes, the second killed after an epoch; two others go on, with the result of a run that nobody killed."""
    out = tmp_path / "run"
    arguments = command(out, "--epochs", "2", processes=2)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        try:
            assert launcher.stdout.readline().startswith("LeNet-5")
            workers = workers_of(launcher.pid)
            assert workers.keys() == {0, 1}
            assert any(line.startswith("epoch  1/2") for line in launcher.stdout)
            os.kill(workers[1], signal.SIGKILL)
            started = time.monotonic()
            _, errors = launcher.communicate(timeout=60)
        finally:
            launcher.kill()
    assert launcher.returncode != 0 and "SIGKILL" in errors
    assert time.monotonic() - started < 60
    assert all(ended(pid) for pid in workers.values())
    assert not (out / "metrics.json").exists()
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    assert len(checkpoint["history"]) == 1

    resumed = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", TRAIN, "--resume", out]
    result = subprocess.run([*resumed, "--threads", "1"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert_same_within_rounding(out, alone)


def test_a_batch_that_cannot_be_divided(tmp_path):
    result = subprocess.run(
        command(tmp_path / "run", "--batch-size", "31"),
        env={
            **os.environ,
            "WORLD_SIZE": "2",
            "RANK": "0",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "0",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode != 0 and "--batch-size 31 cannot be divided among 2 processes" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("option", [("--compile",), ("--amp", "bf16")], ids=["compile", "amp"])
def test_options_train_to_the_same_accuracy(tmp_path, option):
    """95% of the test digits after four epochs, as the plain run of test_examples.py."""
    arguments = [sys.executable, TRAIN, "--threads", "1", "--epochs", "4", "--out", tmp_path / "run", *option]
    subprocess.run(arguments, check=True, capture_output=True, timeout=600)
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert results["test_accuracy"] >= 0.95
