"""How relevant each weight is to what a model says about some images: relevance propagation, and a cheap stand-in.

Relevance is written as value times gradient, which is all that layer-wise relevance propagation (Bach et al. 2015)
needs. In its epsilon rule the unit i of a layer z_j = sum_i a_i w_ij + b_j receives

    R_i = sum_j a_i w_ij R_j / (z_j + eps sign z_j)

With R_j = z_j g_j that is a_i sum_j w_ij (f_j g_j), f_j = z_j / (z_j + eps sign z_j): the ordinary backward pass with
gradients multiplied by f_j at each layer's output, and the weight's own share is R_ij = w_ij * its gradient. ReLU,
maximum pools (winner takes all), average pools and residual sums need no change: there value times gradient is kept
already. BatchNorm in evaluation mode is an affine layer, its shift a bias.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..core.flat import FlatModel

LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)


def layerwise_relevance(model: FlatModel, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """Relevance (n,) of every weight to the true classes' scores, summed over the images, by the epsilon rule.

    Args:
        model: loaded and in evaluation mode; its gradient is overwritten.
        images, labels: (b, C, H, W) normalised, (b,) int64.
        epsilon: in units of the root mean square of each layer's output, >= 0.

    Returns:
        signed; each layer's weights and biases sum up to the scores, less what epsilon and the biases above absorb.
    """
    model.gradient.zero_()
    with epsilon_rule(model.module, epsilon):
        model.module(images).gather(1, labels[:, None]).sum().backward()
    return model.weights * model.gradient


def gradient_activation(model: FlatModel, images: Tensor, labels: Tensor) -> Tensor:
    """w * dloss/dw (n,), the first-order change of the images' mean cross-entropy if the weight were kept or not.

    Arguments as above; signed, too.
    """
    model.kernels.loss_and_gradient(images, labels)
    return model.weights * model.gradient


@contextmanager
def epsilon_rule(module: nn.Module, epsilon: float) -> Iterator[None]:
    """Within, value times gradient is relevance: backward passes multiply by z / (z + eps sign z) at each layer."""

    def damp(layer: nn.Module, inputs: tuple, z: Tensor) -> None:
        value = z.detach()
        size = value.abs()
        stabiliser = epsilon * value.square().mean().sqrt()
        factor = size / (size + stabiliser).clamp_min(torch.finfo(z.dtype).tiny)  # a layer of zeros passes nothing
        z.register_hook(lambda gradient: gradient * factor)

    hooks = [layer.register_forward_hook(damp) for layer in module.modules() if isinstance(layer, LAYERS)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
