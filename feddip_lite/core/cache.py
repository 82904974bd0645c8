"""`once_per_tensor`: remember what was computed of a tensor for as long as that tensor lives unchanged."""

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Result = TypeVar("Result")


def once_per_tensor(function: Callable[[Tensor], Result]) -> Callable[[Tensor], Result]:
    """Cache `function(tensor)` by the tensor's identity and version, so that a change in place is noticed.

    One mask serves a whole cohort for several rounds. What is asked of it (its coordinates, its code, its count) takes
    long for millions of weights, and waits for the device on a GPU; so it is asked once.
    """
    known = WeakIdKeyDictionary()

    @wraps(function)
    def remembered(tensor: Tensor) -> Result:
        version = None if tensor.is_inference() else tensor._version
        entry = known.get(tensor)
        if entry is None or version is None or entry[0] != version:
            entry = version, function(tensor)
            known[tensor] = entry
        return entry[1]

    return remembered
