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

from feddip_lite.records.store import atomic_write, read_record, right_id, sealed

RECORD_FILES = (".csv", ".mask", ".safetensors")


def explicit(config: dict) -> dict:
    """A stored configuration with the settings that are younger than it, where it ran under another value than the
    default of today: masks at the start were spread over the prunable tensors (docs/deviations.md D7)."""
    options = config["method_options"]
    if "erk" in options and config["model"] == "resnet18":
        options = {"erk_over": "prunable", **options}
    return {**config, "method_options": options}


def rename(path: Path) -> str | None:
    """Rename the record whose JSON is `path`. Returns the new id, or None if it has the right one.

    Raises:
        ValueError: the record is damaged, or of a version whose settings are gone.
        FileExistsError: its right id is taken by another record.
    """
    record = read_record(path)
    renamed = {**record, "config": explicit(record["config"])}
    renamed["run_id"] = run_id = right_id(path, renamed)
    if run_id == record["run_id"]:
        return None
    new = path.with_name(f"{run_id}.json")
    if new.exists() and read_record(new) != renamed:  # if it is the same, an earlier call was cut off before its end
        raise FileExistsError(f"{path}: its configuration has the id {run_id}, which is taken; delete one of the two")
    for suffix in RECORD_FILES:
        if (old := path.with_suffix(suffix)).exists():
            atomic_write(new.with_suffix(suffix), old.read_bytes())
    text = json.dumps(renamed, indent=1).removesuffix("\n}").encode()
    atomic_write(new, sealed(text))  # last, as when it was recorded: from here on the run is there under its new id
    for suffix in (".json", *RECORD_FILES):
        path.with_suffix(suffix).unlink(missing_ok=True)
    return run_id


def rename_all(folder: Path) -> None:
    """Rename what lies below `folder`, a printed line each; again as long as something moved, since an id may be taken
    by a record that is to have another itself. Raises as `rename` does."""
    moved, taken = True, None
    while moved:
        moved, taken = False, None
        for path in sorted(folder.rglob("*.json")):
            try:
                run_id = rename(path)
            except FileExistsError as error:
                taken = taken or error
                continue
            if run_id:
                moved = True
                print(f"{path.relative_to(folder)} -> {run_id}")
    if taken:
        raise taken


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="such as results")
    folder = parser.parse_args(arguments).folder
    try:
        rename_all(folder)
    except (ValueError, OSError) as error:
        print(f"tools/rename_records.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
