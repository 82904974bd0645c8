"""A pruned model as a module, and as a file that PyTorch runs without this package.

Small is the file that recorded runs leave (`records/kept_model.py`: kept values and a bitmap), which needs code that
builds the model. A `.pt2` holds that code as well, as a graph of PyTorch's own operators, and every zero. Read before:
`shrink.py`, which makes models smaller.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import torch
from torch import nn

from ...config import Config
from ...core.models import build_model
from ...core.state import ServerState
from ...data.datasets import Dataset
from ...records.kept_model import KeptModel
from ...records.plain_model import OfPixels, program
from ...records.store import atomic_write
from ...train.setup import layout_of


def sparse_model(state: ServerState, data: Dataset, config: Config) -> nn.Module:
    """The sparse global model w*m of a run of `config` as a module of `core/models.py`, on the CPU and in evaluation
    mode; `data` is the run's `Clients.data`, whose images fit the model."""
    module = build_model(config.model, **data.model_shape, width=config.width)
    layout, mask = layout_of(module, config), state.mask.cpu()
    kept = KeptModel(layout, layout.masked(state.weights.cpu(), mask), mask, state.buffers.cpu())
    module.load_state_dict(kept.state_dict(), strict=False)  # BatchNorm's count of batches is nobody's
    return module.eval()


def save_program(path: str | Path, module: nn.Module, data: Dataset) -> int:
    """Write a model with the normalisation of its data set as a program; returns the file's size in bytes.

    Anyone with PyTorch runs it: `torch.export.load(path).module()(images)` are the logits (b, classes) of `images`,
    uint8 (b, C, H, W) as in the data set. The same model gives the same bytes.

    Args:
        path: replaced in one step; folders are made.
        module: such as `sparse_model`'s, or one made smaller by `without_dead_channels`; unchanged.
        data: of the run, for the shape of its images and their normalisation.

    Raises:
        OSError: the file cannot be written. What PyTorch cannot export (`to_csr` comes after loading), it refuses.
    """
    images = torch.zeros(2, *data.train_images.shape[1:], dtype=torch.uint8)
    content = program(OfPixels(module, data), images, ".pt2")
    atomic_write(Path(path), content)
    return len(content)


def load_program(path: str | Path) -> nn.Module:
    """The program that `save_program` wrote, its checksums verified, which `torch.export.load` does not do.

    Raises:
        ValueError: the file is damaged, or another kind of file; names it.
        FileNotFoundError: there is none.
    """
    data = io.BytesIO(Path(path).read_bytes())
    try:
        with zipfile.ZipFile(data) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"checksum of {damaged}")
        data.seek(0)
        return torch.export.load(data).module()
    except Exception as error:  # a damaged archive fails in many ways
        raise ValueError(f"{path}: damaged, or no exported program ({' '.join(str(error).split())})") from error
