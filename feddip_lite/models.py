"""The three models of the paper, each with a `width` factor that scales its hidden channels and features.

Shapes follow the authors' published code (datasets_models.py). At width 1: LeNet-5 has 61 706 weights, AlexNet
23 272 266 (10 classes), ResNet-18 11 220 132 (100 classes).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INPUT_SHAPES = {"alexnet": (3, 32), "resnet18": (3, 32)}
"""(channels, size) that a model insists on; the others take the data set's own."""


class Dropout(nn.Module):
    """Dropout that draws from `generator`, never from the global one, so that a run is a function of its seed."""

    def __init__(self, p: float = 0.5):
        super().__init__()
        self.p = p
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = torch.empty_like(x).bernoulli_(1 - self.p, generator=self.generator)
        return x * keep / (1 - self.p)


class LeNet5(nn.Module):
    """conv 6 5x5 (pad 2), pool, conv 16 5x5, pool, fc 120-84-classes; ReLU."""

    def __init__(self, classes: int, width: float, channels: int, size: int):
        super().__init__()
        c1, c2, f1, f2 = (_scaled(k, width) for k in (6, 16, 120, 84))
        self.conv1 = nn.Conv2d(channels, c1, 5, padding=2)
        self.conv2 = nn.Conv2d(c1, c2, 5)
        self.fc1 = nn.Linear(c2 * ((size // 2 - 4) // 2) ** 2, f1)
        self.fc2 = nn.Linear(f1, f2)
        self.fc3 = nn.Linear(f2, classes)

    def forward(self, x: Tensor) -> Tensor:
        # Pooling before ReLU is the same function as after it, on a quarter of the values.
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2)).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class AlexNet(nn.Module):
    """Five 3x3 convolutions (the first with stride 2), three pools, 2x2 average pool, dropout, fc 4096-4096-classes."""

    def __init__(self, classes: int, width: float, channels: int, size: int):
        super().__init__()
        c1, c2, c3, c4, c5, f = (_scaled(k, width) for k in (64, 192, 384, 256, 256, 4096))
        self.conv1 = nn.Conv2d(channels, c1, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(c1, c2, 3, padding=1)
        self.conv3 = nn.Conv2d(c2, c3, 3, padding=1)
        self.conv4 = nn.Conv2d(c3, c4, 3, padding=1)
        self.conv5 = nn.Conv2d(c4, c5, 3, padding=1)
        self.fc1 = nn.Linear(c5 * 4, f)
        self.fc2 = nn.Linear(f, f)
        self.fc3 = nn.Linear(f, classes)
        self.dropout1, self.dropout2 = Dropout(), Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.conv4(F.relu(self.conv3(x))))
        x = F.relu(F.max_pool2d(self.conv5(x), 2))
        x = F.adaptive_avg_pool2d(x, 2).flatten(1)
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
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


MODELS = {"lenet5": LeNet5, "alexnet": AlexNet, "resnet18": ResNet18}


def build_model(name: str, *, classes: int, width: float = 1.0, channels: int, size: int, seed: int = 0) -> nn.Module:
    """A new model with PyTorch's default initialisation drawn from `seed`; the global generator is left untouched.

    Args:
        name: `lenet5` (any channels, size >= 14), `alexnet` or `resnet18` (3 channels, size 32).
        classes: number of outputs.
        width: factor on every hidden channel and feature count, > 0; at least 1 stays.
        channels, size: of the square input images.
        seed: 64-bit integer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return MODELS[name](classes, width, channels, size)


def _scaled(count: int, width: float) -> int:
    return max(1, round(count * width))
