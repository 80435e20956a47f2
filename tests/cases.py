"""Named geometries, a reason each. A geometry that once broke something, or is likely to, gets a name here.

Tests run over the whole list, so every operator, direction, dtype and memory layout meets every case.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st


@dataclass(frozen=True)
class Conv2dCase:
    """input (N, C, H, W), weight (K, C / groups, R, S); stride, padding and dilation are what conv2d accepts."""

    name: str
    reason: str
    input: tuple
    filters: tuple  # (K, R, S)
    stride: object = 1
    padding: object = 0
    dilation: object = 1
    groups: int = 1
    bias: bool = True

    @property
    def weight(self):
        K, R, S = self.filters
        return (K, self.input[-3] // self.groups, R, S)

    @property
    def options(self):
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    def __str__(self):
        return self.name


CONV2D_CASES = [
    # Small and degenerate
    Conv2dCase("one_pixel", "every size is one", (1, 1, 1, 1), (1, 1, 1)),
    Conv2dCase("one_output", "kernel as large as the input: a dot product", (2, 3, 4, 5), (2, 4, 5)),
    Conv2dCase("tiny_odd", "every size odd and different", (3, 5, 7, 9), (7, 3, 5)),
    Conv2dCase("plain_3x3", "the most common layer", (2, 4, 8, 8), (8, 3, 3), padding=1),
    Conv2dCase("no_bias", "bias None takes its own path", (2, 4, 8, 8), (8, 3, 3), padding=1, bias=False),
    Conv2dCase("empty_batch", "N = 0: empty output, zero gradients", (0, 3, 6, 6), (4, 3, 3)),
    Conv2dCase("unbatched", "3-D input C x H x W", (3, 6, 7), (4, 3, 3), padding=1),
    Conv2dCase("narrow_image", "W = 1 under a 3-wide kernel: only padding left and right", (2, 3, 9, 1), (4, 3, 3), padding=1),
    Conv2dCase("flat_image", "H = 1", (2, 3, 1, 37), (4, 1, 3), padding=(0, 1)),
    # Kernel shapes
    Conv2dCase("pointwise", "1x1: a matrix product", (2, 13, 6, 7), (9, 1, 1)),
    Conv2dCase("pointwise_strided", "1x1 that skips pixels: most of grad_input is zero", (2, 6, 9, 8), (5, 1, 1), stride=2),
    Conv2dCase("pointwise_padded", "1x1 with padding: the border is bias alone", (1, 3, 4, 5), (4, 1, 1), padding=1),
    Conv2dCase("patches", "windows side by side, a row and a column left over", (2, 5, 9, 23), (13, 2, 2), stride=2),
    Conv2dCase(
        "patches_of_a_vector", "as wide as a vector of pixels, nothing left over", (3, 3, 8, 32), (9, 4, 8), stride=(4, 8)
    ),
    Conv2dCase("patches_of_rows", "one column wide, grouped", (2, 8, 12, 7), (18, 3, 1), stride=(3, 1), groups=2),
    Conv2dCase("row_kernel", "1 x N", (2, 3, 5, 16), (4, 1, 7), padding=(0, 3)),
    Conv2dCase("column_kernel", "N x 1", (2, 3, 16, 5), (4, 7, 1), padding=(3, 0)),
    Conv2dCase("even_kernel", "even kernels have no centre", (2, 3, 9, 10), (5, 2, 4)),
    Conv2dCase("kernel_5x5", "LeNet's first layer", (2, 1, 28, 28), (6, 5, 5)),
    Conv2dCase("kernel_11x11", "AlexNet's first layer, shrunk", (1, 3, 39, 39), (8, 11, 11), stride=4, padding=2),
    Conv2dCase("same_odd", "padding='same', odd kernel", (2, 3, 8, 9), (4, 3, 5), padding="same"),
    Conv2dCase("same_even", "padding='same', even kernel: one more on the right", (2, 3, 8, 9), (4, 4, 2), padding="same"),
    Conv2dCase("same_dilated", "'same' counts the dilated kernel", (1, 2, 9, 9), (3, 3, 2), padding="same", dilation=(2, 3)),
    Conv2dCase("valid", "padding='valid' is no padding", (1, 2, 7, 7), (3, 3, 3), padding="valid"),
    # Stride, padding, dilation
    Conv2dCase("stride_2", "downsampling layer", (2, 4, 9, 9), (6, 3, 3), stride=2, padding=1),
    Conv2dCase("stride_2_even", "the last row and column are never read", (2, 4, 10, 10), (6, 3, 3), stride=2),
    Conv2dCase("stride_3", "stride equals the kernel: patches", (1, 3, 12, 15), (5, 3, 3), stride=3),
    Conv2dCase("stride_4", "stride beyond the kernel: gaps", (2, 3, 17, 18), (4, 3, 2), stride=4),
    Conv2dCase("stride_beyond", "stride larger than the input", (1, 2, 5, 5), (3, 2, 2), stride=9),
    Conv2dCase("stride_mixed", "asymmetric stride", (2, 3, 11, 13), (4, 3, 3), stride=(3, 1), padding=1),
    Conv2dCase("stride_mixed_w", "the other way round", (2, 3, 11, 13), (4, 3, 3), stride=(1, 2), padding=1),
    Conv2dCase("padding_mixed", "asymmetric padding", (2, 3, 6, 5), (4, 3, 3), padding=(2, 0)),
    Conv2dCase("padding_half", "padding = kernel // 2 of an even kernel: output grows", (1, 3, 7, 7), (4, 4, 4), padding=2),
    Conv2dCase("padding_beyond_kernel", "whole windows in the padding: bias alone", (1, 2, 4, 3), (3, 2, 3), padding=(5, 4)),
    Conv2dCase("padding_beyond_strided", "the same, stepping over the image", (2, 2, 3, 3), (3, 3, 3), stride=(4, 3), padding=6),
    Conv2dCase("dilation_2", "holes", (2, 3, 10, 11), (4, 3, 3), padding=2, dilation=2),
    Conv2dCase("dilation_mixed", "asymmetric dilation without padding", (1, 3, 11, 12), (4, 3, 2), dilation=(2, 5)),
    Conv2dCase("dilation_straddles", "taps on both sides of a small image", (1, 2, 3, 3), (3, 2, 2), padding=2, dilation=4),
    Conv2dCase(
        "all_mixed",
        "nothing symmetric at all",
        (2, 6, 13, 14),
        (4, 3, 2),
        stride=(2, 3),
        padding=(3, 1),
        dilation=(2, 3),
        groups=2,
    ),
    Conv2dCase(
        "stride_shares_dilation",
        "stride and dilation have a common factor: some rows of the input meet no tap, others share theirs",
        (2, 3, 19, 23),
        (4, 3, 4),
        stride=(4, 6),
        padding=(1, 2),
        dilation=(2, 4),
    ),
    # Groups
    Conv2dCase("groups_2", "grouped", (2, 6, 8, 8), (4, 3, 3), padding=1, groups=2),
    Conv2dCase("groups_more_filters", "three filters a group", (1, 6, 7, 7), (9, 3, 3), groups=3),
    Conv2dCase("groups_pointwise", "grouped 1x1, strided", (2, 8, 5, 6), (12, 1, 1), stride=(1, 2), groups=4),
    Conv2dCase("depthwise", "groups = C = K", (2, 7, 9, 10), (7, 3, 3), padding=1, groups=7),
    Conv2dCase("depthwise_wide", "a depthwise row longer than a few vectors", (1, 3, 6, 45), (3, 3, 3), padding=1, groups=3),
    Conv2dCase("depthwise_strided", "depthwise downsampling", (2, 5, 11, 12), (5, 3, 3), stride=2, padding=1, groups=5),
    Conv2dCase("depthwise_multiplier", "two filters a channel", (2, 5, 8, 8), (10, 3, 3), padding=1, groups=5),
    Conv2dCase("depthwise_dilated", "depthwise 5x5 with holes", (1, 4, 17, 19), (4, 5, 5), padding=4, dilation=2, groups=4),
    # Register tiles (16 pixels; 6, 8 or 16 channels) and their edges
    Conv2dCase("tile_15_pixels", "one less than a tile of pixels", (1, 3, 3, 5), (6, 1, 1)),
    Conv2dCase("tile_16_pixels", "a full tile", (1, 3, 4, 4), (6, 3, 3), padding=1),
    Conv2dCase("tile_17_pixels", "one more", (1, 3, 1, 17), (6, 1, 1)),
    Conv2dCase("tile_33_wide", "two tiles and one pixel in a row", (1, 2, 3, 33), (7, 3, 3), padding=1),
    Conv2dCase("tile_5_filters", "one less than six", (1, 4, 5, 8), (5, 3, 3)),
    Conv2dCase("tile_7_filters", "one more than six", (1, 4, 5, 8), (7, 3, 3)),
    Conv2dCase("tile_9_filters", "one more than eight", (1, 9, 6, 6), (9, 3, 3), padding=1),
    Conv2dCase("tile_17_filters", "one more than sixteen, in and out", (1, 17, 6, 7), (17, 3, 3), padding=1),
    # Cache blocks (reductions of 256 and more; several blocks of pixels and filters)
    Conv2dCase("reduction_255", "one less than a block of the reduction", (1, 255, 3, 4), (7, 1, 1)),
    Conv2dCase("reduction_257", "one more", (1, 257, 3, 4), (7, 1, 1)),
    Conv2dCase("reduction_261", "29 x 3 x 3: a block ends inside a kernel window", (2, 29, 6, 6), (7, 3, 3), padding=1),
    Conv2dCase("reduction_520", "two blocks and a rest, strided", (1, 58, 9, 9), (13, 3, 3), stride=2, padding=1),
    Conv2dCase("filters_260", "grad_input reduces over the filters", (1, 5, 4, 5), (260, 1, 1)),
    Conv2dCase("pixels_2116", "46 x 46: grad_weight reduces over many pixels", (1, 3, 46, 46), (8, 3, 3), padding=1),
    Conv2dCase("many_images", "the batch is the long dimension", (33, 2, 5, 5), (3, 3, 3), padding=1),
    Conv2dCase("wide_row", "one row longer than any block of pixels", (1, 2, 2, 1100), (6, 2, 3), padding=(0, 1)),
    Conv2dCase("large", "several blocks in every direction", (2, 32, 40, 41), (40, 3, 3), padding=1),
    # Thread blocks of a GPU (tiles of 64 or 128 pixels and channels; 16-byte vectors of channels)
    Conv2dCase("block_136_filters", "a large tile and a rest, in every direction", (2, 72, 12, 13), (136, 3, 3), padding=1),
    Conv2dCase("block_groups_of_8", "a group is one vector of 16-bit channels", (2, 24, 9, 10), (48, 3, 3), stride=2, groups=3),
    Conv2dCase("chunks_128", "channels in chunks, all taps of each", (1, 128, 6, 7), (24, 3, 3), stride=2, padding=1),
    Conv2dCase(
        "gather_mixed",
        "nothing symmetric, groups too wide for direct sums",
        (2, 20, 13, 14),
        (24, 3, 2),
        stride=(2, 3),
        padding=(3, 1),
        dilation=(2, 3),
        groups=2,
    ),
    Conv2dCase(
        "gather_phases",
        "stride and dilation have a common factor, and more channels",
        (2, 12, 19, 23),
        (10, 3, 4),
        stride=(4, 6),
        padding=(1, 2),
        dilation=(2, 4),
    ),
    Conv2dCase("large_grouped", "the same in groups", (2, 32, 24, 24), (48, 3, 3), padding=1, groups=4),
]


@dataclass(frozen=True)
class Pool2dCase:
    """input (N, C, H, W) and the arguments of a pooling; dilation does not apply to averages."""

    name: str
    reason: str
    input: tuple
    kernel: object
    stride: object = None
    padding: object = 0
    dilation: object = 1
    ceil_mode: bool = False

    @property
    def options(self):
        return {
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "ceil_mode": self.ceil_mode,
        }

    @property
    def avg_options(self):
        return {name: value for name, value in self.options.items() if name != "dilation"}

    def __str__(self):
        return self.name


POOL2D_CASES = [
    Pool2dCase("one_pixel", "every size is one", (1, 1, 1, 1), 1),
    Pool2dCase("identity", "1x1 windows, stride 1: the input itself", (2, 3, 5, 6), 1, stride=1),
    Pool2dCase("halve", "2x2, the most common pooling", (2, 3, 8, 10), 2),
    Pool2dCase("halve_odd", "the last row and column fall away", (2, 3, 7, 9), 2),
    Pool2dCase("halve_odd_ceil", "or are pooled alone", (2, 3, 7, 9), 2, ceil_mode=True),
    Pool2dCase("whole_plane", "one window", (2, 3, 5, 7), (5, 7)),
    Pool2dCase("resnet", "3x3, stride 2, padding 1", (2, 4, 13, 14), 3, stride=2, padding=1),
    Pool2dCase("overlap", "stride 1: a pixel belongs to nine windows", (2, 3, 6, 7), 3, stride=1, padding=1),
    Pool2dCase("gaps", "stride beyond the kernel: pixels in no window", (2, 3, 11, 12), 2, stride=4),
    Pool2dCase("stride_beyond", "stride larger than the input", (1, 2, 4, 5), 2, stride=9),
    Pool2dCase("row_window", "1 x N", (2, 3, 5, 16), (1, 5), stride=(1, 2)),
    Pool2dCase("column_window", "N x 1", (2, 3, 16, 5), (5, 1), stride=(3, 1)),
    Pool2dCase("mixed", "nothing symmetric", (2, 3, 11, 14), (3, 4), stride=(2, 3), padding=(0, 2)),
    Pool2dCase("padding_half_even", "padding = kernel // 2 of an even window", (2, 3, 7, 8), 4, stride=2, padding=2),
    Pool2dCase("padding_half_odd", "padding = kernel // 2 of an odd window", (1, 3, 9, 9), 5, stride=3, padding=2),
    Pool2dCase("dilation", "holes", (2, 3, 9, 10), 3, stride=1, padding=1, dilation=2),
    Pool2dCase("dilation_mixed", "asymmetric holes, overlapping", (2, 3, 12, 13), (2, 3), (2, 1), (1, 0), (3, 2)),
    Pool2dCase("dilation_ceil", "holes and a last window over the edge", (1, 2, 10, 11), 3, 3, 1, 2, ceil_mode=True),
    Pool2dCase("dilation_one_tap", "wide holes: of most windows one tap lies in the image", (1, 2, 4, 5), 2, 1, 1, 3),
    Pool2dCase("ceil_fits", "ceil_mode where nothing is left over", (1, 2, 8, 8), 2, ceil_mode=True),
    Pool2dCase("ceil_over_edge", "the last window reaches beyond the padding", (1, 2, 6, 7), 3, 2, 1, ceil_mode=True),
    Pool2dCase(
        "ceil_starts_in_padding", "the last window would start in the padding: left out", (1, 2, 4, 5), 2, 3, 1, ceil_mode=True
    ),
    Pool2dCase(
        "ceil_starts_beyond", "stride so long that the last window would start outside", (1, 2, 6, 7), 1, 4, ceil_mode=True
    ),
    Pool2dCase("ceil_one_wide", "W = 1: one window, mostly padding", (1, 2, 6, 1), (2, 2), 2, 1, ceil_mode=True),
    Pool2dCase(
        "ceil_long_kernel", "no full window fits: ceil_mode still gives one", (1, 2, 2, 6), (3, 3), 2, (0, 1), ceil_mode=True
    ),
    Pool2dCase("empty_batch", "N = 0", (0, 3, 6, 6), 2),
    Pool2dCase("unbatched", "3-D input", (3, 6, 7), 2, stride=1),
    Pool2dCase("flat_image", "H = 1", (2, 3, 1, 37), (1, 3), stride=1, padding=(0, 1)),
    Pool2dCase("wide_17", "one output more than two vectors of eight", (1, 2, 4, 34), 2),
    Pool2dCase("wide_stride_1", "long rows, overlapping", (1, 2, 4, 71), 3, stride=1, padding=1),
    Pool2dCase("channels_17", "one channel more than two vectors of eight", (2, 17, 6, 6), 3, stride=2, padding=1),
    Pool2dCase("large_window", "a window of 13 x 13", (1, 3, 26, 27), 13, stride=6, padding=5),
    Pool2dCase(
        "large_tiles", "windows of 15 x 33 that do not overlap", (2, 16, 31, 68), (15, 33), padding=(1, 2), ceil_mode=True
    ),
    Pool2dCase("large", "big enough to be split among threads", (4, 24, 48, 50), 3, stride=2, padding=1),
]

ADAPTIVE_CASES = [
    # (name, input, output_size)
    ("to_one", (2, 3, 7, 6), 1),
    ("divides", (2, 3, 8, 12), (4, 3)),
    ("overlapping_windows", (2, 3, 7, 10), (3, 4)),
    ("keep_height", (2, 3, 5, 8), (None, 3)),
    ("same_size", (1, 2, 5, 6), (5, 6)),
    ("upsampling", (1, 2, 3, 4), (7, 9)),
    ("empty_output", (1, 2, 3, 4), (0, 2)),
    ("empty_batch", (0, 2, 6, 6), 2),
    ("unbatched", (3, 9, 7), (2, 3)),
    ("one_pixel", (1, 1, 1, 1), 1),
    ("channels_17", (2, 17, 13, 11), (6, 5)),
    ("columns_alike", (2, 8, 8, 8), (5, 7)),  # all windows two wide, some two high, others three
    ("long_rows", (1, 2, 5, 130), (2, 33)),
    ("large_windows", (2, 32, 41, 67), (3, 2)),
]

# Layouts of an N x C x H x W (or C x H x W) tensor


def contiguous(tensor):
    return tensor.contiguous()


def channels_last(tensor):
    """With its strides also where a tensor of one channel, which is contiguous in both formats, could keep others."""
    return torch.empty_like(tensor, memory_format=torch.channels_last).copy_(tensor) if tensor.dim() == 4 else tensor.contiguous()


def sliced(tensor):
    """A window into a larger tensor with another order of dimensions: no stride is what a dense tensor has."""
    if tensor.dim() < 3:
        larger = tensor.new_full((2 * tensor.numel() + 1,), 77)
        return larger[1::2].copy_(tensor)
    *outer, height, width = tensor.shape
    larger = tensor.new_full((width + 3, *outer, 2 * height + 1), 77)  # 77: a value that would be noticed
    return larger.movedim(0, -1)[..., 1::2, 2:-1].copy_(tensor)


LAYOUTS = [contiguous, channels_last, sliced]


def layout_of(tensor):
    """Dtype, sizes, and the strides that matter: those of sizes above one, if there are elements at all."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    return tensor.dtype, tensor.shape, strides if tensor.numel() else None


# Random geometries


@st.composite
def conv2d_cases(draw):
    """Any valid convolution of moderate size."""
    side = st.integers(1, 3)
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 5]))
    of_group = st.sampled_from([*range(1, 10), 12, 20])  # few go to other kernels than many
    channels, filters = groups * draw(of_group), groups * draw(of_group)
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    dilation = draw(st.tuples(side, side))
    padding = draw(st.tuples(st.integers(0, 6), st.integers(0, 6)))
    size = [draw(st.integers(max(1, d * (r - 1) + 1 - 2 * pad), 22)) for r, d, pad in zip(kernel, dilation, padding, strict=True)]
    return Conv2dCase(
        "random",
        "any valid convolution",
        (draw(st.integers(0, 3)), channels, *size),
        (filters, *kernel),
        stride=draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
    )


@st.composite
def pool2d_cases(draw, max_dilation=3):
    """Any valid pooling of moderate size."""
    kernel = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    dilation = draw(st.tuples(st.integers(1, max_dilation), st.integers(1, max_dilation)))
    padding = tuple(draw(st.integers(0, r // 2)) for r in kernel)
    size = [draw(st.integers(max(1, d * (r - 1) + 1 - 2 * pad), 22)) for r, d, pad in zip(kernel, dilation, padding, strict=True)]
    case = Pool2dCase(
        "random",
        "any valid pooling",
        (draw(st.integers(0, 3)), draw(st.integers(1, 9)), *size),
        kernel,
        stride=draw(st.none() | st.tuples(st.integers(1, 5), st.integers(1, 5))),
        padding=padding,
        dilation=dilation,
        ceil_mode=draw(st.booleans()),
    )
    # A dilated window can step over a small image: then there is no maximum.
    assume((F.max_pool2d(torch.ones(1, *case.input[1:]), **case.options) == 1).all())
    return case
