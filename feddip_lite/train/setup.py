"""`prepare`: from a configuration to a federation: data dealt to clients, models for the workers, the method."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ..config import Config
from ..core.autograd import Autograd
from ..core.codecs import codec_of
from ..core.errors import Note
from ..core.flat import FlatModel, Layout
from ..core.models import INPUT_SHAPES, build_model, empty_model, num_stages
from ..core.own_model import check_model, own_model, takes_one_image
from ..core.seeds import derive, numpy_generator, torch_generator
from ..core.state import ServerState
from ..data.datasets import Dataset, as_published, fit_images, hold_out, load_dataset, normalise
from ..data.partition import Split, partition_dirichlet, partition_iid, partition_pathological
from ..methods.base import Context, Method
from ..methods.registry import METHODS, settings_of
from .round import Clients
from .workers import Workers, keep_freed_memory, num_workers

try:
    from ..fast.choose import fastest_kernels as kernels_of
    from ..fast.choose import trains_together
except ModuleNotFoundError:  # without the folder `fast` everything works, slower

    def trains_together(model: FlatModel, config: Config) -> None:
        """What trains a round's clients at once: nothing does."""

    def kernels_of(model: FlatModel, size: int, precision: str) -> Autograd:
        """What computes the loss and gradient of `model`."""
        return Autograd(model.module, model.gradient, precision)


def deal(config: Config) -> tuple[Dataset, Split, np.ndarray]:
    """The configuration's data set, who holds which of its samples, and which of them the server keeps."""
    data = load_dataset(config.dataset)
    if config.validation:
        data = hold_out(data, config.validation, torch_generator(config.seed, "validation"))
    return data, split_of(data, config), reference_of(data, config)


def prepare(
    config: Config, deal: Callable[[Config], tuple[Dataset, Split, np.ndarray]] = deal
) -> tuple[ServerState, Clients, Method]:
    """What `run_round` needs: the state before round 0, the clients with their data, and the method.

    Args:
        deal: where data comes from; a client with data of its own has another source than the default.

    Raises:
        ValueError: the data is damaged, or cannot be dealt as the configuration says, or there is no such device.
        FileNotFoundError: the data is not here and cannot be downloaded; says what to do.
    """
    config = config.resolved()
    device = _device(config)
    keep_freed_memory()
    options = config.method_options
    data, split, kept = deal(config)
    if options.get("normalisation") == "published":
        data = as_published(data)
    data, shape = fitting(data, config)

    def build():
        return build_model(config.model, **shape, seed=derive(config.seed, "initial weights"))

    def worker_model():
        model = FlatModel(build(), layout, device)
        model.draws = draws
        if draws:  # what is faster may not draw as the seed says
            model.kernels = Autograd(model.module, model.gradient, config.precision)
        else:
            model.kernels = kernels_of(model, shape["size"], config.precision)
        return model

    def scratch(depth=None):  # lives for one job at most, too short to be worth a faster arithmetic
        module = empty_model(config.model, depth, **shape, device=device)
        model = FlatModel(module, layout if depth is None else Layout.of(module), device)
        model.kernels = Autograd(module, model.gradient, config.precision)
        return model

    module = build()
    draws = own_model(config.model) is not None and check_own(module, data, split, config)
    layout = layout_of(module, config, tuple(data.train_images.shape[1:]))
    reference = torch.from_numpy(kept)
    images = normalise(data.train_images[reference], data).to(device)
    context = Context(scratch, num_stages(config.model), images, data.train_labels[reference].to(device))
    method = build_method(config, layout, context)
    count, slots = (1, 1) if draws else num_workers(config.workers, config.clients_per_round, device)
    models = [worker_model() for _ in range(count)]
    state = initial_state(method, models[0])
    train, test = (tuple(torch.from_numpy(shard).to(device) for shard in part) for part in (split.train, split.test))
    if (largest := max(map(len, train))) < config.batch_size:
        warnings.warn(
            f"batch_size: {config.batch_size}, and no client has more than {largest} training samples: an epoch is one "
            "step; fewer clients or smaller batches learn sooner",
            Note,
            stacklevel=2,
        )
    if config.up_feedback != "none" and config.clients_per_round < config.clients:
        rounds = config.clients / config.clients_per_round
        warnings.warn(
            f"up_feedback: {config.up_feedback!r} with {config.clients_per_round} of {config.clients} clients per "
            f"round: what a client remembers is stale, {rounds:g} rounds old on average",
            Note,
            stacklevel=2,
        )
    workers = Workers(models, slots, worker_model)
    clients = Clients(
        data=data.to(device),
        train=train,
        test=test,
        workers=workers,
        split_sha256=split.sha256,
        together=trains_together(models[0], config),
    )
    return state, clients, method


def fitting(data: Dataset, config: Config) -> tuple[Dataset, dict]:
    """The data as the configuration's model takes it, and what `build_model` is told of it. One of the paper's models
    gets square images that are large enough; one of your own gets them as they are, with their height as `size`."""
    if own_model(config.model) is None:
        data = fit_images(data, *INPUT_SHAPES.get(config.model, (data.train_images.shape[1], 14)))
    return data, {**data.model_shape, "width": config.width}


def check_own(module: nn.Module, data: Dataset, split: Split, config: Config) -> bool:
    """Refuse a model of one's own that cannot be trained, or not on a client's last batch, and warn of one of which
    little can be pruned. Returns whether it draws from the global generator (`own_model.check_model`)."""
    if config.width != 1 and not own_model(config.model).takes_width:
        raise ValueError(f"width: {config.width:g} is not valid; expected 1, since model {config.model!r} takes none")
    layout = layout_of(module, config)
    draws = check_model(config.model, module, layout, tuple(data.train_images.shape[1:]), data.classes)
    single = [client for client, shard in enumerate(split.train) if len(shard) % config.batch_size == 1]
    if single and not takes_one_image(module, tuple(data.train_images.shape[1:])):
        count = len(split.train[single[0]])
        raise ValueError(
            f"batch_size: {config.batch_size} leaves client {single[0]}, who has {count} training samples, a last "
            f"batch of one; model {config.model!r} cannot train on it (BatchNorm needs two); choose another batch_size"
        )
    share = layout.prunable / layout.size
    if share < 0.5:
        warnings.warn(
            f"model {config.model!r}: {100 * share:.1f} % of its {layout.size} weights are prunable; a sparsity is one "
            "of these alone",
            Note,
            stacklevel=3,
        )
    return draws


def layout_of(module: nn.Module, config: Config, image_shape: tuple[int, int, int] | None = None) -> Layout:
    """The layout that a run of this configuration has; ResNet's shortcuts are prunable if its method says so (D19)."""
    pruned = config.resolved().method_options.get("shortcuts") == "pruned"
    spared = {"include_shortcut": pruned, "dense_layers": config.dense_layers}
    return Layout.of(module, image_shape=image_shape, **spared)


def split_of(data: Dataset, config: Config) -> Split:
    """The clients' shards of train and test set under the configuration's partition; a function of its seed.

    What the server keeps for itself (`reference_of`) is taken out of the training set before it is split.
    """
    left = np.setdiff1d(np.arange(len(data.train_labels)), reference_of(data, config))
    labels = data.train_labels.numpy()[left], data.test_labels.numpy()
    draw = numpy_generator(config.seed, "partition")
    if config.partition == "pathological":
        in_order = config.classes_dealt == "in_order"
        split = partition_pathological(*labels, config.clients, draw, config.classes_per_client, in_order)
    elif config.partition == "dirichlet":
        split = partition_dirichlet(*labels, config.clients, draw, config.alpha)
    else:
        split = partition_iid(*labels, config.clients, draw)
    return replace(split, train=tuple(left[shard] for shard in split.train))


def reference_of(data: Dataset, config: Config) -> np.ndarray:
    """The training samples that the server keeps: `reference_per_class` of each class, for methods with that option.

    Returns:
        int64 indices, class after class, a function of the seed; empty for all other methods.

    Raises:
        ValueError: a class has no sample left for the clients.
    """
    count = config.resolved().method_options.get("reference_per_class", 0)
    if not count:
        return np.empty(0, np.int64)
    draw, labels = numpy_generator(config.seed, "reference"), data.train_labels.numpy()
    fewest = np.bincount(labels, minlength=data.classes).min()
    if count >= fewest:
        raise ValueError(f"reference_per_class: {count} is not valid; expected an integer in [1, {fewest - 1}]")
    kept = [draw.permutation(np.flatnonzero(labels == label))[:count] for label in range(data.classes)]
    return np.concatenate(kept)


def _device(config: Config) -> torch.device:
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    gpus = torch.cuda.device_count()
    if name.startswith("cuda") and (torch.device(name).index or 0) >= gpus:
        raise ValueError(f"device: {name!r} is not valid; expected cpu, auto or cuda:N, N below the {gpus} GPUs here")
    if config.precision == "tf32" and name == "cpu":
        raise ValueError("precision: 'tf32' is not valid on a CPU; expected float32 or bf16")
    return torch.device(name)


def initial_state(method: Method, model: FlatModel) -> ServerState:
    """The state before round 0, from the model's initial weights and the method's first mask."""
    mask, memory = method.start()
    mask = mask.to(model.weights.device)
    state = ServerState(round=0, weights=model.weights.clone(), buffers=model.buffers.clone(), mask=mask, memory=memory)
    return method.begin(state)


def build_method(config: Config, layout: Layout, context: Context | None = None) -> Method:
    """The method of a resolved configuration on this layout.

    Raises:
        ValueError: the method's settings do not fit each other, or not this model.
    """
    method = METHODS[config.method]
    own = settings_of(config.method, config.preset)
    values = {name: config.method_options.get(name, getattr(config, name, None)) for name in own}
    codecs = {name: codec_of(getattr(config, name)) for name in ("down", "up")}
    codecs["up_pruned"] = None if config.up_pruned is None else codec_of(config.up_pruned)
    return method(
        layout=layout,
        rounds=config.rounds,
        seed=config.seed,
        context=context,
        up_feedback=config.up_feedback,
        mask_cache=config.mask_cache,
        **codecs,
        **values,
    )
