"""The methods by name. A new one is a class in a file of its own and a line here (or `METHODS["name"] = Class`)."""

from collections.abc import Mapping
from dataclasses import fields

from ..core.settings import accepted, key_of, refuse_unknown
from .base import Method
from .fedavg import FedAvg, FedProx
from .feddip import FedDIP, FedDP
from .feddst import FedDST
from .fedlp import FedLP
from .fedmap import FedMap
from .fedsparsify import FedSparsifyGlobal, FedSparsifyLocal
from .fedtiny import FedTiny
from .fedx import FedX
from .mpfl import MPFL
from .prunefl import PruneFL
from .prunetrain import PruneTrain
from .snip import SNIP

METHODS: dict[str, type[Method]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "feddp": FedDP,
    "feddip": FedDIP,
    "feddst": FedDST,
    "prunefl": PruneFL,
    "snip": SNIP,
    "prunetrain": PruneTrain,
    "fedsparsify_global": FedSparsifyGlobal,
    "fedsparsify_local": FedSparsifyLocal,
    "mpfl": MPFL,
    "fedmap": FedMap,
    "fedlp": FedLP,
    "fedx": FedX,
    "fedtiny": FedTiny,
}


def settings_of(name: str, preset: str) -> dict[str, object]:
    """Every hyper-parameter of a method with its value under `preset`.

    Raises:
        ValueError: the method has no such preset.
    """
    method = METHODS[name]
    key_of(method.presets).require("preset", preset, f"method {name}")
    context = {item.name for item in fields(Method)}
    own = {item.name: item.default for item in fields(method) if item.name not in context}
    return own | dict(method.presets[preset])


def resolved_options(name: str, preset: str, options: Mapping[str, object], shared: set[str]) -> dict[str, object]:
    """`method_options` completed by the preset's values, each checked; `shared` are the names that Config has.

    Raises:
        ValueError: an unknown option, or a value outside its range.
    """
    own = {key: value for key, value in settings_of(name, preset).items() if key not in shared}
    refuse_unknown(options, own, f"method_options of {name}")
    checks = {item.name: item for item in fields(METHODS[name])}
    return {key: accepted(checks[key], options.get(key, value)) for key, value in own.items()}
