"""Read digits from image files with a LeNet-5 that train_mnist.py has trained.

    python examples/predict.py four.png nine.png --model runs/lenet

An image is 28 x 28 or of any other size, one digit in it, dark on light or light on dark.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from mnist_data import normalise
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from train_mnist import RunError, backend_layers, lenet5


class ImageError(Exception):
    """A file without a digit to read; the message is one sentence for the user."""


def read_image(path):
    """Return the grey values of an image file, float32; what is transparent counts as paper."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits, which convert("L") would clip
                return np.asarray(image, np.float32)
            grey = np.asarray(image.convert("LA"), np.float32)
    except FileNotFoundError:
        raise ImageError("no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"not a readable image ({error})") from None
    value, opacity = grey[..., 0], grey[..., 1] / 255
    # Ink drawn on nothing: dark ink on white paper, light ink on black.
    paper = 255.0 if value[opacity > 0.5].sum() < 127.5 * (opacity > 0.5).sum() else 0.0
    return value * opacity + paper * (1 - opacity)


def to_mnist(grey):
    """Return the image as MNIST has it: 28 x 28, white on black, in a 20 x 20 box, centred by its mass.

    LeCun et al., 1998, section III.A.
    """
    background = np.median(np.concatenate((grey[0], grey[-1], grey[:, 0], grey[:, -1])))
    ink = np.abs(grey - background)
    if ink.max() < 1e-3 * max(255.0, grey.max()):
        raise ImageError("one grey level all over, no digit in it")
    ink /= ink.max()
    # What is fainter than this counts as paper: noise, a JPEG's ripples, a shadow.
    rows, columns = np.nonzero(ink > 0.2)
    ink = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    scale = 20 / max(ink.shape)
    height, width = (max(1, round(scale * size)) for size in ink.shape)
    # Pillow's bilinear filter averages when it shrinks and, unlike bicubic, never overshoots.
    ink = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BILINEAR))
    mass = ink.sum()
    top = round(14 - (ink.sum(1) @ np.arange(height)) / mass)
    left = round(14 - (ink.sum(0) @ np.arange(width)) / mass)
    top, left = min(max(top, 0), 28 - height), min(max(left, 0), 28 - width)
    result = np.zeros((28, 28), np.uint8)
    result[top : top + height, left : left + width] = np.rint(255 * ink / ink.max())
    return result


def load_model(run_dir, backend):
    model = lenet5(backend_layers(backend))
    path = run_dir / "model.safetensors"
    if not path.exists():
        raise RunError(f"{path} does not exist: train_mnist.py writes it; --model names its run folder")
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise RunError(f"{path}: not a LeNet-5 of train_mnist.py ({str(error).splitlines()[0]})") from None
    return model


def main(argv=None):
    parser = argparse.ArgumentParser(description="Read digits from image files with a trained LeNet-5.")
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", type=Path)
    add("--model", metavar="DIR", type=Path, default=Path("runs/lenet"), help="run folder (%(default)s)")
    add("--backend", choices=("torchcnn", "torch"), default="torchcnn", help="of convolution and pooling")
    args = parser.parse_args(argv)
    try:
        model = load_model(args.model, args.backend)
    except RunError as error:
        sys.exit(f"predict.py: {error}")
    failed = False
    for path in args.images:
        try:
            pixels = to_mnist(read_image(path))
        except ImageError as error:
            print(f"{path}: {error}", file=sys.stderr)
            failed = True
            continue
        with torch.no_grad():
            probabilities = model(normalise(pixels[None])).softmax(1)[0]
        print(f"{path}: {int(probabilities.argmax())} ({float(probabilities.max()):.1%})")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
