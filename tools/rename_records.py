"""Give recorded runs the id that follows from their configuration: `python tools/rename_records.py results`

A run id hashes what differs from the defaults (`Config.run_id`), so a changed default renames what was recorded before
it. The stored configuration says what a run is; this gives its files (CSV, JSON sealed anew, mask, model) the id that
this configuration has now, in every folder below the one given. A record whose id is right is left alone, so a second
call changes nothing. One line per renamed record. Exit code: 0 done, 2 a damaged record, or an id that is taken.
"""

import argparse
import json
import sys
from pathlib import Path

from feddip_lite.config import Config
from feddip_lite.results import atomic_write, read_record, sealed

RECORD_FILES = (".csv", ".mask", ".safetensors")


def explicit(config: dict) -> dict:
    """A stored configuration with the settings that are younger than it, where it ran under another value than the
    default of today: a shared mask at the start was spread over the prunable tensors (docs/deviations.md D7)."""
    options = config["method_options"]
    if options.get("erk") == "shared" and config["model"] == "resnet18":
        options = {"erk_over": "prunable", **options}
    return {**config, "method_options": options}


def rename(path: Path) -> str | None:
    """Rename the record whose JSON is `path`, if its id is not the one of its configuration. Returns the new id.

    Raises:
        ValueError: the record is damaged, or its right id is taken by another.
    """
    record = read_record(path)
    config = explicit(record["config"])
    run_id = Config.from_dict(config).run_id
    if run_id == record["run_id"]:
        return None
    new = path.with_name(f"{run_id}.json")
    if new.exists():
        raise ValueError(f"{path}: its configuration has the id {run_id}, which is taken; delete one of the two")
    text = json.dumps({**record, "run_id": run_id, "config": config}, indent=1).removesuffix("\n}").encode()
    for suffix in RECORD_FILES:
        if (old := path.with_suffix(suffix)).exists():
            atomic_write(new.with_suffix(suffix), old.read_bytes())
    atomic_write(new, sealed(text))  # last, as when it was recorded: from here on the run is there under its new id
    for suffix in (".json", *RECORD_FILES):
        path.with_suffix(suffix).unlink(missing_ok=True)
    return run_id


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="such as results")
    folder = parser.parse_args(arguments).folder
    try:
        for path in sorted(folder.rglob("*.json")):
            if run_id := rename(path):
                print(f"{path.relative_to(folder)} -> {run_id}")
    except (ValueError, OSError) as error:
        print(f"tools/rename_records.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
