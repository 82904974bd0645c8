"""Do fresh runs agree with the recorded ones? `python tools/compare.py --recorded results/lite --fresh build/results`

Runs are grouped by configuration, seeds and machine settings aside. Where a recorded group has three or more seeds,
each fresh run of that group must lie inside the 95 % interval of one new observation (Student t over seeds, mean +-
t s sqrt(1 + 1/n)); with fewer there is no verdict, only the values. Accuracy is the mean of the last ten evaluated
rounds. Exit code: 0 all inside or without verdict, 1 any outside or nothing to compare, 2 an unreadable file or folder.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from scipy import stats

from feddip_lite.config import UNHASHED
from feddip_lite.records.store import HEADLINE_ROWS, config_of, read_run

CONFIDENCE = 0.95
MIN_SEEDS = 3
ROUNDING = 1e-9  # runs that agree to the bit have an interval of width zero; their own value must count as inside
NOT_THE_EXPERIMENT = UNHASHED | {"seed"}  # who ran it where, not what was run

Run = tuple[str, int, float, dict]  # run id, seed, accuracy, and what it came from
Groups = dict[str, list[Run]]


def load(folder: Path) -> Groups:
    """All finished runs in `folder`, grouped by their configuration (as canonical JSON) without seed and machine.

    Raises:
        ValueError: no such folder, a damaged record, or one of something else than a run; names it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    groups: Groups = {}
    for path in sorted(folder.glob("*.json")):
        _, run = read_run(folder, path.stem)
        config = {key: value for key, value in config_of(run).items() if key not in NOT_THE_EXPERIMENT}
        if "final" not in run:
            raise ValueError(f"{path}: no record of `run` or `sweep`, which alone have a final accuracy to compare")
        accuracy = run["final"][f"mean_last_{HEADLINE_ROWS}"]["accuracy"]
        entry = (run["run_id"], run["config"]["seed"], math.nan if accuracy is None else accuracy, came_from(run))
        groups.setdefault(json.dumps(config, sort_keys=True), []).append(entry)
    return {key: sorted(runs, key=lambda run: run[1]) for key, runs in groups.items()}


def came_from(run: dict) -> dict[str, str]:
    """What made a run's numbers, beside its configuration: variant and checksum of its data, its own model or method,
    and torch."""
    facts = run["provenance"]
    data, own = facts.get("data", {}), facts.get("own", {})
    words = f"{data.get('variant', '?')} {data.get('sha256', '?')[:12]}"
    return {"data": words, **{name: sha256[:12] for name, sha256 in own.items()}, "torch": facts.get("torch", "?")}


def interval(accuracies: list[float]) -> tuple[float, float] | None:
    """The 95 % prediction interval of one new observation, or None with fewer than three values. NaN, a run that
    diverged, is none."""
    accuracies = [accuracy for accuracy in accuracies if not math.isnan(accuracy)]
    n = len(accuracies)
    if n < MIN_SEEDS:
        return None
    mean = math.fsum(accuracies) / n
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in accuracies) / (n - 1))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * spread * math.sqrt(1 + 1 / n) + ROUNDING
    return mean - reach, mean + reach


def title(key: str) -> str:
    """What a reader calls a group: method and preset, data and partition, model and rounds."""
    config = json.loads(key)
    fields = ("method", "preset", "dataset", "partition", "model", "rounds")
    return " ".join(str(config[field]) for field in fields if field in config)


def compare(recorded: Groups, fresh: Groups) -> tuple[list[str], int, int]:
    """One line per fresh run and per gap; returns (lines, runs compared, runs outside)."""
    lines, compared, outside = [], 0, 0
    for key in sorted(recorded.keys() & fresh.keys(), key=title):
        bounds = interval([accuracy for _, _, accuracy, _ in recorded[key]])
        whole = [accuracy for _, _, accuracy, _ in recorded[key] if not math.isnan(accuracy)]
        broken = {seed for _, seed, accuracy, _ in recorded[key] if math.isnan(accuracy)}
        mean = math.fsum(whole) / len(whole) if whole else math.nan
        lines.append(f"{title(key)}: recorded {', '.join(f'{accuracy:.4f}' for _, _, accuracy, _ in recorded[key])}")
        for run_id, seed, accuracy, facts in fresh[key]:
            compared += 1
            verdict = f"no verdict, n = {len(whole)}"
            if math.isnan(accuracy) and seed in broken:
                verdict = "diverged, as recorded"
            elif bounds:
                inside = bounds[0] <= accuracy <= bounds[1]  # False for NaN, a run that broke down
                outside += not inside
                verdict = f"{'inside' if inside else 'OUTSIDE'} [{bounds[0]:.4f}, {bounds[1]:.4f}]"
            lines.append(f"  {run_id} seed {seed}: {accuracy:.4f}, {accuracy - mean:+.4f} against the mean, {verdict}")
            for name, here in facts.items():
                there = sorted({each.get(name, "none") for *_, each in recorded[key]})
                if there != [here]:
                    lines.append(f"    other {name}: {here}; recorded {', '.join(there)}")
    known = {run_id for runs in fresh.values() for run_id, *_ in runs}
    lines += [f"recorded only: {name}" for name in _missing(recorded, known)]
    known = {run_id for runs in recorded.values() for run_id, *_ in runs}
    lines += [f"fresh only: {name}" for name in _missing(fresh, known)]
    return lines, compared, outside


def _missing(groups: Groups, known: set[str]) -> list[str]:
    return [
        f"{title(key)} seed {seed} ({run_id})"
        for key, runs in sorted(groups.items(), key=lambda item: title(item[0]))
        for run_id, seed, *_ in runs
        if run_id not in known
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare fresh runs with recorded ones.")
    parser.add_argument("--recorded", type=Path, required=True, metavar="DIR")
    parser.add_argument("--fresh", type=Path, required=True, metavar="DIR")
    options = parser.parse_args(arguments)
    try:
        lines, compared, outside = compare(load(options.recorded), load(options.fresh))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(lines))
    if not compared:
        print(f"nothing to compare: no run in {options.fresh} has the configuration of one in {options.recorded}")
        return 1
    print(f"{compared} runs compared, {outside} outside the recorded interval")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
