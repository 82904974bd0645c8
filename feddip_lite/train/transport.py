"""How values travel: between a method's hooks and the wire, the same for every method and wherever the clients are.

    server   C_down(v)                                        v = what the method offers, float32
    client   starts at v' = what arrived;  sends C_up(w_n - v'), under a feedback C_up of that and its memory
    server   reads v + what arrived, and gives it to the method as the reply

What goes up is the difference to what came down: it is small, so that a code of few bits loses little of it, and the
server adds it to its own float32 values, so that what was lost on the way down never enters its master. A weight that
did not travel down counts as 0, at both ends. Only values are coded: statistics and scores travel as ever, masks too
but for `mask_cache.py`, and so do replies without values. Coded values are extras of the message, called by part and
codec ("values qsgd:8:512"); so `encode`, `num_bytes` and the network know nothing of codecs, and a message says what
is in it.

    ef     p = w_n - v' + e;  sends C(p);  e <- p - C(p)                    e (n,), the client's
    ef21   p = w_n - v' - g;  sends C(p);  g <- g + C(p), which stands for w_n - v'     g (n,), kept at both ends

Both remember every coordinate of w, whatever travels in a round. Sources: Stich et al., NeurIPS 2018 (arXiv 1809.07599)
and, on the local change, Li and Li, ICML 2023 (Fed-EF); Richtarik et al., NeurIPS 2021 (arXiv 2106.05203). FedPAQ:
Reisizadeh et al., AISTATS 2020 (arXiv 1909.13014). With fp32 both ways nothing here touches anything.
"""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..core.codecs import Codec, Fp32
from ..core.errors import Diverged
from ..core.flat import kept_indices
from ..core.message import Message
from ..core.seeds import numpy_generator
from ..core.state import EMPTY, Memory
from ..methods.base import Method
from .mask_cache import HELD, told, whole

DOWN, UP = 0, 1  # the last number of the address of what is drawn
FEEDBACK = "codec feedback"  # e or g in a client's memory, beside what the method keeps there
_VALUES, _PRUNED = "values ", "pruned "
_COUNT = struct.Struct("<I")  # numbers, before their code


def is_coded(method: Method) -> bool:
    """Whether values travel otherwise than as float32, one way or the other."""
    codecs = method.down, method.up, method.up_pruned or method.up
    return not all(isinstance(codec, Fp32) for codec in codecs)


def sent(method: Method, offer: Message, t: int, client: int, held: Tensor | None = None) -> Message:
    """The form in which an offer goes down. `held`: the mask that the client holds, if the method has a `mask_cache`.

    Raises:
        Diverged: its values are not finite.
    """
    offer = told(offer, held)
    if offer.values is None or isinstance(method.down, Fp32):
        return offer
    draw = numpy_generator(method.seed, "codec", t, client, DOWN)
    return _with(offer, {_VALUES: (method.down, offer.values)}, draw)


def received(method: Method, message: Message, device: torch.device, memory: Memory = EMPTY) -> Message:
    """An offer as a client with this memory reads it: with the values that arrived, on `device`.

    Raises:
        ValueError: its code is not one of `method.down`, or damaged; or its mask is told over one that the client does
            not hold.
    """
    message = whole(message, memory, method.layout.prunable, device)
    if isinstance(method.down, Fp32):
        return message
    found, rest = _read(message, {_VALUES: method.down}, method.layout.size, device, "the offer")
    return replace(rest, values=found.get(_VALUES))


def answered(
    method: Method, reply: Message, offer: Message, memory: Memory, t: int, client: int
) -> tuple[Message, Memory]:
    """(the form in which a reply goes up, what the codec has its client remember). `offer` as it was `received`.

    Raises:
        Diverged: its values are not finite.
    """
    if not is_coded(method) or not isinstance(reply, Message) or reply.values is None:
        return reply, feedback_part(memory)
    places = method.places(reply, offer.mask)
    change, kept = reply.values - _spread(method, offer)[places], memory.get(FEEDBACK)
    if method.up_feedback != "none":
        kept = change.new_zeros(method.layout.size) if kept is None else kept.clone()
        change = change + kept[places] if method.up_feedback == "ef" else change - kept[places]
    parts, draw = _parts(method, change, offer.mask), numpy_generator(method.seed, "codec", t, client, UP)
    message = _with(reply, parts, draw)
    if method.up_feedback == "none":
        return message, {}
    arrived = _change_in(method, message, offer.mask, change.device)[0]
    kept[places] = change - arrived if method.up_feedback == "ef" else kept[places] + arrived
    return message, {FEEDBACK: kept}


def taken(method: Method, message: Message, offer: Message, estimate: Tensor | None) -> tuple[Message, Tensor | None]:
    """(a reply as its method reads it, the new estimate). `offer` as the method made it, before it was `sent`;
    `estimate` (n,) is g of this client under "ef21", None for 0.

    Raises:
        ValueError: its values are coded otherwise than `method` says, or damaged; one line.
        Diverged: they are beyond the range of float32.
    """
    if not is_coded(method):
        return message, None
    device = torch.device("cpu") if offer.values is None else offer.values.device
    change, reply = _change_in(method, message, offer.mask, device)
    if change is None:
        return reply, estimate
    reply = replace(reply, values=change)
    places = method.places(reply, offer.mask)
    if method.up_feedback == "ef21":
        estimate = change.new_zeros(method.layout.size) if estimate is None else estimate.clone()
        estimate[places] = change = estimate[places] + change
    values = _spread(method, offer)[places] + change
    if not values.isfinite().all():
        raise Diverged("the reply's values: infinite, added to those that were sent")
    return replace(reply, values=values), estimate


def feedback_part(memory: Memory) -> Memory:
    """What of a client's memory is the codec's."""
    return {FEEDBACK: memory[FEEDBACK]} if FEEDBACK in memory else {}


def methods_part(memory: Memory) -> Memory:
    """What of a client's memory is the method's."""
    ours = {FEEDBACK, HELD} & set(memory)
    return {name: tensor for name, tensor in memory.items() if name not in ours} if ours else memory


def _spread(method: Method, offer: Message) -> Tensor:
    """The values of an offer at their places in w, 0 elsewhere: (n,)."""
    if offer.values is None:
        raise ValueError("the offer has no values, and the reply's are coded as the difference to them")
    places = method.places(offer, offer.mask)
    if isinstance(places, slice):
        return offer.values
    result = offer.values.new_zeros(method.layout.size)
    result[places] = offer.values
    return result


def _parts(method: Method, change: Tensor, mask: Tensor | None) -> dict[str, tuple[Codec, Tensor]]:
    """What of a change is coded how. A dense one under a mask has two parts if `up_pruned` says so."""
    if method.up_pruned is None or mask is None or change.numel() != method.layout.size:
        return {_VALUES: (method.up, change)}
    pruned = change.index_select(0, kept_indices(~mask))
    return {_VALUES: (method.up, method.layout.pack(change, mask)), _PRUNED: (method.up_pruned, pruned)}


def _change_in(
    method: Method, message: Message, mask: Tensor | None, device: torch.device
) -> tuple[Tensor | None, Message]:
    """(the change that a reply holds, None without one, the reply without it): the inverse of `_parts`."""
    codecs = {_VALUES: method.up, **({} if method.up_pruned is None else {_PRUNED: method.up_pruned})}
    found, rest = _read(message, codecs, method.layout.size, device, "the reply")
    change, pruned = found.get(_VALUES), found.get(_PRUNED)
    if pruned is None:
        return change, rest
    if change is None or mask is None or len(pruned) != int((~mask).count_nonzero()):
        raise ValueError(f"the reply's pruned values: {len(pruned)} of them; expected as many as its offer prunes")
    result = method.layout.unpack(change, mask)
    result[kept_indices(~mask)] = pruned
    return result, rest


def _with(message: Message, parts: dict[str, tuple[Codec, Tensor]], draw: np.random.Generator) -> Message:
    """`message` with coded parts in place of its values; what is drawn is drawn in their order."""
    coded = {}
    for part, (codec, vector) in parts.items():
        data = bytearray(_COUNT.pack(vector.numel()) + codec.encode(vector, draw))
        coded[part + codec.name] = torch.frombuffer(data, dtype=torch.uint8)
    return Message(None, message.mask, {**message.extras, **coded})


def _read(
    message: Message, codecs: dict[str, Codec], limit: int, device: torch.device, what: str
) -> tuple[dict[str, Tensor], Message]:
    """(the decoded parts by name, of at most `limit` numbers each; the message without them)."""
    found, rest = {}, {}
    asked = " and ".join(repr(part + codec.name) for part, codec in codecs.items())
    for name, tensor in message.extras.items():
        part, codec = name[: len(_VALUES)], codecs.get(name[: len(_VALUES)])
        if part not in (_VALUES, _PRUNED):
            rest[name] = tensor
            continue
        if codec is None or name != part + codec.name or tensor.dtype != torch.uint8:
            raise ValueError(f"{what} holds {name!r}; expected {asked}")
        data = memoryview(tensor.cpu().numpy()).cast("B")
        count = _COUNT.unpack_from(data)[0] if len(data) >= _COUNT.size else limit + 1
        if count > limit:
            raise ValueError(f"{what}'s {name!r}: more than {limit} numbers, or cut")
        try:
            found[part] = codec.decode(data[_COUNT.size :], count).to(device)
        except ValueError as error:
            raise ValueError(f"{what}'s {name!r}: {error}") from None
    if message.values is not None:
        raise ValueError(f"{what}'s values are not coded; expected {asked}")
    return found, Message(None, message.mask, rest)
