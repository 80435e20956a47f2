"""The benchmarks run, write what they measured and fail when a floor is missed; how fast anything is does not matter here."""

import csv
import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import torchcnn

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
MODULES = "contenders", "floors", "layers", "plot", "run", "timing"
MET, MISSED = (1e-9, 1e-9), (1e9, 1e9)  # whatever is measured


@pytest.fixture
def harness(monkeypatch):
    """The modules of benchmarks/ with tiny layers and floors that are always met."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    loaded = {name: sys.modules.pop(name, None) for name in MODULES}
    modules = SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    layers, floors = modules.layers, modules.floors

    monkeypatch.setattr(modules.timing, "SAMPLE", 1e-5)
    # The tests that follow shall find the allocator as it was.
    monkeypatch.setattr(modules.timing, "warm_allocator", lambda: None)
    tiny = [layers.Conv(1, 2, 5, 4, 3, 1, 1), layers.Conv(2, 4, 6, 4, (1, 3), 2, (0, 1), groups=2, W=7)]
    for table in (layers.CONV, layers.DTYPES):
        for group in table:
            monkeypatch.setitem(table, group, tiny)
    monkeypatch.setattr(layers, "POOL", [layers.Pool(1, 2, 7, 3, 2, 1)])
    monkeypatch.setattr(layers, "GLOBAL_POOL", [layers.Pool(1, 3, 5, output=1)])
    monkeypatch.setattr(layers, "ADAPTIVE_POOL", [layers.Pool(1, 2, 7, output=3)])
    for table in (floors.CONV, floors.CONV_CHANNELS_LAST, floors.POOL, floors.DTYPES, floors.NETWORKS, floors.MODELS):
        for group, directions in table.items():
            monkeypatch.setitem(table, group, dict.fromkeys(directions, MET))
    monkeypatch.setattr(floors, "TWO_THREADS_RATIO", 1e-9)
    monkeypatch.setattr(floors, "COPY_SCALING", 1e-9)
    monkeypatch.setattr(floors, "COMPUTE_BOUND_SCALING", 1e-9)
    monkeypatch.setattr(floors, "HALF_SLOWDOWN", 1e9)
    monkeypatch.setattr(floors, "CALL_SAVES_US", -1e9)
    monkeypatch.setitem(layers.NETWORKS, "ResNet-18 block", (2, 3, 6, 6))
    threads = torch.get_num_threads()
    yield modules
    torch.set_num_threads(threads)
    for name, module in loaded.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "command",
    ["conv", "conv --layout channels_last", "conv --threads 2", "pool", "pool --layout channels_last", "dtypes"],
)
def test_table_has_a_row_for_each_case(harness, command, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    assert harness.run.main([*command.split(), "--quick", "--csv", str(path)]) == 0
    rows = rows_of(path)
    floors = {"conv": harness.floors.CONV, "pool": harness.floors.POOL, "dtypes": harness.floors.DTYPES}[command.split()[0]]
    expected = {(group, direction) for group, directions in floors.items() for direction in directions}
    assert {(row["class"], row["direction"]) for row in rows} == expected
    printed = capsys.readouterr().out
    assert printed.count("  pass\n") + printed.count("  no floor\n") == len(expected)
    for row in rows:
        assert float(row["ratio"]) > 0
        assert float(row["torchcnn_ms"]) > 0
        assert float(row["error"]) < 1e-2  # bfloat16 rounds to 2**-9
        assert float(row["torch_error"]) < 1e-2
        assert row["wrong"] == "False"
        assert (row["scaling"] != "") == ("--threads" in command)


@pytest.mark.parametrize("groups", ["one call,eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_networks(harness, groups, tmp_path):
    path = tmp_path / "rows.csv"
    command = ["networks", "--classes", groups, "--csv", str(path), "--allocator", "default"]
    assert harness.run.main(command) == 0
    rows, names = rows_of(path), harness.layers.NETWORKS
    assert len(rows) == 2 * len(names) if groups == "compiled" else 2 + 2 * len(names)
    assert [row["saved_us"] != "" for row in rows] == [
        row["class"] == "one call" and row["direction"] == "forward" for row in rows
    ]
    assert harness.run.main([*command[:-2], "--quick"]) == 0
    assert all(row["wrong"] == "False" for row in rows_of(path))


def test_models(harness, monkeypatch, tmp_path):
    """A stand-in for a model of torchvision, which is not needed here."""

    def block_with_a_bias_of_no_effect(name):
        model = harness.contenders.BasicBlock(3)
        model.conv1.bias = torch.nn.Parameter(torch.ones(3))  # its gradient is zero but for rounding
        return model

    monkeypatch.setattr(harness.contenders, "torchvision_model", block_with_a_bias_of_no_effect)
    monkeypatch.setattr(harness.layers, "MODEL_INPUT", (2, 3, 6, 6))
    path = tmp_path / "rows.csv"
    assert harness.run.main(["models", "--csv", str(path), "--allocator", "warm", "--quick"]) == 0
    rows = rows_of(path)
    assert [row["layer"] for row in rows] == ["resnet18, 2 images"] * 2
    assert all(row["wrong"] == "False" for row in rows)
    assert harness.run.main(["models", "--csv", str(path), "--allocator", "default"]) == 0
    assert len(rows_of(path)) == 2 * len(harness.floors.MODELS)


def test_a_wrong_gradient_of_a_model_fails(harness, monkeypatch, tmp_path):
    convert = torchcnn.convert

    def wrong(model):
        converted = convert(model)
        converted.bn2.register_full_backward_hook(lambda module, grads, _: (1.2 * grads[0],))
        return converted

    monkeypatch.setattr(harness.contenders, "torchvision_model", lambda name: harness.contenders.BasicBlock(3))
    monkeypatch.setattr(torchcnn, "convert", wrong)
    monkeypatch.setattr(harness.layers, "MODEL_INPUT", (2, 3, 6, 6))
    path = tmp_path / "rows.csv"
    assert harness.run.main(["models", "--csv", str(path), "--quick"]) == 1
    assert {row["direction"] for row in rows_of(path) if row["wrong"] == "True"} == {"training step"}


def test_models_without_torchvision_say_so(harness, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(SystemExit, match="models are those of torchvision"):
        harness.run.main(["models", "--quick", "--csv", str(tmp_path / "rows.csv")])


def test_a_call_that_takes_too_long_fails(harness, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(harness.floors, "CALL_SAVES_US", 1e9)
    assert harness.run.main(["networks", "--classes", "one", "--quick", "--csv", str(tmp_path / "rows.csv")]) == 1
    assert "us saved, 1,1,8,1 3x3 p1: " in capsys.readouterr().out


def test_a_missed_mean_fails(harness, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(harness.floors.CONV["1x1"], "grad_input", (MISSED[0], None))
    assert harness.run.main(["conv", "--quick", "--classes", "1x1,5x5", "--csv", str(tmp_path / "rows.csv")]) == 1
    assert capsys.readouterr().out.count("MISS") == 1


def test_a_missed_worst_layer_fails(harness, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(harness.floors.POOL["max pool"], "forward", (None, MISSED[1]))
    assert harness.run.main(["pool", "--quick", "--classes", "max", "--csv", str(tmp_path / "rows.csv")]) == 1
    assert "worst, 1,2,7 3x3 s2 p1: " in capsys.readouterr().out


@pytest.mark.parametrize("floor", ["TWO_THREADS_RATIO", "COPY_SCALING"])
def test_missed_scaling_fails(harness, monkeypatch, tmp_path, floor):
    monkeypatch.setattr(harness.floors, floor, 1e9)
    arguments = ["conv", "--quick", "--threads", "2", "--classes", "1x1", "--csv", str(tmp_path / "rows.csv")]
    assert harness.run.main(arguments) == 1


def test_halves_slower_than_own_float32_fail(harness, monkeypatch, tmp_path):
    monkeypatch.setattr(harness.floors, "HALF_SLOWDOWN", 1e-9)
    assert harness.run.main(["dtypes", "--quick", "--classes", "bfloat16", "--csv", str(tmp_path / "rows.csv")]) == 1


def test_a_wrong_result_fails(harness, monkeypatch, tmp_path, capsys):
    def wrong(layer, *tensors):
        calls = right(layer, *tensors)
        return {**calls, "forward": lambda: calls["forward"]() + 1e-3}

    right = harness.contenders.torchcnn_conv
    monkeypatch.setattr(harness.contenders, "torchcnn_conv", wrong)
    path = tmp_path / "rows.csv"
    assert harness.run.main(["conv", "--quick", "--classes", "5x5", "--csv", str(path)]) == 1
    assert {row["direction"] for row in rows_of(path) if row["wrong"] == "True"} == {"forward"}
    assert "a wrong result: " in capsys.readouterr().out


def test_nan_is_a_wrong_result(harness):
    exact = torch.ones(2, dtype=torch.float64)
    error, wrong = harness.contenders.check(torch.tensor([1.0, float("nan")]), exact, torch.float32, 2e-5)
    assert wrong
    assert error != error
    assert harness.contenders.check(torch.ones(2), exact, torch.float32, 2e-5) == (0.0, False)


@pytest.mark.parametrize("exact", [1.0 + 2.0**-9, 2.0**-16 + 2.0**-25])
def test_half_result_may_lose_one_rounding(harness, exact):
    """The second number is subnormal in float16, where neighbours are 2**-24 apart whatever their size."""
    dtype, spacing = (torch.bfloat16, 2.0**-7) if exact > 1 else (torch.float16, 2.0**-24)
    exact = torch.tensor([exact], dtype=torch.float64)
    assert not harness.contenders.check(exact.to(dtype), exact, dtype, 2e-5)[1]
    assert harness.contenders.check((exact + spacing).to(dtype), exact, dtype, 2e-5)[1]


def test_unknown_class_is_named(harness):
    with pytest.raises(SystemExit, match="no class of conv begins with '9x9'"):
        harness.run.main(["conv", "--classes", "9x9"])


def test_interleave_gives_every_contender_every_round(harness):
    calls = []
    times = harness.timing.interleave(
        {"a": (lambda: calls.append("a"), 1), "b": (lambda: calls.append("b"), 2)}, 0, 4, lambda threads: calls.append(threads)
    )
    assert {name: len(taken) for name, taken in times.items()} == {"a": 4, "b": 4}
    turns = [(calls[i], calls[i + 1]) for i in range(len(calls) - 1) if calls[i] in (1, 2)]
    assert set(turns) == {(1, "a"), (2, "b")}
    assert len(turns) == 2 * (4 + 1)  # and one to warm up


def test_a_clock_that_stands_still_makes_no_zero(harness, monkeypatch):
    monkeypatch.setattr(harness.timing.time, "process_time", lambda: 1.0)
    times = harness.timing.interleave({"a": (lambda: None, 1)}, 0, 3, lambda threads: None)
    assert all(taken > 0 for taken in times["a"])


def test_slow_contender_is_called_once(harness, monkeypatch):
    monkeypatch.setattr(harness.timing, "SLOW", 0.0)
    calls = []
    times = harness.timing.interleave({"a": (lambda: calls.append(1), 1)}, 1, 5, lambda threads: None)
    assert (len(calls), len(times["a"])) == (1, 1)


def test_picture_and_readme(harness, tmp_path, capsys):
    harness.run.main(["conv", "--quick", "--classes", "1x1,small", "--csv", str(tmp_path / "conv.csv")])
    harness.run.main(["pool", "--quick", "--csv", str(tmp_path / "pool.csv")])
    capsys.readouterr()
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{harness.plot.BEGIN}\nold\n{harness.plot.END}\nafter\n")
    harness.plot.main(["--results", str(tmp_path), "--readme", str(readme)])
    assert (tmp_path / "speedup.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "speedup.svg").read_text()
    text = readme.read_text()
    table = capsys.readouterr().out.rstrip("\n")
    assert text == f"before\n{harness.plot.BEGIN}\n{table}\n{harness.plot.END}\nafter\n"
    ratios = [
        float(row["ratio"]) for row in rows_of(tmp_path / "conv.csv") if (row["class"], row["direction"]) == ("1x1", "forward")
    ]
    assert f"| 1x1 | {(ratios[0] * ratios[1]) ** 0.5:.2f} ({min(ratios):.2f}) |" in table
    assert f"| class | {' | '.join(harness.floors.POOL['max pool'])} |" in table
    assert f"torch {torch.__version__}, {harness.timing.cpu_name()}**" in table


def test_readme_without_markers_stays(harness, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("text\n")
    with pytest.raises(SystemExit, match="must hold one line"):
        harness.plot.replace_block(readme, "table")
    assert readme.read_text() == "text\n"


def test_whole_run_from_the_command_line(tmp_path):
    """With the second process that leaves the allocator as it is; the status is 0 or 1, as the machine has it."""
    path = tmp_path / "rows.csv"
    command = [sys.executable, BENCHMARKS / "run.py", "conv", "--classes", "one image", "--csv", path]
    result = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert result.returncode in (0, 1), result.stderr
    rows = rows_of(path)
    assert len(rows) == 2
    assert all(float(row["default_allocator_ratio"]) > 0 for row in rows)
    assert ("MISS" in result.stdout) == (result.returncode == 1)
