"""The four figures that train_mnist.py leaves in a run folder."""

import copy

import numpy as np
import torch
from matplotlib.figure import Figure

# Figure instead of pyplot: no display is looked for and no state is left behind.


def save_curves(history, path):
    """Loss and accuracy of training and validation over the epochs."""
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for part, marker in (("train", "o"), ("validation", "s")):
            axes.plot(epochs, [row[f"{part}_{quantity}"] for row in history], marker=marker, ms=3, label=part)
        axes.set(xlabel="epoch", ylabel=quantity, title=quantity)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_yscale("log")
    figure.savefig(path, dpi=120)


def save_confusion(confusion, path):
    """How often each test digit (row) was taken for each digit (column)."""
    confusion = np.asarray(confusion)
    share = confusion / confusion.sum(axis=1, keepdims=True)
    figure = Figure(figsize=(6, 5.4), layout="constrained")
    axes = figure.subplots()
    # A square root makes single errors visible beside a diagonal of hundreds.
    axes.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(confusion):
        if count:
            color = "black" if share[row, column] < 0.4 else "white"
            axes.text(column, row, count, ha="center", va="center", fontsize=8, color=color)
    axes.set(xticks=range(10), yticks=range(10), xlabel="predicted", ylabel="true", title="test digits")
    figure.savefig(path, dpi=120)


def save_filters(weight, path):
    """The kernels of the first layer: (K, 1, R, S)."""
    kernels = weight.detach()[:, 0].numpy()
    limit = np.abs(kernels).max()
    figure = Figure(figsize=(1.6 * len(kernels) + 0.8, 2), layout="constrained")
    all_axes = figure.subplots(1, len(kernels))
    for k, (axes, kernel) in enumerate(zip(all_axes, kernels, strict=True)):
        image = axes.imshow(kernel, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set(xticks=[], yticks=[], title=f"k = {k}")
    figure.colorbar(image, ax=all_axes)
    figure.savefig(path, dpi=120)


@torch.no_grad()
def save_activations(model, digits, path):
    """What the layers make of the first digit; before a pool, dots mark the maxima that it passes on."""
    image = digits.images[:1]
    rows = [("input", image, None)]
    for name, layer in model.named_children():
        if "pool" in name:
            pool = copy.copy(layer)
            pool.return_indices = True
            image, indices = pool(image)
            rows[-1] = (*rows[-1][:2], indices)
        else:
            image = layer(image)
        if name != "flatten":
            rows.append((name, image, None))
    probabilities = image.softmax(1)[0]
    rows.append(("softmax", probabilities.unsqueeze(0), None))

    heights = [1.6 if maps.dim() == 4 and maps.shape[1] <= 6 else 0.9 for _, maps, _ in rows]
    figure = Figure(figsize=(12, sum(heights) + 0.6), layout="constrained")
    figure.suptitle(
        f"a {int(digits.labels[0])}, read as {int(probabilities.argmax())} "
        f"({probabilities.max():.1%}); dots: the maxima that the pool below passes on"
    )
    parts = figure.subfigures(len(rows), 1, height_ratios=heights)
    for part, (name, maps, indices) in zip(parts, rows, strict=True):
        draw_row(part, name, maps[0].numpy(), None if indices is None else indices[0].numpy())
    figure.savefig(path, dpi=100)


def draw_row(part, name, maps, indices):
    if maps.ndim == 1:  # a vector: one strip
        axes = part.subplots()
        axes.imshow(maps[None], cmap="gray", aspect="auto")
        axes.set(yticks=[], xticks=range(10) if len(maps) == 10 else [])
        axes.set_ylabel(f"{name}\n{len(maps)}", rotation=0, ha="right", va="center")
        return
    all_axes = part.subplots(1, len(maps), squeeze=False)[0]
    for c, axes in enumerate(all_axes):
        axes.imshow(maps[c], cmap="gray")
        axes.set(xticks=[], yticks=[])
        if indices is not None:
            # An index counts along the rows of its map; a window of zeros has no maximum worth a dot.
            chosen = indices[c].flatten()
            chosen = chosen[maps[c].flatten()[chosen] > 0]
            axes.plot(chosen % maps.shape[2], chosen // maps.shape[2], ".", color="tab:red", ms=2)
    size = " x ".join(map(str, maps.shape))
    all_axes[0].set_ylabel(f"{name}\n{size}", rotation=0, ha="right", va="center")
