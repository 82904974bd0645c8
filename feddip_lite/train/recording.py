"""What a run leaves in a folder: history, circumstances, last mask and model; and how that is found again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from torch import Tensor

from ..config import Config
from ..core.errors import Diverged
from ..core.flat import Layout, sha256_of
from ..core.sparsity import kept_per_layer
from ..core.state import ServerState
from ..records.kept_model import model_file
from ..records.provenance import provenance
from ..records.store import read_run, save_run
from .identity import fingerprints, refuse_other
from .observe import Run


@dataclass(frozen=True)
class Recording:
    """The usual record of a run, in `folder`: `<run_id>.csv`, `.json`, `.mask` and `.safetensors`."""

    folder: Path

    def stored(self, config: Config) -> pd.DataFrame | None:
        """The history of a run that is recorded here, or None. Raises Diverged if it is recorded as diverged."""
        stored = read_run(self.folder, config.run_id)
        if stored is None:
            return None
        history, record = stored
        if broken := record.get("diverged"):
            path = self.folder / f"{config.run_id}.json"
            remedy = f"delete {path} to go on from its last checkpoint, if there is one, or run again"
            raise Diverged(f"{config.run_id} diverged when it was recorded: {broken['reason']}; {remedy}")
        return history

    def refuse_other(self, config: Config) -> None:
        """Raise ValueError if the record of this configuration came from other data, or from another model or method of
        the same name."""
        refuse_other(self.folder / f"{config.run_id}.json", config, read_run(self.folder, config.run_id)[1])

    def save(self, run: Run, diverged: Mapping | None = None) -> None:
        """Record a run that has ended; one that broke down has `diverged`, {round, reason}, and leaves no model."""
        layout, state = run.method.layout, run.state
        if diverged:
            left = {"diverged": diverged}
        else:
            model = model_file(layout, state.weights, state.mask, state.buffers)
            left = {"layers": layers_of(layout, state), "mask": state.mask, "model": model}
        save_run(self.folder, run.config, run.history(), facts_of(run), run.progress.skipped, **left)


def facts_of(run: Run) -> dict:
    """A run's provenance: versions and hardware, data, checksums of its state, time."""
    data, state, clients = run.clients.data, run.state, run.clients
    own = {name: sha256 for name, sha256 in fingerprints(run.config, data).items() if name != "data"}
    about = {"classes": data.classes, "image_shape": list(data.train_images.shape[1:])}
    if data.variant == "own":
        about |= {"scale": data.scale, "mean": data.mean, "std": data.std, "class_names": data.class_names}
    return provenance(
        state.weights.device,
        clients.workers.slots,
        precision=run.config.precision,
        data={"source": data.source, "variant": data.variant, "sha256": data.sha256, **about},
        **({"own": own} if own else {}),
        weights={"all": run.method.layout.size, "prunable": run.method.layout.prunable},
        **clients.facts(),
        state_sha256={
            **{name: sha256_of({name: getattr(state, name)}) for name in ("weights", "buffers", "mask")},
            "memory": sha256_of(state.memory),
            "clients": {client: clients.digest(memory) for client, memory in sorted(state.memories.items())},
            **{
                name: _sha256_by_client(known)
                for name, known in {"estimates": state.estimates, "held": state.held}.items()
                if known
            },
        },
        wall_seconds=run.progress.wall_seconds,
    )


def _sha256_by_client(tensors: Mapping[int, Tensor]) -> dict[int, str]:
    return {client: sha256_of({"": tensor}) for client, tensor in sorted(tensors.items())}


def layers_of(layout: Layout, state: ServerState) -> list[dict]:
    """{name, shape, kept} of each prunable tensor: how many of its weights are not zero in the sparse model w*m."""
    kept = kept_per_layer(layout, state.weights[: layout.prunable] * state.mask != 0)
    slots = zip(layout.prunable_slots, kept, strict=True)
    return [{"name": slot.name, "shape": list(slot.shape), "kept": count} for slot, count in slots]
