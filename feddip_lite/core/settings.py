"""Settings that know their range: one line of declaration gives the default, the check, the help text and the error."""

import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any


@dataclass(frozen=True)
class Check:
    """`accept(value)` returns the value in its canonical type or None; `kind`, `names` and `note` say which."""

    kind: str
    accept: Callable[[Any], Any]
    names: Collection[str] = ()
    note: str = ""

    @property
    def expected(self) -> str:
        """Completes "expected ..."."""
        return self.kind + ", ".join(self.names) + self.note

    def require(self, name: str, value: Any, why: str = "") -> Any:
        """`value` in its canonical type.

        Raises:
            ValueError: one line naming `name`, the value, the range and `why` it is so, and of names the nearest.
        """
        result = self.accept(value)
        if result is None:
            hint = f" ({why})" * bool(why) + nearest(value, self.names)
            raise ValueError(f"{name}: {value!r} is not valid; expected {self.expected}{hint}")
        return result


def integer(low: int, high: int | None = None) -> Check:
    """An integer >= low, and <= high if given."""

    def accept(value):
        fits = isinstance(value, Integral) and not isinstance(value, bool) and value >= low
        return int(value) if fits and (high is None or value <= high) else None

    return Check(f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]", accept)


def real(interval: str) -> Check:
    """A finite number in `interval`, written as in mathematics: "[0, 1)", "(0, inf)"."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))

    def accept(value):
        if not isinstance(value, Real) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
            return None  # NaN, infinity, or an integer that no float can hold
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        return float(value) if above and below else None

    return Check(f"a number in {interval}", accept)


def one_of(*names: str) -> Check:
    """One of these names."""
    return key_of(names)


def key_of(names: Collection[str]) -> Check:
    """One of `names`, which are read at every check, so that a dictionary's keys may grow. None is the name "none", if
    that is one of them: a flag or YAML cannot tell the two apart."""

    def accept(value):
        value = "none" if value is None else value
        return value if isinstance(value, str) and value in names else None

    return Check("one of ", accept, names)


def registered(names: Collection[str]) -> Check:
    """One of `names`, or what something unnamed is called: `own-` and the first 8 hex digits of its fingerprint."""
    return Check("one of ", lambda value: value if is_registered(value, names) else None, names)


def is_registered(value: Any, names: Collection[str]) -> bool:
    """Whether `registered(names)` accepts `value`."""
    return isinstance(value, str) and (value in names or re.fullmatch(r"own-[0-9a-f]{8}", value) is not None)


def flag() -> Check:
    """True or False."""
    return Check("true or false", lambda value: value if isinstance(value, bool) else None)


def setting(default: Any, check: Check, doc: str, *, none: str = ""):
    """A dataclass field with its check and a one-line meaning; `none`, if given, says what None means."""
    if none:
        check = replace(check, note=f", or none ({none})")
    metadata = {"check": check, "doc": doc, "none": bool(none)}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def accepted(item: Field, value: Any) -> Any:
    """`value` in the canonical type of the dataclass field `item`; fields declared without a check take anything.

    Raises as `Check.require` does.
    """
    if "check" not in item.metadata or (value is None and item.metadata["none"]):
        return value
    return item.metadata["check"].require(item.name, value)


def validate(instance: Any) -> None:
    """Check every field of a dataclass instance, storing canonical types. Raises as `Check.require` does."""
    for item in fields(instance):
        object.__setattr__(instance, item.name, accepted(item, getattr(instance, item.name)))


def read_value(given: Any) -> Any:
    """What a flag or an entry of a YAML file means, by one rule: "none" is None, JSON (numbers, objects) is read as
    such, anything else stands as it is; so do the values in lists and mappings."""
    if isinstance(given, Mapping):
        return {key: read_value(value) for key, value in given.items()}
    if isinstance(given, list):
        return [read_value(value) for value in given]
    if not isinstance(given, str):
        return given
    if given.lower() == "none":
        return None
    if re.fullmatch(r"[+-]?(\d+\.|\.\d+|\d+(?=e))(e[+-]?\d+)?", given, re.IGNORECASE):
        return float(given)  # numbers that JSON does not know: .5, 5., +1e3
    try:
        return json.loads(given)
    except json.JSONDecodeError:
        return given


OTHER_NAMES = {
    "gpu": "device", "cuda": "device", "cpu": "device", "learningrate": "lr", "epochs": "local_epochs",
    "e": "local_epochs", "sparsity": "target_sparsity", "density": "target_sparsity", "batch": "batch_size",
    "lambda": "penalty_max", "t": "rounds", "n": "clients", "k": "clients_per_round", "data": "dataset",
    "algorithm": "method", "algo": "method", "strategy": "method", "output": "results", "outdir": "results",
    "codec": "up", "compression": "up", "quantisation": "up", "quantization": "up",
    "threads": "workers", "cores": "workers", "wd": "weight_decay", "dp": "feddp", "dip": "feddip",
    "mnist": "fashionmnist", "resnet": "resnet18",
}  # fmt: skip
"""What others call our settings, methods and data, in plain letters."""


def nearest(value: Any, names) -> str:
    """' (did you mean x?)' for the nearest of `names`, whatever its case, dashes and dots, by OTHER_NAMES too; or the
    empty string."""
    known = {_letters(name): str(name) for name in reversed([*names])}
    text = _letters(value)
    other = _letters(OTHER_NAMES.get(text, ""))
    match = [each for each in (text, other) if each in known] or get_close_matches(text, known, n=1, cutoff=0.6)
    return f" (did you mean {known[match[0]]}?)" if match and text else ""


def _letters(name: Any) -> str:
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def refuse_unknown(given: Iterable[str], known: Collection[str], what: str) -> None:
    """Raise ValueError naming the first of `given` that is not in `known`, and the nearest that is."""
    for key in given:
        if key not in known:
            listing = ", ".join(known) or "none"
            raise ValueError(f"{what}: unknown name {key!r}{nearest(key, known)}; known: {listing}")
