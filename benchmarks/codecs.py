"""What it costs to code values, at AlexNet's size: a dense message, and one of the weights that a mask of sparsity 0.9
keeps.

Values are an initialised AlexNet's weights, of which a random tenth is kept. In a round the server codes once for each
client and every client once; the mask is coded apart (`python -m benchmarks masks`).
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from feddip_lite.config import Config
from feddip_lite.core.codecs import codec_of
from feddip_lite.records.provenance import provenance
from feddip_lite.train.run import running

from .masks import untrained

CODECS = ("fp16", "qsgd:8:512", "qsgd:4:512", "ternary:512", "topk:0.01", "sign")
SPARSITIES = (0.0, 0.9)
MEASURES = ("encode_s", "encode_cpu_s", "decode_s", "decode_cpu_s")


def clocks() -> tuple[float, float]:
    """Seconds that have passed, and those of a core that this process had, which a busy machine does not lengthen."""
    return time.perf_counter(), time.process_time()


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, help="times each codec")
    parser.add_argument("--codecs", nargs="*", default=CODECS, help="by name")


def record(given: argparse.Namespace) -> dict:
    (_, weights), rows = untrained(), []
    draw = torch.Generator().manual_seed(1)
    with running(Config()):
        for sparsity in SPARSITIES:
            values = weights if not sparsity else weights[torch.rand(len(weights), generator=draw) >= sparsity]
            for name in given.codecs:
                codec, times = codec_of(name), []
                for repeat in range(given.repeats):
                    moments = [clocks()]
                    data = codec.encode(values, np.random.default_rng(repeat))
                    moments.append(clocks())
                    codec.decode(data, len(values))
                    times.append(np.diff([*moments, clocks()], axis=0).reshape(-1))
                seconds = (float(statistics.median(each)) for each in zip(*times, strict=True))
                row = {"codec": name, "sparsity": sparsity, "numbers": len(values), "bytes": len(data)}
                rows.append(row | dict(zip(MEASURES, seconds, strict=True)))
                print(rows[-1], flush=True)
    return {"rows": rows, "provenance": provenance(torch.device("cpu"), 1)}
