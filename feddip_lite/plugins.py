"""Modules of one's own that register models, data or methods, for processes that only have a command line."""

import os
from collections.abc import Iterable
from importlib import import_module

VARIABLE = "FEDDIP_PLUGINS"
"""Names of modules, with commas between; processes that a command starts, such as Flower's, inherit it."""


def load_plugins(names: Iterable[str] = ()) -> None:
    """Import the modules `names` and those of the environment variable FEDDIP_PLUGINS, and leave all of them there.

    Raises:
        ValueError: one cannot be imported; names it and the reason.
    """
    wanted = [*filter(None, os.environ.get(VARIABLE, "").split(",")), *names]
    for name in dict.fromkeys(wanted):
        try:
            import_module(name)
        except Exception as error:  # whatever a module of one's own may raise
            raise ValueError(f"plugin {name!r}: {type(error).__name__}: {error}") from error
    if wanted:
        os.environ[VARIABLE] = ",".join(dict.fromkeys(wanted))
