"""The model that a recorded run ended with, as plain PyTorch: to use, to train on, to export.

No flat vectors and none of this package's operators: stock layers under the names of the model's `state_dict`.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..core.models import INPUT_SHAPES, build_model, built, stock
from ..core.own_model import Make, OwnModel
from ..core.seeds import derive
from ..data.datasets import DATASETS, Dataset, as_published, normalise
from ..data.files import IMAGE_SHAPES, KEYS
from .kept_model import KeptModel
from .store import atomic_write, config_of, read_model, read_run


def load_model(folder: str | Path, run_id: str, model: Make | None = None) -> nn.Module:
    """The sparse model w*m that a recorded run ended with: an `nn.Module` on the CPU, in evaluation mode.

    Its input are float32 images (b, C, H, W), scaled and normalised as the run's (`pixels_of` does that), its output
    logits (b, classes).

    Args:
        folder: of the results. run_id: as in the names of its files.
        model: the module, class or function that the run was made with, if that is one's own and not registered here.

    Raises:
        FileNotFoundError: there is no such run, or no file of its model.
        ValueError: the file is damaged, or the model is not known here or another.
    """
    kept, config, data = _read(Path(folder), run_id)
    shape = {**data.model_shape, "width": config["width"]}
    seed = derive(config["seed"], "initial weights")  # what is frozen is as it was drawn
    if model is None:
        module = build_model(config["model"], **shape, seed=seed)
    else:
        module = built(OwnModel(model), seed, **shape)
    stored = kept.state_dict()
    own = {name: tensor.shape for name, tensor in module.state_dict().items()}
    wrong = [name for name, tensor in stored.items() if own.get(name) != tensor.shape]
    if wrong:
        raise ValueError(f"{run_id}: its {wrong[0]} {tuple(stored[wrong[0]].shape)} is no tensor of this model")
    module.load_state_dict(stored, strict=False)  # BatchNorm's count of batches is nobody's
    return stock(module).eval()


def pixels_of(folder: str | Path, run_id: str, model: Make | None = None) -> nn.Module:
    """`load_model` behind the normalisation of the run's data: its input are images as they are in the data set (of the
    paper's models: padded to what the model takes), (b, C, H, W), uint8 unless the data is floating. Raises as that."""
    return OfPixels(load_model(folder, run_id, model), _read(Path(folder), run_id)[2]).eval()


class OfPixels(nn.Module):
    """A module behind the normalisation of a data set."""

    def __init__(self, module: nn.Module, data: Dataset):
        super().__init__()
        self.module, self.data = module, data

    def forward(self, images: Tensor) -> Tensor:
        return self.module(normalise(images, self.data))


def export_model(folder: str | Path, run_id: str, path: str | Path, model: Make | None = None) -> int:
    """Write a recorded run's sparse model as a file that needs none of this package; returns its size in bytes.

    `.safetensors`: the tensors of the `state_dict`. `.pt2` (for `torch.export.load`) and `.onnx` (needs the extra
    `feddip-lite[onnx]`): programs of `pixels_of`, from `images` (any number of them) to `logits`.

    Raises:
        ValueError: another suffix, or as `load_model`. FileNotFoundError: as `load_model`. OSError: cannot be written.
    """
    path = Path(path).expanduser()
    if path.suffix == ".safetensors":
        state = load_model(folder, run_id, model).state_dict()
        content = save({name: tensor.contiguous() for name, tensor in state.items()})
    elif path.suffix in (".pt2", ".onnx"):
        data = _read(Path(folder), run_id)[2]
        content = program(pixels_of(folder, run_id, model), data.train_images.expand(2, -1, -1, -1), path.suffix)
    else:
        raise ValueError(f"{path}: {path.suffix or 'no suffix'} is not valid; expected .safetensors, .pt2 or .onnx")
    atomic_write(path, content)
    return len(content)


def program(module: nn.Module, images: Tensor, form: str) -> bytes:
    """A module as a program for any number of `images` (b, C, H, W), in `form` ".pt2" or ".onnx". The same model gives
    the same bytes. Raises ValueError for ".onnx" without onnx and onnxscript."""
    number, buffer = {0: torch.export.Dim.DYNAMIC}, io.BytesIO()
    with torch.enable_grad():  # without, our layers take faster operators, which other machines may lack
        whole = images.clone(memory_format=torch.contiguous_format)  # a view's storage would travel with it
        exported = torch.export.export(module.eval(), (whole,), dynamic_shapes=(number,))
    for node in exported.graph.nodes:
        node.meta.pop("stack_trace", None)  # where the code lies on this machine
    if form == ".pt2":
        torch.export.save(exported, buffer)
        return buffer.getvalue()
    try:
        made = torch.onnx.export(exported, input_names=["images"], output_names=["logits"], verbose=False)
    except ImportError as error:
        raise ValueError(f".onnx needs more packages ({error}); install feddip-lite[onnx]") from error
    made.save(buffer)
    return buffer.getvalue()


def _read(folder: Path, run_id: str) -> tuple[KeptModel, dict, Dataset]:
    """The kept model, the configuration, and the data set with a black image in place of its samples."""
    kept, record = read_model(folder, run_id), read_run(folder, run_id)[1]
    config, facts = config_of(record), record["provenance"].get("data", {})
    name = config["dataset"]
    known = DATASETS.get(name)
    if known is not None and not callable(known):
        rest = known | {"class_names": ()}
        shape = IMAGE_SHAPES[name]
        shape = facts.get("image_shape") or _padded((1 if len(shape) == 2 else 3, shape[0]), config["model"])
    else:
        rest = {key: facts[key] for key in ("classes", "scale", "mean", "std", "class_names")} | {"augmentation": None}
        shape = facts["image_shape"]
    pixels = torch.zeros(1, *shape, dtype=torch.uint8 if rest["scale"] > 1 else torch.float32)
    tensors = {key: pixels if key.endswith("images") else torch.zeros(1, dtype=torch.int64) for key in KEYS}
    about = {"source": facts.get("source", ""), "sha256": facts.get("sha256", ""), "variant": facts.get("variant", "")}
    data = Dataset(name=name, **tensors, **rest, **about)
    return kept, config, as_published(data) if config["method_options"].get("normalisation") == "published" else data


def _padded(shape: tuple[int, int], model: str) -> tuple[int, int, int]:
    """Of records that do not say it: the shape of images as the model takes them."""
    channels, size = shape
    channels, least = INPUT_SHAPES.get(model, (channels, size))
    return channels, max(size, least), max(size, least)
