"""Who computes the forward and backward pass of a model fastest where it lives."""

from ..core.autograd import Autograd
from ..core.flat import FlatModel
from .cuda_graph import CudaGraph, record_cuda_graph
from .lenet_blocks import BlockLeNet5


def fastest_kernels(model: FlatModel, size: int, precision: str) -> Autograd | BlockLeNet5 | CudaGraph:
    """What computes the loss and gradient of `model` fastest where it lives, for images of `size` pixels a side."""
    if model.weights.is_cuda:
        return CudaGraph(model, precision, record_cuda_graph)
    if precision == "float32" and BlockLeNet5.fits(model, size):
        return BlockLeNet5(model)
    return Autograd(model.module, model.gradient, precision)
