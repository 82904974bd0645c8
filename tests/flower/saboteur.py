"""Data of a supernode that, when it comes to answering, does harm. Each function returns the node's own images."""

import os
import signal
import time

from feddip_lite.core.message import encode
from feddip_lite.data.own import read_images
from feddip_lite.flower import client as flower_client


def _with(answer):
    def load(folder):
        flower_client.encode = answer
        return read_images(folder)

    return load


def _fail(message):
    raise MemoryError("no room")


raises = _with(_fail)
damages = _with(lambda message: encode(message)[:-1])
dies = _with(lambda message: os.kill(os.getpid(), signal.SIGKILL))
stalls = _with(lambda message: time.sleep(3600))
