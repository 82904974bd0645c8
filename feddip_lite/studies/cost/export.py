"""A pruned model as one file that plain PyTorch loads, without pickled code: `export`, and `load_exported` back.

Used as `cost.export(...)`. Read before: `shrink.py`, whose chains make files that need no package of ours.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from ...config import Config
from ...core.flat import FlatModel
from ...core.models import ResNet18, build_model
from ...core.state import ServerState
from ...data.datasets import Dataset
from ...records.store import atomic_write
from ...train.setup import layout_of
from .shrink import CHAINS, WEIGHTED, CSRLinear, plain

FORMAT = "feddip_lite model 1"

# The layers a file may hold, and what each is built from; a name that is not here is never looked up.
ARGUMENTS = {
    nn.Conv2d: "in_channels out_channels kernel_size stride padding dilation groups padding_mode".split(),
    nn.Linear: "in_features out_features".split(),
    nn.BatchNorm2d: ["num_features", "eps"],
    nn.MaxPool2d: "kernel_size stride padding dilation ceil_mode".split(),
    nn.AdaptiveAvgPool2d: ["output_size"],
    nn.Dropout: ["p"],
    nn.Flatten: ["start_dim", "end_dim"],
    nn.ReLU: [],
}
KINDS = {kind.__name__: kind for kind in ARGUMENTS}


def sparse_model(state: ServerState, data: Dataset, config: Config) -> nn.Module:
    """The sparse global model w*m as a module of `core/models.py`, on the CPU and in evaluation mode.

    Args:
        state: of a run of `config`; `data`: its `Clients.data`, whose images fit the model.
    """
    module = build_model(config.model, **_shape(data, config))
    model = FlatModel(module, layout_of(module, config))
    model.load(state.weights.cpu(), state.mask.cpu(), state.buffers.cpu())
    return module.eval()


def export(path: str | Path, module: nn.Module, data: Dataset, config: Config) -> int:
    """Write a model to `path`, a file that anyone with PyTorch can load and run; returns its size in bytes.

    LeNet-5, AlexNet and chains need nothing but this (`images` are uint8 (b, C, H, W), as in the data set):

        from collections import OrderedDict
        import torch
        from torch import nn

        def dense(stored):
            if isinstance(stored, torch.Tensor):
                return stored
            shape, kept, values = stored  # kept: where in the flattened tensor the values are
            return torch.zeros(shape).view(-1).index_put((kept.long(),), values).view(shape)

        saved = torch.load("model.pt", weights_only=True)
        layers = [(name, getattr(nn, kind)(**arguments)) for name, kind, arguments in saved["layers"]]
        model = nn.Sequential(OrderedDict(layers)).eval()
        model.load_state_dict({name: dense(stored) for name, stored in saved["weights"].items()})
        logits = model((images / saved["scale"] - saved["mean"]) / saved["std"])

    ResNet-18 is no chain: its file also has `steps`, each a layer's name or "add", with the numbers of the values that
    it takes, the input being number 0. With the same `dense` and `saved`:

        layers = {name: getattr(nn, kind)(**arguments).eval() for name, kind, arguments in saved["layers"]}
        for name, layer in layers.items():
            layer.load_state_dict({part: dense(saved["weights"][f"{name}.{part}"]) for part in layer.state_dict()})

        def model(x):
            values = [x]
            for name, numbers in saved["steps"]:
                given = [values[number] for number in numbers]
                values.append(sum(given) if name == "add" else layers[name](*given))
            return values[-1]

        logits = model((images / saved["scale"] - saved["mean"]) / saved["std"])

    A weight tensor that is smaller so is stored as its non-zero values, 8 bytes each with their int32 indices. Values
    come back bit for bit, but for -0, which becomes 0.

    Args:
        path: replaced in one step; folders are made.
        module: float32, such as `sparse_model`'s or one made smaller by `without_dead_channels`; unchanged.
        data: of the run, for the number of classes and the normalisation. config: for the model's name and width.

    Raises:
        ValueError: the module has layers that no file holds (`to_csr` comes after loading).
        OSError: the file cannot be written.
    """
    csr = [name for name, layer in module.named_modules() if isinstance(layer, CSRLinear)]
    if csr:
        raise ValueError(f"module: layer {csr[0]!r} is CSRLinear; export the model it was made from")
    content = {"format": FORMAT, "run": config.run_id, "shape": tuple(data.train_images.shape[1:])}
    if isinstance(module, nn.Sequential) or type(module) in CHAINS:
        module = plain(module)
        layers = dict(module.named_children())
    else:
        layers, steps = _wired(module)
        content |= {"model": config.model, "arguments": _shape(data, config), "steps": steps}
    content["layers"] = [(name, *_described(name, layer)) for name, layer in layers.items()]
    content["weights"] = {name: _stored(tensor.detach().cpu()) for name, tensor in module.state_dict().items()}
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    content |= {"scale": float(data.scale), "mean": mean, "std": std}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomic_write(Path(path), buffer.getvalue())
    return len(buffer.getvalue())


def load_exported(path: str | Path) -> nn.Module:
    """The model that `export` wrote, in evaluation mode: a chain of PyTorch's own layers, or the package's ResNet-18.

    Raises:
        ValueError: the file is damaged, or not one of `export`'s; names it.
        FileNotFoundError: there is none.
    """
    data = io.BytesIO(Path(path).read_bytes())
    try:
        saved = torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive or pickle fails in many ways
        raise ValueError(f"{path}: damaged, or not an exported model") from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(f"{path}: not an exported model of this version")
    try:
        return _rebuilt(saved)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not a model that `export` wrote: {error}") from error


def _rebuilt(saved: dict) -> nn.Module:
    if "model" in saved:
        module = build_model(saved["model"], **saved["arguments"])
    else:
        layers = ((name, _built(KINDS[kind], arguments)) for name, kind, arguments in saved["layers"])
        module = nn.Sequential(OrderedDict(layers))
    module.load_state_dict({name: _dense(stored) for name, stored in saved["weights"].items()})
    return module.eval()


def _shape(data: Dataset, config: Config) -> dict[str, int | float]:
    channels, size = data.train_images.shape[1:3]
    return {"classes": data.classes, "width": config.width, "channels": channels, "size": size}


def _wired(module: ResNet18) -> tuple[dict[str, nn.Module], list[tuple[str, list[int]]]]:
    """(layers by name, steps of the forward pass as in `export`); value k is what step k gives, value 0 the input."""
    layers, steps = {"relu": nn.ReLU(), "average": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}, []

    def then(*names: str, after: int | None = None) -> int:
        for name in names:
            steps.append((name, [len(steps) if after is None else after]))
            after = None
        return len(steps)

    start = then("conv1", "bn1", "relu")
    for number, block in enumerate(module.blocks):
        path = f"blocks.{number}."
        end = then(path + "conv1", path + "bn1", "relu", path + "conv2", path + "bn2")
        projection = [f"{path}shortcut.{name}" for name, _ in block.shortcut.named_children()]
        steps.append(("add", [end, then(*projection, after=start) if projection else start]))
        start = then("relu")
    then("average", "flatten", "linear")
    return layers | {name: module.get_submodule(name) for name, _ in steps if name not in {*layers, "add"}}, steps


def _described(name: str, layer: nn.Module) -> tuple[str, dict]:
    """(kind, arguments) of a layer; `bias` only for convolutions and linear layers."""
    kind = next((kind for kind in ARGUMENTS if isinstance(layer, kind)), None)
    if kind is None:
        raise ValueError(f"module: layer {name!r} is {type(layer).__name__}; expected one of {', '.join(KINDS)}")
    arguments = {argument: getattr(layer, argument) for argument in ARGUMENTS[kind]}
    if isinstance(layer, WEIGHTED):
        arguments["bias"] = layer.bias is not None
    return kind.__name__, arguments


def _built(kind: type[nn.Module], arguments: dict) -> nn.Module:
    # Layers with weights get theirs from the file: no random draws.
    return nn.utils.skip_init(kind, **arguments) if "bias" in arguments else kind(**arguments)


def _stored(tensor: Tensor) -> Tensor | tuple[tuple[int, ...], Tensor, Tensor]:
    """The tensor itself (a copy: as a view it would take the whole flat vector along), or (shape, kept, values)."""
    flat = tensor.reshape(-1)
    kept = flat.nonzero().view(-1)
    if tensor.dim() > 1 and 2 * len(kept) < len(flat):  # an index is as long as a value
        return tuple(tensor.shape), kept.int(), flat[kept]
    return tensor.clone()


def _dense(stored: Tensor | tuple[tuple[int, ...], Tensor, Tensor]) -> Tensor:
    if isinstance(stored, Tensor):
        return stored
    shape, kept, values = stored
    return torch.zeros(shape).view(-1).index_put((kept.long(),), values).view(shape)
