"""The methods by name. A new one is a class in a file of its own and a line here (or `METHODS["name"] = Class`)."""

from collections.abc import Mapping
from dataclasses import Field, fields

from ..core.settings import accepted, key_of, refuse_unknown
from ..core.state import EMPTY
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


def options_of(name: str) -> dict[str, Field]:
    """The settings of a method that are its own, with their checks."""
    context = {item.name for item in fields(Method)}
    return {item.name: item for item in fields(METHODS[name]) if item.name not in context}


def options_of_all() -> list[str]:
    """A line for each method: its name, what it is called, its presets."""
    width = max(map(len, METHODS))
    return [
        f"{name:{width}}  {method.about.title}; presets {', '.join(method.presets)}" for name, method in METHODS.items()
    ]


def options_in_words(name: str, sources: Mapping[str, Mapping] = EMPTY) -> list[str]:
    """What a method is, and a line for each of its settings: value by preset, range, meaning, and the source of its
    value (`sources`, the content of params/methods.yaml).

    Raises:
        ValueError: no such method.
    """
    key_of(METHODS).require("method", name)
    method, lines = METHODS[name], []
    for option, item in options_of(name).items():
        values = {preset: settings_of(name, preset)[option] for preset in method.presets}
        usual = values.pop("paper", item.default)
        others = ", ".join(f"{preset}: {value}" for preset, value in values.items() if value != usual)
        check = item.metadata.get("check")
        said = [f"{item.metadata['doc']}; {check.expected}"] if check else ["as --" + option.replace("_", "-")]
        source = sources.get(name, {}).get("paper", {}).get(option)
        said += [f"source: {source[1]}"] if source else []
        beside = f" ({others})" if others else ""
        lines.append(f"  {option} = {usual}{beside}: {'; '.join(said)}")
    about = method.about
    return [f"{name}: {about.title}, {about.family}. Source: {about.source}", *(lines or ["  no settings of its own"])]


def settings_of(name: str, preset: str) -> dict[str, object]:
    """Every hyper-parameter of a method with its value under `preset`.

    Raises:
        ValueError: the method has no such preset.
    """
    method = METHODS[name]
    key_of(method.presets).require("preset", preset, f"method {name}")
    own = {option: item.default for option, item in options_of(name).items()}
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
