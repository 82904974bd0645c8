"""`Config`: everything a run depends on, each field with its default, range and meaning; and the run's identity."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from .core.codecs import codec_of, named_codec
from .core.models import MODELS
from .core.settings import (
    Check,
    flag,
    integer,
    is_registered,
    key_of,
    one_of,
    real,
    refuse_unknown,
    registered,
    setting,
    validate,
)
from .data.datasets import DATASETS
from .methods.registry import METHODS, resolved_options, settings_of

OWN = "the method's own value"


def _workers(value):
    return value if value in ("auto", "together") else integer(1).accept(value)


def _device(value):
    return value if isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) else None


def _mapping(value):
    return dict(value) if isinstance(value, Mapping) and all(isinstance(key, str) for key in value) else None


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run. Defaults are the authors' settings; `None` means the method's own value.

    Raises:
        ValueError: a value outside its range: one line naming field, value and range.
    """

    method: str = setting("feddip", key_of(METHODS), "federated pruning method")
    dataset: str = setting("digits", registered(DATASETS), "data set")
    model: str = setting("lenet5", registered(MODELS), "model")
    width: float = setting(1.0, real("(0, 8]"), "factor on the model's hidden channels and features")
    dense_layers: str = setting(
        "none", one_of("none", "first", "last", "both"), "layers that are never pruned, of those that would be"
    )
    rounds: int = setting(1000, integer(1), "communication rounds T")
    clients: int = setting(50, integer(1), "clients N")
    clients_per_round: int = setting(5, integer(1), "clients K drawn each round")
    local_epochs: int = setting(5, integer(1), "passes over a client's data in a round")
    batch_size: int = setting(128, integer(1), "samples in a local batch")
    lr: float = setting(0.1, real("(0, inf)"), "learning rate of round 0")
    lr_decay: float = setting(0.998, real("(0, 1]"), "factor on the learning rate from round to round")
    lr_schedule: str = setting(
        "exponential", one_of("exponential", "theory"), "lr * lr_decay^t or 1/((t+1)*smoothness)"
    )
    smoothness: float | None = setting(None, real("(0, inf)"), "L of the theory schedule", none="not used")
    weight_decay: float = setting(5e-4, real("[0, inf)"), "L2 decay of all weights, every method")
    initial_sparsity: float | None = setting(None, real("[0, 1)"), "sparsity of round 0", none=OWN)
    target_sparsity: float = setting(0.9, real("[0, 1)"), "share of prunable weights that end up zero")
    mask_interval: int | None = setting(None, integer(1), "rounds R between mask updates", none=OWN)
    penalty_max: float | None = setting(None, real("[0, inf)"), "peak lambda_max of the growing penalty", none=OWN)
    penalty_steps: int = setting(20, integer(1), "steps Q of the growing penalty")
    partition: str = setting("iid", one_of("iid", "pathological", "dirichlet"), "how data is dealt to clients")
    classes_per_client: int = setting(2, integer(1), "classes a client has, pathological partition")
    classes_dealt: str = setting(
        "drawn", one_of("drawn", "in_order"), "which classes go together, pathological partition"
    )
    alpha: float = setting(0.5, real("(0, inf)"), "concentration of the Dirichlet partition")
    validation: float = setting(
        0.0, real("[0, 1)"), "share of each class's training samples held out, and evaluated on instead of the test set"
    )
    seed: int = setting(0, integer(0, 2**63 - 1), "of every random draw")
    preset: str = setting("paper", one_of("paper", "repo", "memory"), "reading of the method's sources")
    method_options: dict[str, Any] = setting(
        {}, Check("a mapping of option names to values", _mapping), "further settings"
    )
    eval_every: int = setting(1, integer(1), "rounds between evaluations; the last is always evaluated")
    final_prune: bool = setting(
        False, flag(), "prune the last model to the target sparsity exactly, by magnitude, whatever the method"
    )
    down: str = setting("fp32", named_codec(), "codec of the values that go down")
    up: str = setting("fp32", named_codec(), "codec of the values that go up, as their difference to what came down")
    up_pruned: str | None = setting(
        None, named_codec(), "codec of the weights that the mask prunes, in a dense upload", none="that of up"
    )
    up_feedback: str = setting(
        "none", one_of("none", "ef", "ef21"), "what a client remembers of what was lost on the way up"
    )
    mask_cache: bool = setting(False, flag(), "tell masks over those that clients hold, instead of whole")
    precision: str = setting("float32", one_of("float32", "tf32", "bf16"), "arithmetic of training")
    on_client_failure: str = setting("abort", one_of("abort", "skip"), "when a client fails: stop, or merge the rest")
    client_timeout: float | None = setting(None, real("(0, inf)"), "seconds a client may train", none="no limit")
    device: str = setting("auto", Check("auto, cpu, cuda or cuda:N", _device), "where tensors live")
    workers: str | int = setting(
        "auto", Check("auto, together or an integer >= 1", _workers), "clients trained side by side, or as one batch"
    )

    def __post_init__(self):
        validate(self)
        integer(1, self.clients).require("clients_per_round", self.clients_per_round, "clients")
        if self.initial_sparsity is not None:
            up_to_target = real(f"[0, {self.target_sparsity}]")
            up_to_target.require("initial_sparsity", self.initial_sparsity, "target_sparsity")
        if (self.lr_schedule == "theory") != (self.smoothness is not None):
            raise ValueError(
                f"smoothness: {self.smoothness} is not valid with lr_schedule = {self.lr_schedule!r}; expected a "
                "number in (0, inf) with 'theory' and none otherwise"
            )
        self._check_feedback()
        own = settings_of(self.method, self.preset)
        for name in ("initial_sparsity", "mask_interval", "penalty_max"):
            if getattr(self, name) is not None and name not in own:
                raise ValueError(
                    f"{name}: {getattr(self, name)} is not valid; expected none, since {self.method} has none"
                )
        resolved_options(self.method, self.preset, self.method_options, FIELDS)

    def _check_feedback(self) -> None:
        """Refuse feedback of what loses nothing, and of what may lose more than it sends."""
        if self.up_feedback == "none":
            return
        codecs = {name: codec_of(getattr(self, name) or self.up) for name in ("up", "up_pruned")}
        if all(codec.kind == "fp32" for codec in codecs.values()):
            raise ValueError(f"up_feedback: {self.up_feedback!r} is not valid with up = 'fp32'; expected none")
        for name, codec in codecs.items():
            if codec.omega >= 1:
                raise ValueError(
                    f"up_feedback: {self.up_feedback!r} is not valid with {name} = {codec.name!r}, which may lose "
                    f"{codec.omega:.3g} times the squares it is given; expected none, more bits, or smaller blocks"
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A configuration from a mapping such as a line of `params/*.yaml`.

        Raises:
            ValueError: an unknown key (the nearest known one is named) or a value outside its range.
        """
        refuse_unknown(values, [item.name for item in fields(cls)], "config")
        return cls(**values)

    def resolved(self) -> Self:
        """This configuration with every None and every method option filled in; what is stored beside results."""
        own = settings_of(self.method, self.preset)
        filled = {name: own[name] for name in FIELDS if getattr(self, name) is None and name in own}
        if "initial_sparsity" in filled:
            filled["initial_sparsity"] = min(filled["initial_sparsity"], self.target_sparsity)
        options = resolved_options(self.method, self.preset, self.method_options, FIELDS)
        return replace(self, **filled, method_options=options)

    def lr_at(self, t: int) -> float:
        """Learning rate of round t: `exponential` is lr * lr_decay^t, `theory` is 1 / ((t + 1) * smoothness).

        The second is the convergence theorem's setting (slides, Eq. 4), whose rounds count from 1.
        """
        return 1 / ((t + 1) * self.smoothness) if self.lr_schedule == "theory" else self.lr * self.lr_decay**t

    @property
    def run_id(self) -> str:
        """`<method>_<dataset>_<12 hex digits>`: what the run depends on, and nothing else.

        The digits hash the fields of the resolved configuration that differ from the defaults of its method and
        preset, so a new field or option leaves old ids alone. Device, workers and client_timeout never count.
        """
        default = asdict(Config(method=self.method, preset=self.preset).resolved())
        own = asdict(self.resolved())
        differing = {key: value for key, value in own.items() if value != default[key] and key not in UNHASHED}
        options = differing.pop("method_options", {})
        differing |= {f"method_options.{k}": v for k, v in options.items() if v != default["method_options"][k]}
        text = json.dumps({"method": self.method, "preset": self.preset, **differing}, sort_keys=True)
        return f"{self.method}_{self.dataset}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def is_known(values: Mapping[str, Any]) -> bool:
    """Whether method, model and data set of a stored configuration are known in this process."""
    named = ((MODELS, "model"), (DATASETS, "dataset"))
    return values["method"] in METHODS and all(
        name not in values or is_registered(values[name], names) for names, name in named
    )


FIELDS = {item.name for item in fields(Config)}
UNHASHED = {"device", "workers", "client_timeout"}
