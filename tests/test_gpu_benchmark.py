"""The model of the CUDA kernels' work against counting, and the benchmark of GPUs as far as it runs without one."""

import contextlib
import csv
import importlib
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
MODULES = "contenders", "floors", "gpu", "gpu_model", "layers", "plot", "run", "timing"


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    loaded = {name: sys.modules.pop(name, None) for name in MODULES}
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name, module in loaded.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


# -------------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize(("stride", "dilation", "pad"), list(itertools.product([1, 2, 3], [1, 2, 3], [0, 1, 4])))
def test_phases_of_grad_input_are_the_products_that_exist(harness, stride, dilation, pad):
    """Each phase multiplies its rows by its taps: all (h, r) with h + pad - r dilation divisible by the stride, no other."""
    H, R = 13, 4
    phases = harness.gpu_model.phases(None, H, R, stride, pad, dilation, True)
    existing = sum((h + pad - r * dilation) % stride == 0 for h in range(H) for r in range(R))
    assert sum(rows for rows, _ in phases) == H
    assert sum(rows * taps for rows, taps in phases) == existing


def test_flops_and_least_bytes_are_counted(harness):
    layer = harness.layers.Conv(2, 6, 9, 4, (3, 2), 2, (1, 0), groups=2, W=8)
    P, Q = 5, 4
    products = sum(1 for _ in itertools.product(range(2), range(4), range(P), range(Q), range(3), range(3), range(2)))
    for direction in ("forward", "grad_input", "grad_weight"):
        work = harness.gpu_model.conv_work(layer, direction, "float32")
        assert work.flops == 2 * products
        assert work.least_bytes == 4 * (2 * 6 * 9 * 8 + 4 * 3 * 3 * 2 + 2 * 4 * P * Q)


@pytest.mark.parametrize("arithmetic", ["float32", "tf32", "float16"])
def test_asked_bytes_are_those_of_a_loop_over_blocks(harness, arithmetic):
    """forward, block by block: the rows of both operands that exist, in whole tiles of k; then the result, packing beside."""
    layer = harness.layers.Conv(2, 20, 9, 70, 3, 1, 1)
    size = harness.gpu_model.BYTES[arithmetic]
    pixels, channels = 2 * 9 * 9, 70
    block, block_k = 64, 128 // size
    whole = -(-20 * size // 16) * 16 // size  # channels in vectors of 16 bytes
    asked = done = blocks = 0
    for m, n in itertools.product(range(0, pixels, block), range(0, channels, block)):
        blocks += 1
        for _ in range(0, 9 * whole, block_k):
            asked += (min(block, pixels - m) + min(block, channels - n)) * block_k * size
            done += 2 * block * block * block_k
    asked += (pixels * channels + 70 * 9 * (20 + whole)) * size
    work = harness.gpu_model.conv_work(layer, "forward", arithmetic)
    assert (work.asked_bytes, work.done_flops, work.blocks) == (asked, done, blocks)


def test_grad_weight_parts_cover_the_pixels(harness):
    """Few weights: many parts, but none so short that its beginning costs more. Scratch memory is written and read once."""
    layer = harness.layers.Conv(4, 32, 32, 32, 3, 1, 1)
    work = harness.gpu_model.conv_work(layer, "grad_weight", "float16")
    tiles_n, tiles_k = -(-32 * 9 // 64), 4 * 32 * 32 // 64
    parts = work.blocks // tiles_n
    assert 4 <= parts <= 16 and work.blocks == tiles_n * parts and tiles_k % parts < tiles_k / parts
    assert work.done_bytes - work.least_bytes == 2 * parts * 32 * 32 * 9 * 4


def test_grad_weight_of_many_weights_has_few_parts(harness):
    """512 x 512 filters fill the GPU more than half without being cut: another part would cost 19 MB written and read."""
    work = harness.gpu_model.conv_work(harness.layers.Conv(4, 512, 14, 512, 3, 1, 1), "grad_weight", "float16")
    assert work.blocks == 4 * 36


def test_floor_is_the_slower_of_arithmetic_and_memory(harness):
    a100, h100 = harness.gpu_model.GPUS
    heavy = harness.gpu_model.conv_work(harness.layers.Conv(8, 256, 14, 256, 3, 1, 1), "forward", "float32")
    assert heavy.floor(a100) == pytest.approx(heavy.flops / 19.5e12 * 1e6) and heavy.bound(a100) == "flops"
    light = harness.gpu_model.conv_work(harness.layers.depthwise(8, 512, 14, 3), "forward", "float16")
    assert light.floor(h100) == pytest.approx(light.least_bytes / 3.35e12 * 1e6) and light.bound(h100) == "bytes"


@pytest.mark.parametrize("table", ["conv", "pool"])
def test_no_layer_is_below_its_floor(harness, tmp_path, capsys, table):
    path = tmp_path / "model.csv"
    harness.gpu_model.main([table, "--csv", str(path)])
    assert capsys.readouterr().out.startswith("A model, not a measurement")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    groups = (
        harness.layers.CONV if table == "conv" else ("max", "avg", "global max", "global avg", "adaptive max", "adaptive avg")
    )
    assert {row["class"] for row in rows} == set(groups)
    for row in rows:
        for gpu in ("A100", "H100"):
            assert float(row[f"{gpu}_tiled_us"]) >= 0.999 * float(row[f"{gpu}_floor_us"]) > 0, row


def test_model_names_an_unknown_class(harness):
    with pytest.raises(SystemExit, match="no class of conv begins with '9x9'"):
        harness.gpu_model.main(["conv", "--classes", "9x9"])


# ---------------------------------------------------------------------------------------------------------- the benchmark


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(harness):
    with pytest.raises(SystemExit, match=r"needs a GPU, and torch sees none; torch .* was built"):
        harness.run.main(["conv", "--device", "cuda"])


@pytest.mark.parametrize("table", ["dtypes", "networks"])
def test_some_tables_are_of_processors(harness, table, capsys):
    with pytest.raises(SystemExit):
        harness.run.parse([table, "--device", "cuda"])
    assert "measures conv and pool, in every dtype" in capsys.readouterr().err
    assert harness.run.parse(["conv"]).device == "cpu"


@pytest.fixture
def without_gpu(harness, monkeypatch):
    """Everything but the GPU and the clock: tensors on the processor, one layer a class, times that are given."""
    one_conv, one_pool = [harness.layers.Conv(1, 4, 5, 4, 3, 1, 1)], [harness.layers.Pool(1, 2, 7, 3, 2, 1)]
    for group in harness.layers.CONV:
        monkeypatch.setitem(harness.layers.CONV, group, one_conv)
    monkeypatch.setattr(harness.layers, "POOL", one_pool)
    monkeypatch.setattr(harness.layers, "GLOBAL_POOL", [harness.layers.Pool(1, 3, 5, output=1)])
    monkeypatch.setattr(harness.layers, "ADAPTIVE_POOL", [harness.layers.Pool(1, 2, 7, output=3)])
    monkeypatch.setattr(harness.gpu, "require_gpu", lambda: "cpu")
    conv, cudnn = torch.backends.cudnn.conv, torch.backends.cudnn
    before = conv.fp32_precision, cudnn.benchmark, cudnn.deterministic

    def run(*command, peers=10.0, ours=10.0):
        def microseconds(functions, rounds):
            assert rounds == harness.gpu.ROUNDS
            for function in functions.values():
                function()
            return {name: ours if name.startswith("torchcnn") else peers for name in functions}

        monkeypatch.setattr(harness.gpu, "microseconds", microseconds)
        machine = {"gpu": "NVIDIA A100-SXM4-80GB", "torch_version": torch.__version__, "cudnn_version": "9.0.0"}
        return harness.gpu.main(harness.run.parse([*command, "--device", "cuda"]), machine)

    with torch.backends.__allow_nonbracketed_mutation():  # PyTorch's test helpers bar the switches once imported
        yield run
        conv.fp32_precision, cudnn.benchmark, cudnn.deterministic = before


@pytest.mark.parametrize("layouts", [["nchw", "channels_last"], ["nchw"], ["channels_last"]], ids="+".join)
@pytest.mark.parametrize("table", ["conv", "pool"])
def test_every_case_is_checked_and_has_a_row(harness, without_gpu, tmp_path, capsys, table, layouts):
    path = tmp_path / "rows.csv"
    options = ["--layout", *layouts] if len(layouts) == 1 else []
    assert without_gpu(table, "--csv", str(path), *options) == 0
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    directions = {"conv": harness.floors.CONV, "pool": harness.floors.POOL}[table]
    arithmetics = list(harness.gpu.DTYPES) if table == "conv" else ["float32", "float16", "bfloat16"]
    expected = {
        (group, direction, name, layout)
        for group in directions
        for direction in directions[group]
        for name in arithmetics
        for layout in layouts
    }
    assert {(row["class"], row["direction"], row["arithmetic"], row["layout"]) for row in rows} == expected
    assert all(row["wrong"] == "False" and float(row["error"]) < 1e-2 for row in rows)
    assert all(0 < float(row["floor"]) < 1 for row in rows if row["direction"] != harness.floors.TRAIN)
    printed = capsys.readouterr().out
    assert printed.count(" mean ") == len(expected) and "MISS" not in printed


def test_only_a_whole_run_writes_the_table(harness, without_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(harness.gpu, "RESULTS", tmp_path)
    for partly in (["--layout", "nchw"], ["--classes", "max"]):
        without_gpu("pool", *partly)
    assert not list(tmp_path.iterdir())
    without_gpu("pool")
    assert [path.name for path in tmp_path.iterdir()] == ["pool_NVIDIA_A100_SXM4_80GB.csv"]


def test_kernels_are_listed(harness, without_gpu, monkeypatch, tmp_path, capsys):
    """Of the profiler's events those of a GPU, without what empties the cache: a mean over the four calls."""
    monkeypatch.setattr(harness.gpu, "RESULTS", tmp_path)

    def event(name, time, device=torch.autograd.DeviceType.CUDA):
        return SimpleNamespace(name=name, device_time=time, device_type=device)

    events = [event("conv", 4.0), event("add", 1.0)] * 4 + [event("void FillFunctor<signed char>", 9.0), event("Memset", 9.0)]
    events.append(event("aten::conv", 7.0, torch.autograd.DeviceType.CPU))
    profile = contextlib.nullcontext(SimpleNamespace(events=lambda: events))
    monkeypatch.setattr(torch.profiler, "profile", lambda **options: profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(harness.gpu, "flush_buffer", lambda: torch.empty(1))
    without_gpu("pool", "--classes", "max", "--kernels")
    printed = capsys.readouterr().out
    layers, directions = len(harness.layers.POOL), len(harness.floors.POOL["max pool"])
    assert printed.count(": 5.0 us\n       4.0  conv\n       1.0  add\n") == layers * directions * 3 * 2  # arithmetics, layouts
    assert " mean " not in printed and not list(tmp_path.iterdir())


def test_arithmetics_and_time_can_be_chosen(harness, without_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(harness.gpu, "RESULTS", tmp_path)
    without_gpu("conv", "--arithmetics", "tf32,float16")
    printed = capsys.readouterr().out
    assert "tf32" in printed and "float16" in printed and "float32 " not in printed and "bfloat16" not in printed
    monkeypatch.setattr(harness.gpu.time, "perf_counter", iter(range(0, 10**9, 100)).__next__)
    without_gpu("conv", "--seconds", "1")
    printed = capsys.readouterr().out
    assert "The rest is left out: 1 seconds are over." in printed and printed.count(" mean ") == 2  # one case, both layouts
    assert not list(tmp_path.iterdir())  # nor is a part taken for the whole
    for options, complaint in (
        (["--kernels"], "--arithmetics, --seconds and --kernels are options of --device cuda"),
        (["--device", "cuda", "--arithmetics", "float8"], "must be of float32, tf32, float16, bfloat16, got float8"),
        (["--seconds", "1"], "are options of --device cuda"),
    ):
        with pytest.raises(SystemExit):
            harness.run.parse(["conv", *options])
        assert complaint in capsys.readouterr().err


def test_torch_and_the_truth_are_computed_once(harness, without_gpu, monkeypatch, tmp_path):
    """torch's four take their turns once for both layouts; float64 is computed once for float32 and tf32, without a search."""
    cudnn, seen = torch.backends.cudnn, []

    def noted(layer, *tensors):
        def call(name, function):
            seen.append((name, tensors[0].dtype, cudnn.benchmark, cudnn.deterministic))
            return function()

        calls = right(layer, *tensors)
        return {name: lambda name=name, function=function: call(name, function) for name, function in calls.items()}

    right = harness.contenders.torch_conv
    monkeypatch.setattr(harness.contenders, "torch_conv", noted)
    monkeypatch.setattr(harness.gpu, "warm_up", lambda functions: None)
    assert without_gpu("conv", "--classes", "5x5", "--csv", str(tmp_path / "rows.csv")) == 0
    forward = [call[1:] for call in seen if call[0] == "forward"]
    assert [call[1:] for call in forward if call[0] == torch.float64] == [(False, True)] * 3
    for dtype, times in ((torch.float32, 4), (torch.float16, 2), (torch.bfloat16, 2)):  # float32: tf32 too
        assert sorted(call[1:] for call in forward if call[0] == dtype) == [(False, True)] * times + [(True, False)] * times


class Clock:
    """A GPU and its host, in us: a launch keeps the host for a while, the work begins when all before it is done."""

    def __init__(self, monkeypatch):
        self.host = self.gpu = 0.0
        fake = {
            "_sleep": lambda cycles: self.enqueue(cycles / 2000),
            "synchronize": lambda: None,
            "Event": lambda **_: Event(self),
        }
        for name, function in fake.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def enqueue(self, takes, launch=2.0):
        self.host += launch
        self.gpu = max(self.gpu, self.host) + takes

    def zero_(self):
        self.enqueue(50.0)


class Event:
    def __init__(self, clock):
        self.clock = clock

    def record(self):
        self.clock.enqueue(0.0)
        self.time = self.clock.gpu

    def query(self):
        return self.time <= self.clock.host

    def elapsed_time(self, end):
        return (end.time - self.time) / 1e3


@pytest.mark.parametrize("launches", [1, 20, 100, 1000])
def test_launches_do_not_count(harness, monkeypatch, launches):
    """A call of many kernels that take a tenth of their launches: the pause grows until all are in the queue."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr(harness.gpu, "flush_buffer", lambda: clock)
    calls = []

    def call():
        calls.append(clock.host)
        for _ in range(launches):
            clock.enqueue(0.2)

    times = harness.gpu.microseconds({"call": call, "nothing": lambda: None}, 7)
    assert times == {"call": pytest.approx(0.2 * launches), "nothing": pytest.approx(0.0)}
    assert 7 <= len(calls) <= 7 + 5


def test_a_call_that_waits_for_the_gpu_is_measured_too(harness, monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(harness.gpu, "flush_buffer", lambda: clock)
    calls = []

    def call():
        calls.append(clock.host)
        clock.enqueue(5.0)
        clock.host = clock.gpu

    assert 5.0 <= harness.gpu.microseconds({"call": call}, 3)["call"] < 10.0
    assert 3 < len(calls) < 12


def test_a_missed_aim_fails(without_gpu, tmp_path, capsys):
    path = str(tmp_path / "rows.csv")
    assert without_gpu("conv", "--classes", "1x1", "--csv", path, peers=7.9) == 1
    printed = capsys.readouterr().out
    assert (
        printed.count("MISS") == 3 * 3 * 2
    )  # tensor cores: every direction of tf32, float16, bfloat16 in both layouts, not float32
    assert without_gpu("conv", "--classes", "1x1", "--csv", path, peers=8.1) == 0
    assert without_gpu("conv", "--classes", "depthwise", "--csv", path, peers=8.1) == 1


def test_a_wrong_result_on_a_gpu_fails(harness, without_gpu, monkeypatch, tmp_path, capsys):
    def wrong(layer, *tensors):
        calls = right(layer, *tensors)
        return {**calls, "forward": lambda: calls["forward"]() + 0.1}

    right = harness.contenders.torchcnn_conv
    monkeypatch.setattr(harness.contenders, "torchcnn_conv", wrong)
    assert without_gpu("conv", "--classes", "5x5", "--csv", str(tmp_path / "rows.csv")) == 1
    assert capsys.readouterr().out.count("wrong: 1,4,5,4 3x3 p1") == 4 * 2  # forward, in every arithmetic and layout


def test_cudnn_is_told_what_to_use(harness, without_gpu):
    cudnn = torch.backends.cudnn
    for arithmetic, precision in (("tf32", "tf32"), ("float32", "ieee"), ("float16", "ieee")):
        harness.gpu.use_arithmetic(arithmetic)
        assert cudnn.conv.fp32_precision == precision
    for switches in ((True, True), (True, False), (False, True)):
        assert harness.gpu.switched(lambda: (cudnn.benchmark, cudnn.deterministic), *switches)() == switches


@pytest.mark.parametrize(("number", "version"), [(91002, "9.10.2"), (90100, "9.1.0"), (8907, "8.9.7")])
def test_versions_of_cudnn(harness, number, version):
    assert harness.gpu.cudnn_version(number) == version


def test_tables_of_the_readme(harness, without_gpu, tmp_path, capsys):
    """Beside no table of processors, whose markers are not needed then; one cell is of two layers, twice as fast and half."""
    for table in ("conv", "pool"):
        without_gpu(table, "--csv", str(tmp_path / f"{table}.csv"), peers=5.0, ours=2.5)
    path = tmp_path / "conv.csv"
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    key = {"class": "1x1", "direction": "forward", "arithmetic": "float16", "layout": "nchw"}
    row = next(row for row in rows if key.items() <= row.items())
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerows([*rows, row | {"layer": "another", "ratio": "0.5"}])
    readme = tmp_path / "README.md"
    begin, end = harness.plot.GPU_BEGIN, harness.plot.GPU_END
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    capsys.readouterr()
    harness.plot.main(["--results", str(tmp_path), "--readme", str(readme)])
    table = capsys.readouterr().out.rstrip("\n")
    assert readme.read_text() == f"before\n{begin}\n{table}\n{end}\nafter\n"
    assert not (tmp_path / "speedup.png").exists()
    machine = f"NVIDIA A100-SXM4-80GB, torch {torch.__version__}, cuDNN 9.0.0"
    for kind, layout in itertools.product(("Convolution", "Pooling"), ("NCHW", "channels_last")):
        assert f"**{kind}, {layout} tensors, {machine}**" in table
    assert table.count("| class | direction | float32 | TF32 | float16 | bfloat16 |") == 2
    assert table.count("| class | direction | float32 | float16 | bfloat16 |") == 2
    assert table.count("| 1x1 | forward | 2.00 | 2.00 | 1.00 (0.50) | 2.00 |") == 1
    assert table.count("| 1x1 | forward | 2.00 | 2.00 | 2.00 | 2.00 |") == 1


def test_a_readme_keeps_its_tables_of_gpus(harness, tmp_path):
    """Where no GPU has been measured, whatever stands in the README stays."""
    text = (BENCHMARKS.parent / "README.md").read_text()
    readme = tmp_path / "README.md"
    readme.write_text(text)
    results = tmp_path / "results"
    results.mkdir()
    for path in (BENCHMARKS / "results").glob("*.csv"):
        (results / path.name).write_text(path.read_text())
    assert not harness.plot.read_gpu(results)
    harness.plot.main(["--results", str(results), "--readme", str(readme)])
    begin, end = text.index(harness.plot.GPU_BEGIN), text.index(harness.plot.GPU_END)
    assert text[begin:end] in readme.read_text()
