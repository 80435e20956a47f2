"""How well torchcnn must do: the least ratio of torch's time to torchcnn's, and how large an error may be.

A floor is a pair: for the geometric mean of a class, and for its worst layer. None: there is none.
"""

FORWARD, GRAD_INPUT, GRAD_WEIGHT, TRAIN = "forward", "grad_input", "grad_weight+bias", "forward+backward"
INFERENCE, STEP = "inference", "training step"


def _three(forward, grad_input, grad_weight):
    return {FORWARD: forward, GRAD_INPUT: grad_input, GRAD_WEIGHT: grad_weight}


CONV = {
    "3x3 s1": _three((2.0, 1.5), (2.0, 1.2), (2.6, 2.0)),
    "5x5 s1": _three((1.7, None), (1.6, None), (1.9, None)),
    "3x3 s2": _three((1.2, 1.1), (1.1, 1.0), (1.35, 1.2)),
    "1x1": _three((1.1, 1.0), (1.15, 1.0), (1.05, 0.95)),
    "small C": _three((1.4, 1.0), (2.5, 1.2), (2.5, 1.05)),
    "depthwise 3x3": _three((1.2, 1.0), (1.2, 1.0), (1.6, 1.1)),
    "others": _three((None, 1.0), (None, 1.0), (None, 1.0)),
    "one image": {FORWARD: (None, 1.0)},
}

# torchcnn on channels_last tensors, against the same best of torch.
CONV_CHANNELS_LAST = {group: dict.fromkeys(directions, (1.0, None)) for group, directions in CONV.items()}

# Two threads: how much of a class's one-thread ratio must be left; and how much faster than one thread each layer must be.
TWO_THREADS_RATIO = 0.85
COMPUTE_BOUND_SCALING = 1.7  # a compute-bound layer that takes over 5 ms on one thread
COMPUTE_BOUND_MS = 5.0
COMPUTE_BOUND_INTENSITY = (
    20.0  # flops a byte of input, weight and output: a core does about 100 GFLOP/s and copies 10 GB/s or more
)
COPY_SCALING = 0.9  # the others, as a part of what a copy of the same bytes gains

# Max and average pools, forward and backward alone: against torch NCHW. The others: against the best of its layouts.
POOL = {
    "max pool": {FORWARD: (12.0, 8.0), "backward": (1.5, None), TRAIN: (1.5, 1.0)},
    "avg pool": {FORWARD: (8.0, None), "backward": (6.0, None), TRAIN: (1.5, 1.0)},
    "global max": {FORWARD: (None, 1.0), TRAIN: (None, 1.0)},
    "global avg": {FORWARD: (None, 1.0), TRAIN: (None, 1.0)},
    "adaptive max": {FORWARD: (None, 1.0), TRAIN: (None, 1.0)},
    "adaptive avg": {FORWARD: (None, 1.0), TRAIN: (None, 1.0)},
}
COPY_BANDWIDTH = 0.6  # of the bandwidth of a plain copy, for a large pool
LARGE_POOL_BYTES = 16 << 20  # of input

DTYPES = {
    # Where the processor has no bfloat16 arithmetic of its own, or torch is kept from it.
    "bfloat16 3x3": _three((None, 8.0), (None, 8.0), (None, 8.0)),
    "float16 3x3": _three((None, 8.0), (None, 8.0), (None, 8.0)),
    "float64 3x3": _three((None, 1.3), (None, 1.3), (None, 1.3)),
    "float64 depthwise": _three((None, 2.0), (None, 2.0), (None, 2.0)),
}
HALF_SLOWDOWN = 1.3  # bfloat16 and float16: at most so much slower than torchcnn's own float32

NETWORKS = {
    "one call": {FORWARD: (None, None), TRAIN: (None, 1 / 1.7)},
    "eager": {INFERENCE: (None, None), STEP: (None, None)},
    "compiled": {INFERENCE: (None, 1.0), STEP: (None, 1.0)},
}
# Of torchvision.models.
MODELS = {
    name: {INFERENCE: (None, 1.0), STEP: (None, 1.0)}
    for name in (
        "resnet18",
        "resnet50",
        "resnext50_32x4d",
        "densenet121",
        "mobilenet_v2",
        "mobilenet_v3_large",
        "efficientnet_b0",
        "regnet_y_400mf",
    )
}
TABLES = {"conv": CONV, "pool": POOL, "dtypes": DTYPES, "networks": NETWORKS, "models": MODELS}
CALL_SAVES_US = -6.0  # a call without gradients takes at most 6 us longer than torch's

# The largest error that a correct kernel makes on these layers, relative to the largest value of the result; bfloat16 and
# float16 compute in float32, and may lose one rounding to the dtype on top.
ERROR = {"float32": 2e-5, "float64": 5e-14, "bfloat16": 2e-5, "float16": 2e-5}
# A network's gradients jump where a rounding moves the input of a rectifier across zero: of the 25,000 terms of a random sum that
# is one, about 1/sqrt(25,000) of the result; of the deep models up to 0.04. tests/test_models.py compares them more strictly.
NETWORK_GRADIENT_ERROR = 0.05

# On a GPU (run.py --device cuda), of cuDNN's speed: where the tensor cores compute, and where memory or the call sets the pace.
CUDA_TENSOR_CORES, CUDA_SMALL = 0.8, 1.0
CUDA_ERROR = {**ERROR, "tf32": 2**-10}  # each of two factors loses half of the last of 10 bits
