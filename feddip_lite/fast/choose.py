"""What is fastest where a model lives: who computes its forward and backward pass, who trains a round's clients."""

from ..config import Config
from ..core.autograd import Autograd
from ..core.flat import FlatModel
from .cuda_graph import CudaGraph, called_again, record_cuda_graph
from .lenet_blocks import BlockLeNet5
from .together import Together


def fastest_kernels(model: FlatModel, size: int, precision: str) -> Autograd | BlockLeNet5 | CudaGraph:
    """What computes the loss and gradient of `model` fastest where it lives, for images of `size` pixels a side."""
    if model.weights.is_cuda:
        return CudaGraph(model, precision, record_cuda_graph)
    if precision == "float32" and BlockLeNet5.fits(model, size):
        return BlockLeNet5(model)
    return Autograd(model.module, model.gradient, precision)


def trains_together(model: FlatModel, config: Config) -> Together | None:
    """What trains a round's clients at once, or None: each by itself, which is faster on a CPU (benchmarks/NOTES.md).

    The configuration's `workers` may ask for either. A time limit is each client's own.
    """
    wanted = config.workers == "together" or (config.workers == "auto" and model.weights.is_cuda)
    if not wanted or config.client_timeout is not None or not Together.fits(model):
        return None
    return Together(model, config, record_cuda_graph if model.weights.is_cuda else called_again)
