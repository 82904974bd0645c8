"""The three models of the paper, each with a `width` factor that scales its hidden channels and features.

Shapes follow the authors' published code (datasets_models.py). At width 1: LeNet-5 has 61 706 weights, AlexNet
23 272 266 (10 classes), ResNet-18 11 220 132 (100 classes).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .linear import Linear

INPUT_SHAPES = {"alexnet": (3, 32), "resnet18": (3, 32)}
"""(channels, least size) that a model insists on; the others take the data set's own."""


class Dropout(nn.Module):
    """Dropout that draws from its own `generator`, so that a run is a function of its seed; moves with the module."""

    def __init__(self, p: float = 0.5):
        super().__init__()
        self.p = p
        self.generator = torch.Generator()

    def _apply(self, function, recurse: bool = True):
        device = function(torch.empty(0)).device  # `Module.to`, `cuda`, ... all end here
        if device != self.generator.device and device.type != "meta":
            self.generator = torch.Generator(device)
        return super()._apply(function, recurse)

    def __deepcopy__(self, memo):
        twin = type(self)(self.p)  # generators cannot be copied
        return twin.to(self.generator.device).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = torch.empty_like(x).uniform_(generator=self.generator).ge_(self.p)  # a quarter of bernoulli_'s time
        return x * keep.div_(1 - self.p)


class LeNet5(nn.Module):
    """conv 6 5x5 (pad 2), pool, conv 16 5x5, pool, fc 120-84-classes; ReLU."""

    stages = (("conv1",), ("conv2",))

    def __init__(self, classes: int, width: float, channels: int, size: int):
        super().__init__()
        c1, c2, f1, f2 = (_scaled(k, width) for k in (6, 16, 120, 84))
        self.conv1 = nn.Conv2d(channels, c1, 5, padding=2)
        self.conv2 = nn.Conv2d(c1, c2, 5)
        self.fc1 = Linear(c2 * ((size // 2 - 4) // 2) ** 2, f1)
        self.fc2 = Linear(f1, f2)
        self.fc3 = Linear(f2, classes)

    def features(self, x: Tensor, depth: int = 2) -> Tensor:
        # Pooling before ReLU is the same function as after it, on a quarter of the values.
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        return F.relu(F.max_pool2d(self.conv2(x), 2)) if depth > 1 else x

    def vector(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.vector(self.features(x))
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class AlexNet(nn.Module):
    """Five 3x3 convolutions (the first with stride 2), three pools, 2x2 average pool, dropout, fc 4096-4096-classes."""

    stages = (("conv1",), ("conv2",), ("conv3",), ("conv4",), ("conv5",))

    def __init__(self, classes: int, width: float, channels: int, size: int):
        super().__init__()
        c1, c2, c3, c4, c5, f = (_scaled(k, width) for k in (64, 192, 384, 256, 256, 4096))
        self.conv1 = nn.Conv2d(channels, c1, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(c1, c2, 3, padding=1)
        self.conv3 = nn.Conv2d(c2, c3, 3, padding=1)
        self.conv4 = nn.Conv2d(c3, c4, 3, padding=1)
        self.conv5 = nn.Conv2d(c4, c5, 3, padding=1)
        self.fc1 = Linear(c5 * 4, f)
        self.fc2 = Linear(f, f)
        self.fc3 = Linear(f, classes)
        self.dropout1, self.dropout2 = Dropout(), Dropout()

    def features(self, x: Tensor, depth: int = 5) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        for stage in range(1, depth + 1):
            x = getattr(self, f"conv{stage}")(x)
            x = F.relu(F.max_pool2d(x, 2) if stage in (1, 2, 5) else x)
        return x

    def vector(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 2).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.vector(self.features(x))
        x = F.relu(self.fc1(self.dropout1(x)))
        return self.fc3(F.relu(self.fc2(self.dropout2(x))))


class _Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to the input or to its 1x1 projection."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet18(nn.Module):
    """CIFAR form: 3x3 stem with stride 1 and no pool, blocks 2-2-2-2 of widths 64 .. 512, head `linear`."""

    kept_dense = ("shortcut",)
    stages = (("conv1", "bn1"), *((f"blocks.{2 * k}", f"blocks.{2 * k + 1}") for k in range(4)))

    def __init__(self, classes: int, width: float, channels: int, size: int):
        super().__init__()
        widths = [_scaled(k, width) for k in (64, 128, 256, 512)]
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        blocks, inputs = [], widths[0]
        for stage, outputs in enumerate(widths):
            blocks += [_Block(inputs, outputs, 1 if stage == 0 else 2), _Block(outputs, outputs, 1)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.linear = Linear(inputs, classes)

    def features(self, x: Tensor, depth: int = 5) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.relu(self.bn1(self.conv1(x)))
        for block in list(self.blocks)[: 2 * (depth - 1)]:
            x = block(x)
        return x

    def vector(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.vector(self.features(x)))


class Prefix(nn.Module):
    """The first `depth` stages of a model, `trunk`, and a linear layer on their features in place of the rest, `head`.

    Where a model may be cut it says itself: `stages` names the layers of each of its stages, `features(x, depth)` runs
    the first of them, and `vector(features)` is what linear layers take. A model without `stages` is never cut.
    """

    def __init__(self, trunk: nn.Module, depth: int, classes: int, image_shape: tuple[int, int, int]):
        super().__init__()
        kept = tuple(f"{layer}." for stage in trunk.stages[:depth] for layer in stage)
        for path, layer in list(trunk.named_modules()):
            if list(layer.parameters(recurse=False)) and not f"{path}.".startswith(kept):
                owner, _, name = path.rpartition(".")
                delattr(trunk.get_submodule(owner), name)
        self.trunk, self.depth = trunk, depth
        self.kept_dense = getattr(trunk, "kept_dense", ())
        features = trunk.eval().vector(trunk.features(torch.zeros(1, *image_shape), depth))
        self.head = nn.Linear(features.shape[1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk.vector(self.trunk.features(x, self.depth)))


MODELS = {"lenet5": LeNet5, "alexnet": AlexNet, "resnet18": ResNet18}


def build_model(name: str, *, classes: int, width: float = 1.0, channels: int, size: int, seed: int = 0) -> nn.Module:
    """A new model with PyTorch's default initialisation drawn from `seed`; the global generator is left untouched.

    Args:
        name: `lenet5` (any channels, size >= 14), `alexnet`, `resnet18` (3 channels, size >= 32), or a registered one.
        classes: number of outputs.
        width: factor on every hidden channel and feature count, > 0; at least 1 stays.
        channels, size: of the square input images.
        seed: 64-bit integer.

    Raises:
        ValueError: no such model in this process.
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r}: is not known here; pass it as `model=`, or register_model({name!r}, ...)")
    return built(MODELS[name], seed, classes=classes, width=width, channels=channels, size=size)


def built(
    make: Callable[..., nn.Module], seed: int, *, classes: int, width: float, channels: int, size: int
) -> nn.Module:
    """The module that `make(classes, width, channels, size)` gives when it draws from `seed`; the global generator is
    left untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return make(classes, width, channels, size)


def stock(module: nn.Module) -> nn.Module:
    """`module` with PyTorch's own layers in place of this package's, which compute the same; changed in place."""
    for path, layer in list(module.named_modules()):
        if isinstance(layer, Linear):
            ours = nn.utils.skip_init(nn.Linear, layer.in_features, layer.out_features, bias=layer.bias is not None)
            ours.load_state_dict(layer.state_dict())
        elif isinstance(layer, Dropout):
            ours = nn.Dropout(layer.p)
        else:
            continue
        owner, _, name = path.rpartition(".")
        setattr(module.get_submodule(owner), name, ours.train(layer.training))
    return module


def num_stages(name: str) -> int:
    """After how many stages the model can be cut; 0 = it cannot."""
    return len(getattr(MODELS[name], "stages", ()))


def empty_model(name: str, depth: int | None = None, *, device: str | torch.device = "cpu", **shape) -> nn.Module:
    """A model without values, whole or its `Prefix` of `depth` stages. Draws nothing, so any thread may call it.

    Args:
        shape: `classes`, `width`, `channels` and `size`, as in `build_model`.
    """
    with torch.device("meta"):
        module = MODELS[name](**shape)
        if depth is not None:
            module = Prefix(module, depth, shape["classes"], (shape["channels"], shape["size"], shape["size"]))
    return module.to_empty(device=device)


def _scaled(count: int, width: float) -> int:
    return max(1, round(count * width))
