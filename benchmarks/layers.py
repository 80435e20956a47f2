"""What is measured: the layers of each table, class by class. Data alone; how well they must do stands in floors.py."""

from typing import NamedTuple


def _size(height, width):
    return f"{height}" if height == width else f"{height}x{width}"


class Conv(NamedTuple):
    """A square layer, unless W says otherwise; kernel and pad may be (height, width) pairs."""

    N: int
    C: int
    H: int
    K: int
    kernel: int | tuple[int, int]
    stride: int = 1
    pad: int | tuple[int, int] = 0
    groups: int = 1
    dilation: int = 1
    W: int | None = None

    @property
    def size(self):
        return self.H, self.W or self.H

    @property
    def kernel_size(self):
        return self.kernel if isinstance(self.kernel, tuple) else (self.kernel, self.kernel)

    @property
    def padding(self):
        return self.pad if isinstance(self.pad, tuple) else (self.pad, self.pad)

    @property
    def name(self):
        R, S = self.kernel_size
        text = f"{self.N},{self.C},{_size(*self.size)},{self.K} {R}x{S}"
        text += f" s{self.stride}" if self.stride != 1 else ""
        text += f" p{_size(*self.padding)}" if self.pad else ""
        text += f" d{self.dilation}" if self.dilation != 1 else ""
        return text + (f" g{self.groups}" if self.groups != 1 else "")


def depthwise(N, C, H, kernel, stride=1):
    return Conv(N, C, H, C, kernel, stride, kernel // 2, groups=C)


class Pool(NamedTuple):
    """A sliding pool of square planes; with `output` an adaptive one to output x output, global if that is 1."""

    N: int
    C: int
    H: int
    kernel: int = 0
    stride: int = 0
    pad: int = 0
    output: int = 0

    @property
    def name(self):
        text = f"{self.N},{self.C},{self.H}"
        return f"{text} to {self.output}" if self.output else f"{text} {self.kernel}x{self.kernel} s{self.stride} p{self.pad}"


RESNET_AND_VGG = [
    Conv(4, 64, 224, 64, 3, 1, 1),
    Conv(4, 256, 56, 256, 3, 1, 1),
    Conv(4, 512, 14, 512, 3, 1, 1),
    Conv(8, 64, 56, 64, 3, 1, 1),
    Conv(8, 128, 28, 128, 3, 1, 1),
    Conv(8, 256, 14, 256, 3, 1, 1),
    Conv(8, 512, 7, 512, 3, 1, 1),
]

DEPTHWISE = [depthwise(8, 32, 112, 3), depthwise(8, 512, 14, 3), depthwise(8, 64, 112, 3, 2)]

CONV = {
    "3x3 s1": [*RESNET_AND_VGG, Conv(64, 32, 13, 64, 3)],
    "5x5 s1": [Conv(8, 64, 27, 192, 5, 1, 2)],
    "3x3 s2": [Conv(8, 128, 56, 128, 3, 2, 1), Conv(8, 256, 28, 256, 3, 2, 1)],
    "1x1": [Conv(8, 64, 56, 256, 1), Conv(8, 1024, 14, 256, 1), Conv(8, 512, 7, 2048, 1), Conv(8, 128, 56, 128, 1)],
    "small C": [
        Conv(64, 1, 28, 6, 5, 1, 2),  # LeNet
        Conv(64, 6, 14, 16, 5),  # LeNet
        Conv(64, 1, 28, 32, 3),  # the MNIST example of Keras
        Conv(4, 3, 224, 64, 3, 1, 1),  # VGG
        Conv(8, 3, 224, 64, 7, 2, 3),  # ResNet
        Conv(8, 3, 224, 64, 11, 4, 2),  # AlexNet
    ],
    "depthwise 3x3": DEPTHWISE,
    "others": [
        Conv(8, 128, 56, 128, 3, 1, 1, groups=32),  # ResNeXt-50, 32x4d
        Conv(8, 160, 28, 160, 3, 2, 1, groups=10),  # RegNetX, group width 16
        Conv(8, 96, 27, 128, 5, 1, 2, groups=2),  # AlexNet as it was published
        Conv(4, 256, 28, 256, 3, 1, 2, dilation=2),  # DeepLab
        Conv(8, 64, 33, 64, 3, 1, 4, dilation=4),  # context modules of dilated networks
        depthwise(8, 120, 28, 5),  # MobileNetV3
        depthwise(8, 72, 56, 5, 2),  # MobileNetV3, at a reduction
        depthwise(8, 96, 56, 7),  # ConvNeXt, first stage
        depthwise(8, 768, 7, 7),  # ConvNeXt, last stage
        Conv(8, 256, 56, 512, 1, 2),  # the shortcut of a ResNet's reduction
        Conv(8, 3, 224, 96, 4, 4),  # ConvNeXt patchify
        Conv(8, 3, 224, 384, 16, 16),  # ViT patch embedding
        Conv(8, 96, 56, 192, 2, 2),  # ConvNeXt reduction
        Conv(8, 128, 17, 192, (1, 7), 1, (0, 3)),  # Inception v3
        Conv(8, 128, 17, 192, (7, 1), 1, (3, 0)),  # Inception v3
        Conv(8, 384, 8, 384, (1, 3), 1, (0, 1)),  # Inception v3, last blocks
        Conv(3, 37, 29, 53, 3, 1, 1, W=31),  # nothing is a multiple of a vector
        Conv(5, 19, 23, 41, (3, 2), 3, (2, 1), W=47),  # nor square, nor stride 2
        Conv(1, 3, 224, 64, 7, 2, 3),  # ResNet, one image
        Conv(1, 64, 56, 64, 3, 1, 1),
        Conv(1, 512, 7, 512, 3, 1, 1),
        Conv(1, 256, 14, 1024, 1),
        Conv(2, 1024, 7, 2048, 1),  # ResNet-50, two images: large weights, few positions
        Conv(2, 512, 28, 1024, 1, 2),  # the shortcut of its reduction
        Conv(2, 256, 56, 256, 3, 2, 1, groups=32),  # ResNeXt-50, at a reduction
        depthwise(1, 512, 14, 3),  # MobileNet, one image
    ],
    "one image": [Conv(1, 1, 28, 6, 5, 1, 2), Conv(1, 6, 14, 16, 5)],  # LeNet, where the call costs as much as the arithmetic
}

POOL = [
    Pool(64, 6, 28, 2, 2),
    Pool(64, 32, 26, 2, 2),
    Pool(8, 128, 56, 2, 2),
    Pool(4, 64, 224, 2, 2),
    Pool(8, 64, 55, 3, 2),
    Pool(8, 64, 112, 3, 2, 1),
    Pool(8, 192, 28, 3, 1, 1),
]
GLOBAL_POOL = [Pool(8, 512, 7, output=1), Pool(8, 1280, 7, output=1), Pool(8, 64, 56, output=1), Pool(2, 96, 112, output=1)]
ADAPTIVE_POOL = [
    Pool(8, 256, 13, output=6),  # AlexNet
    Pool(8, 512, 14, output=7),  # VGG
    Pool(8, 512, 7, output=7),  # VGG at its own size, a copy
    Pool(2, 512, 60, output=2),  # pyramid pooling
    Pool(2, 512, 60, output=3),
    Pool(2, 512, 60, output=6),
    Pool(8, 64, 55, output=13),
]

ONE_CALL = [Conv(1, 1, 8, 1, 3, 1, 1)]  # no arithmetic to speak of

# Size of the input of each network of contenders.py.
NETWORKS = {"LeNet-5": (64, 1, 28, 28), "ResNet-18 block": (8, 64, 56, 56)}

MODEL_INPUT = (2, 3, 224, 224)

DTYPES = {
    "bfloat16 3x3": RESNET_AND_VGG,
    "float16 3x3": RESNET_AND_VGG,
    "float64 3x3": RESNET_AND_VGG,
    "float64 depthwise": DEPTHWISE,
}
