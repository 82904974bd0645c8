"""LeNet-5 written out in block form: the same function as `models.LeNet5`, and its gradient, in fewer milliseconds.

Nothing needs this file: it is chosen by `choose.fastest_kernels` on a CPU, tested equal, and can be deleted.

A convolution library wastes most of its vector lanes on 1 -> 6 and 6 -> 16 channels. In block form a convolution
computes the four outputs that a 2x2 pool will compare, and both parities of the pooled row, as channels of one wider
convolution with stride; pooling is then a maximum of channel halves. Channels run (column in window, row in window,
row parity, output channel) after the first convolution, and (row in window, output channel) after the second.
Measured reasons for each choice: benchmarks/NOTES.md.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.flat import FlatModel
from ..core.linear import linear, linear_gradients_
from ..core.models import LeNet5

_convolution_backward = torch.ops.aten.convolution_backward
_unless_positive = torch.ops.aten.threshold_backward  # (g, x, 0): g where x > 0, else 0; no index, no bool tensor


class BlockLeNet5:
    """`loss_and_gradient` and `logits` of a LeNet-5 for images of (channels, S, S), S a multiple of 4, in float32.

    Ties in a pool go to the first maximum in reading order, as in PyTorch: columns are compared before rows.
    """

    def __init__(self, model: FlatModel):
        module: LeNet5 = model.module
        self.model = model
        slots = {slot.name: slot for slot in model.layout.slots}
        self.weight = {name: slot.of(model.weights) for name, slot in slots.items()}
        self.gradient = {name: slot.of(model.gradient) for name, slot in slots.items()}
        self.c1, self.c2 = module.conv1.out_channels, module.conv2.out_channels
        self.bias1, self.bias2 = torch.empty(8, self.c1), torch.empty(2, self.c2)
        self.conv1 = _Expansion(self.weight["conv1.weight"], _first_block(module.conv1.weight.shape))
        self.conv2 = _Expansion(self.weight["conv2.weight"], _second_block(module.conv2.weight.shape))

    @staticmethod
    def fits(model: FlatModel, size: int) -> bool:
        """Whether this file knows the model: LeNet-5 on a CPU, images that divide into blocks."""
        return type(model.module) is LeNet5 and model.weights.device.type == "cpu" and size % 4 == 0

    def logits(self, images: Tensor) -> Tensor:
        """(b, classes) of normalised images (b, C, S, S)."""
        return self._forward(images, differences=False)[-1]

    @torch.inference_mode()
    def loss_and_gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy, a scalar; its gradient at `model.weights` overwrites `model.gradient`."""
        padded, (d1, e1, p1), (d2, e2, p2), (h0, h1, h2), logits = self._forward(images)
        log_probabilities = logits.log_softmax(1)
        loss = F.nll_loss(log_probabilities, labels)
        g = log_probabilities.exp_()
        g.scatter_add_(1, labels[:, None], g.new_full((1, 1), -1.0).expand(len(labels), 1)).div_(len(labels))

        g = _unless_positive(self._linear_backward(g, h2, "fc3"), h2, 0)
        g = _unless_positive(self._linear_backward(g, h1, "fc2"), h1, 0)
        g = self._linear_backward(g, h0, "fc1")

        g = g.view(len(labels), self.c2, -1).transpose(1, 2).reshape(p2.shape)
        g = _unless_positive(g, p2, 0)
        torch.sum(g, 0, out=self.gradient["conv2.bias"])
        g = self._second_backward(_unpool_halves(_unpool_halves(g, e2), d2), p1)

        g = _unless_positive(g, p1.view(g.shape), 0)
        torch.sum(g.view(-1, 2, self.c1), (0, 1), out=self.gradient["conv1.bias"])
        g = _unpool_halves(_unpool_halves(g, e1), d1)
        rows, columns = p1.shape[1:3]
        g = g.view(len(labels), rows, columns, -1).permute(0, 3, 1, 2)
        expanded = _backward(g, padded, self.conv1.expanded, (4, 2), weight_gradient=True)
        self.conv1.collapse(expanded, self.gradient["conv1.weight"])
        return loss

    def _forward(self, images: Tensor, *, differences: bool = True):
        """(padded images, first pool, second pool, inputs of the linear layers, logits); see `_pool`."""
        batch, c1, c2 = len(images), self.c1, self.c2
        padded = F.pad(images, (2, 2, 2, 2))
        y = F.conv2d(padded, self.conv1.expand(), self.bias1.copy_(self.weight["conv1.bias"]).view(-1), stride=(4, 2))
        rows, columns = y.shape[2:]
        first = _pool(*_halves(y.permute(0, 2, 3, 1).reshape(-1, 8 * c1)), differences)
        p1 = first[2].view(batch, rows, columns, 2 * c1)
        y = F.conv2d(p1.permute(0, 3, 1, 2), self.conv2.expand(), self.bias2.copy_(self.weight["conv2.bias"]).view(-1))
        second = _pool(*y.permute(0, 2, 3, 1).reshape(-1, 2, 2 * c2).unbind(1), differences)
        h0 = second[2].view(batch, -1, c2).transpose(1, 2).reshape(batch, -1)
        h1 = self._linear(h0, "fc1", "relu")
        h2 = self._linear(h1, "fc2", "relu")
        return padded, (*first[:2], p1), second, (h0, h1, h2), self._linear(h2, "fc3", "none")

    def _linear(self, x: Tensor, name: str, activation: str) -> Tensor:
        return linear(x, self.weight[f"{name}.weight"], self.weight[f"{name}.bias"], activation)

    def _linear_backward(self, g: Tensor, x: Tensor, name: str) -> Tensor:
        weight, bias = (self.gradient[f"{name}.{kind}"] for kind in ("weight", "bias"))
        return linear_gradients_(g, x, self.weight[f"{name}.weight"], weight, bias)

    def _second_backward(self, g: Tensor, p1: Tensor) -> Tensor:
        """Of the second convolution: stores its weight's gradient, returns its input's, (b * rows * columns, 2 c1).

        Each is taken in the memory format that is fastest for it.
        """
        batch, rows, columns, channels = p1.shape
        g = g.view(batch, rows - 2, columns - 4, -1).permute(0, 3, 1, 2)
        x = p1.permute(0, 3, 1, 2)
        expanded = _backward(g, x, self.conv2.expanded, (1, 1), weight_gradient=True)
        self.conv2.collapse(expanded, self.gradient["conv2.weight"])
        # Of x only shape and memory format count here, and its own format would turn the whole call around.
        x, weight = torch.empty(x.shape), self.conv2.expanded.contiguous()
        below = _backward(g.contiguous(), x, weight, (1, 1), weight_gradient=False)
        return below.permute(0, 2, 3, 1).reshape(-1, channels)


class _Expansion:
    """A convolution's weight in block form: `expand` copies each of its values to its places, `collapse` sums the
    gradients of those places.

    Args:
        weight: (o, c, 5, 5), read at every `expand`.
        places: (O, C, H, W) int64, for each value of the block form its position in `weight.flatten()`, or
            `weight.numel()` for 0.
    """

    def __init__(self, weight: Tensor, places: Tensor):
        self.weight = weight.view(-1)
        self.source = torch.zeros(len(self.weight) + 1)  # the value beyond the end stays 0
        by_memory = places.permute(0, 2, 3, 1).contiguous()  # channels last
        self.index = by_memory.view(-1)
        self.values = torch.empty(len(self.index))
        self.expanded = self.values.view(by_memory.shape).permute(0, 3, 1, 2)
        used = self.index < len(self.weight)
        order = self.index.masked_fill(~used, len(self.weight)).argsort(stable=True)[: int(used.sum())]
        self.copies = order.view(len(self.weight), -1).t().contiguous()  # (copies, weights)

    def expand(self) -> Tensor:
        """(O, C, H, W) float32, channels last in memory."""
        self.source[:-1] = self.weight
        torch.index_select(self.source, 0, self.index, out=self.values)
        return self.expanded

    def collapse(self, gradient: Tensor, out: Tensor) -> None:
        """Write the gradient of the weight into `out` (o, c, 5, 5), given that of the block form."""
        each = gradient.permute(0, 2, 3, 1).reshape(-1).index_select(0, self.copies.view(-1))
        torch.sum(each.view(self.copies.shape), 0, out=out.view(-1))


def _first_block(shape: torch.Size) -> Tensor:
    """Places of a padded 5x5 convolution: (column, row in window, row parity, o) x c x 8 x 6; stride (4, 2)."""
    o, c = shape[:2]
    places = torch.full((2, 2, 2, o, c, 8, 6), shape.numel())
    for column in range(2):
        for row in range(2):
            for parity in range(2):
                top = 2 * parity + row
                places[column, row, parity, :, :, top : top + 5, column : column + 5] = _positions(shape)
    return places.view(8 * o, c, 8, 6)


def _second_block(shape: torch.Size) -> Tensor:
    """Places of a 5x5 convolution on rows dealt to parity channels: (row in window, o) x (parity, c) x 3 x 5."""
    o, c = shape[:2]
    places = torch.full((2, o, 2, c, 3, 5), shape.numel())
    for row in range(2):
        for i in range(5):
            places[row, :, (row + i) % 2, :, (row + i) // 2, :] = _positions(shape)[:, :, i]
    return places.view(2 * o, 2 * c, 3, 5)


def _positions(shape: torch.Size) -> Tensor:
    return torch.arange(shape.numel()).view(shape)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]


def _pool(left: Tensor, right: Tensor, differences: bool) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """2x2 maximum and ReLU: (right - left, lower - upper, result); the `differences` say which one won."""
    upper, lower = _halves(torch.maximum(left, right))
    result = torch.maximum(upper, lower).relu_()
    return (right - left, lower - upper, result) if differences else (None, None, result)


def _unpool_halves(g: Tensor, difference: Tensor) -> Tensor:
    """The gradient (k, c) of a maximum, dealt to the halves (k, 2 c) it was taken of, or to neighbours (k, 2, c)."""
    out = g.new_empty(len(g), 2 * g.shape[1])
    first, second = _halves(out)
    second.copy_(_unless_positive(g, difference, 0))  # straight into the strided half it is five times slower
    torch.sub(g, second, out=first)
    return out


def _backward(g: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, int], *, weight_gradient: bool) -> Tensor:
    """One of the gradients of an unpadded convolution."""
    wanted = [not weight_gradient, weight_gradient, False]
    result = _convolution_backward(g, x, weight, [len(weight)], stride, (0, 0), (1, 1), False, (0, 0), 1, wanted)
    return result[1] if weight_gradient else result[0]
