"""A model of one's own: any `nn.Module`, or what makes one, by name or without; checked before anything is trained."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn

from .flat import Layout, sha256_of
from .models import MODELS, AlexNet, LeNet5, ResNet18

Make = nn.Module | Callable[..., nn.Module]
"""A module, or a class or function that makes one from none, some or all of `classes`, `width`, `channels`, `size`."""


@dataclass(frozen=True, eq=False)
class OwnModel:
    """What stands in `MODELS` for a model of one's own: called as the others, it gives a new module.

    A module is copied, with the weights that it has. A class or function is given what its parameters ask for by name;
    what it draws comes from the run's seed.
    """

    make: Make

    def __call__(self, classes: int, width: float, channels: int, size: int) -> nn.Module:
        """A new module.

        Raises:
            ValueError: `make` asks for more than it can be given, fails, or makes something else.
        """
        given = {"classes": classes, "width": width, "channels": channels, "size": size}
        if isinstance(self.make, nn.Module):
            return deepcopy(self.make)
        asked = inspect.signature(self.make).parameters.values()
        more = [each.name for each in asked if _is_needed(each) and each.name not in given]
        if more:
            names = ", ".join(given)
            raise ValueError(f"{_name(self.make)} needs {', '.join(more)}; expected a model made from {names}, or none")
        own = {each.name: given[each.name] for each in asked if each.name in given}
        module = self.make(**own)
        if not isinstance(module, nn.Module):
            raise ValueError(f"{_name(self.make)} gives a {type(module).__name__}; expected an nn.Module")
        return module

    @property
    def takes_width(self) -> bool:
        """Whether the configuration's `width` reaches the model."""
        return not isinstance(self.make, nn.Module) and "width" in inspect.signature(self.make).parameters


PAPER = (LeNet5, AlexNet, ResNet18)


def own_model(name: str) -> OwnModel | None:
    """The model of one's own that is known as `name`; None for one of the paper's, or an unknown name."""
    make = MODELS.get(name)
    if make is None or make in PAPER:
        return None
    return make if isinstance(make, OwnModel) else OwnModel(make)


def register_model(name: str, make: Make) -> None:
    """Make a model known as `name`, for `Config`, the command line and profiles of this process.

    Args:
        make: an `nn.Module`, which is copied with the weights that it has, or a class or function that makes one. It is
            called with those of `classes` (int), `width` (float), `channels` (int) and `size` (int, pixels a side) that
            it has as parameters. Its input are float32 images (b, channels, height, width), its output logits
            (b, classes).

    Raises:
        ValueError: the name is that of a model of the paper, or `make` is none of these.
    """
    if MODELS.get(name) in PAPER:
        raise ValueError(f"model {name!r}: is one of the paper's; expected another name")
    if not callable(make):
        raise ValueError(f"model {name!r}: a {type(make).__name__}; expected an nn.Module, or what makes one")
    MODELS[name] = OwnModel(make)


def fingerprint(make: Make, module: nn.Module) -> str:
    """SHA-256 of what a model is: its layers and their settings as PyTorch prints them, names, shapes and dtypes of its
    tensors, which of them are frozen, the source of its classes that are not PyTorch's, and of a module that is given,
    the weights that it has. `module` is one that `make` made."""
    parts = [repr(module)]
    parts += [f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}" for name, p in module.named_parameters()]
    parts += [f"{name} {tuple(b.shape)} {b.dtype}" for name, b in module.named_buffers()]
    kinds = {type(each) for each in module.modules() if not type(each).__module__.startswith("torch.")}
    sources = [*sorted(kinds, key=lambda kind: kind.__qualname__)]
    if isinstance(make, nn.Module):
        parts.append(sha256_of({name: t for name, t in module.state_dict().items() if t.dim()}))
    elif make not in kinds:
        sources.append(make)
    parts += [source_of(each) for each in sources]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def takes_one_image(module: nn.Module, image_shape: tuple[int, int, int]) -> bool:
    """Whether the module can train on a batch of one image; BatchNorm may not. It stays as it is."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            deepcopy(module).train()(torch.zeros(1, *image_shape))
        except Exception:  # whatever a model of one's own may raise
            return False
    return True


def check_model(name: str, module: nn.Module, layout: Layout, image_shape: tuple[int, int, int], classes: int) -> bool:
    """Refuse a model that cannot be trained; returns whether it draws from PyTorch's global generator (dropout).

    Two grey images go through it, in training and in evaluation mode; the module and the generator stay as they are.

    Raises:
        ValueError: one line: what the model does not do, and what is expected.
    """
    module = deepcopy(module)
    odd = [path for path, _ in module.named_parameters() if "parametrizations." in path]
    if odd:
        raise ValueError(f"model {name!r}: {odd[0]} is parametrised; expected plain weights (remove_parametrizations)")
    if not layout.num_prunable:
        raise ValueError(f"model {name!r}: no prunable weights; expected a convolution, linear or recurrent layer")
    images = torch.full((2, *image_shape), 0.5)
    with torch.random.fork_rng(devices=[]):
        before = torch.random.get_rng_state()
        for mode in (True, False):
            try:
                with torch.no_grad():
                    logits = module.train(mode)(images)
            except Exception as error:  # whatever a model of one's own may raise
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                raise ValueError(f"model {name!r}: cannot take images {tuple(images.shape)} ({reason})") from error
            found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            if found != (2, classes):
                raise ValueError(f"model {name!r}: its output for 2 images is {found}; expected logits (2, {classes})")
        return not torch.equal(before, torch.random.get_rng_state())


def _is_needed(parameter: inspect.Parameter) -> bool:
    named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY, parameter.POSITIONAL_ONLY)
    return named and parameter.default is parameter.empty


def _name(make: Make) -> str:
    return getattr(make, "__name__", type(make).__name__)


def source_of(kind: Callable) -> str:
    """The source of a function, or of a class: its functions and plain values, and those of its bases that are neither
    PyTorch's nor this package's. Of what was typed in where no source is kept, the byte code."""
    if not inspect.isclass(kind):
        return _text(kind)
    parts = []
    for each in kind.__mro__:
        if not each.__module__.startswith(("torch.", "feddip_lite.", "builtins")):
            parts += [each.__qualname__, *(_text(value, name) for name, value in vars(each).items())]
    return "\n".join(parts)


def _text(value: object, name: str = "") -> str:
    inner = getattr(value, "fget", None) or getattr(value, "__func__", None) or value
    if isinstance(value, int | float | str | tuple | None) and not name.startswith("__"):
        return f"{name} = {value!r}"
    if not hasattr(inner, "__code__"):
        return name
    try:
        return inspect.getsource(inner)
    except (OSError, TypeError):  # typed in; what `dataclass` makes follows from the rest
        return name if name.startswith("__") else f"{name} {inner.__code__.co_code.hex()} {inner.__code__.co_consts}"
