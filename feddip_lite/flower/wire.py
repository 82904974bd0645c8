"""What crosses the network on Flower, and nothing else: the same `encode()`d bytes as everywhere, and a few words.

    server -> client   words: round, token (which memory the client holds)        payload: the offer
    client -> server   words: round, run, client, samples, loss, received, token  payload: the reply
                       or the one word `failure`
    server -> client   words: round                                               payload: a question (`inquiry.py`)
    client -> server   words: round, run, client, received                        payload: the answer

Read next: `server.py` (the server's side), `client.py` (the client's).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from ..core.flat import Layout
from ..core.message import Message, decode

TELL = "train.tell"  # the type of messages that hold questions
TOKEN = "token"  # names a memory that a client holds: its round and SHA-256; empty for none
_WORDS, _PAYLOAD, _STYPE = "words", "payload", "feddip_lite.message"


def pack(words: dict, payload: bytes | None = None) -> RecordDict:
    """The content of a Flower message. A payload travels as an array, because Flower sends only these in pieces."""
    content = RecordDict({_WORDS: ConfigRecord(words)})
    if payload is not None:
        content[_PAYLOAD] = ArrayRecord({_PAYLOAD: Array("uint8", (len(payload),), _STYPE, payload)})
    return content


def unpack(content: RecordDict) -> tuple[dict, bytes]:
    """(words, payload) of what `pack` made.

    Raises:
        ValueError: it was not made by `pack`.
    """
    try:
        payload = content[_PAYLOAD][_PAYLOAD].data if _PAYLOAD in content else b""
        return dict(content[_WORDS]), payload
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a message of this application ({type(error).__name__}: {error})") from error


def typed(words: dict, name: str, kind: type):
    """The word `name`. Raises ValueError if it is not there or not of this very type."""
    if type(words.get(name)) is not kind:
        raise ValueError(f"{name}: {words.get(name)!r} is not valid; expected {kind.__name__}")
    return words[name]


def received(payload: bytes, layout: Layout, device: torch.device) -> Message:
    """`decode`, with its refusals; all parts on `device`."""
    message = decode(payload, layout)
    values, mask = (None if part is None else part.to(device) for part in (message.values, message.mask))
    return replace(message, values=values, mask=mask, extras={k: v.to(device) for k, v in message.extras.items()})
