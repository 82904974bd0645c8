"""Recordings: on a GPU a CUDA graph, replayed in one launch. And a model's forward and backward pass as recordings.

A LeNet-5 step is some sixty small kernels, each of which takes longer to launch than to run. What is recorded reads
and writes fixed memory: batches are copied in, the weights are the model's flat vector, the gradient its flat
gradient. `CudaGraph` is chosen by `choose.fastest_kernels` on CUDA devices, for evaluation and for clients that train
each by itself; `together.py` records the steps of all clients.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.autograd import Autograd
from ..core.flat import FlatModel
from ..core.models import Dropout


class CudaGraph:
    """`loss_and_gradient` of any module by recordings, one per batch shape and mode (the short last batch has its own),
    and `logits` where it is evaluated.

    Args:
        record: `record(function, generators)` runs `function()` once and returns (its result, a callable that
            recomputes that result in place). Random draws in it come from `generators`.
    """

    def __init__(self, model: FlatModel, precision: str, record: Callable):
        self.model, self.record = model, record
        self.eager = Autograd(model.module, model.gradient, precision)
        self.recordings: dict[tuple, Callable[..., Tensor]] = {}

    def loss_and_gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy, a scalar of its own; its gradient overwrites the model's gradient."""
        key = (*images.shape, self.model.module.training)
        if key not in self.recordings:
            self.recordings[key] = self._recorded(images, labels)
        return self.recordings[key](images, labels)

    def logits(self, images: Tensor) -> Tensor:
        """The module's output, in its present mode; recorded in inference mode, where nothing else changes."""
        if self.model.module.training or not torch.is_inference_mode_enabled():
            return self.eager.logits(images)
        key = (*images.shape, "logits")
        if key not in self.recordings:
            self.recordings[key] = self._recorded_logits(images)
        return self.recordings[key](images)

    def _recorded_logits(self, images: Tensor) -> Callable[[Tensor], Tensor]:
        fixed = images.clone()
        logits, replay = self.record(lambda: self.eager.logits(fixed), [])

        def replayed(images: Tensor) -> Tensor:
            fixed.copy_(images)
            replay()
            return logits.clone()

        return replayed

    def _recorded(self, images: Tensor, labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """`loss_and_gradient` for batches of this shape, by what this one leaves recorded."""
        fixed = images.clone(), labels.clone()
        buffers = self.model.buffers.clone()
        generators = [layer.generator for layer in self.model.module.modules() if isinstance(layer, Dropout)]
        states = [generator.get_state() for generator in generators]
        loss, replay = self.record(lambda: self.eager.loss_and_gradient(*fixed), generators)
        self.model.buffers.copy_(buffers)  # recording ran the batch, which must leave no trace
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)

        def replayed(images: Tensor, labels: Tensor) -> Tensor:
            fixed[0].copy_(images)
            fixed[1].copy_(labels)
            replay()
            return loss.clone()

        return replayed


def called_again(function: Callable[[], object], generators: list[torch.Generator]) -> tuple[None, Callable]:
    """The recorder where there is nothing to record with: a replay is another call."""
    return None, function


def record_cuda_graph(function: Callable[[], Tensor], generators: list[torch.Generator]) -> tuple[Tensor, Callable]:
    """`function` captured as a CUDA graph, after it has run three times on a stream of its own, to warm up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()
    return result, graph.replay
