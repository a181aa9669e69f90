"""The single edits of docs/controls.md:

    python -m tools.single_edits [SWEEP.yaml ...]     # default: all of results/controls

Every edit of ``tiny[100:300]`` (or batch of them, where the sweep has batches) is proposed for the unedited
model, trimmed by each of the sweep's regularizers, applied, measured, and taken back. The means over edits
go to ``NAME-single.csv`` beside the sweep, with half of their 95% intervals of Student's t; sweeps that have
that file are left out.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from harness_rect.edits import load_edits
from harness_rect.experiments import masks
from harness_rect.experiments.sweep.checked import load_model, make_session
from harness_rect.experiments.sweep.plan import make_plan, read_config
from harness_rect.io.progress import progress_bar
from tools.controls import FOLDER, SINGLE, interval, write_rows

EDITS = "tiny[100:300]"
MEASURED = ("reliability", "generalization", "locality")
LEFT = ("norm_kept", "kept", "kept_small_weight", "overlap", "rank_one_residual")


def single_edits(sweep: Path, edits: str = EDITS) -> list[dict[str, object]]:
    """One row for each regularizer of a sweep: means over its edits, and of what is left over weights too."""
    config = read_config(sweep)
    update = {"edits": edits, "checkpoints": [len(load_edits(edits))], "orders": 1}
    plan = make_plan(config.model_copy(update=update), str(sweep))
    session = make_session(load_model(config.models[0], config), plan.trajectories[0])
    with progress_bar() as progress:
        bar = progress.add_task(sweep.stem, total=len(session.edits))
        found = masks.rows(
            session,
            [trajectory.config.regularizer for trajectory in plan.trajectories],
            lambda done: progress.update(bar, completed=done),
        )
    groups = defaultdict(list)
    for row in found:
        groups[row["regularizer"], row.get("keep")].append(row)
    rows = []
    for (regularizer, keep), of in groups.items():
        row = {"regularizer": regularizer, "keep": keep, "edits": len(session.edits)}
        for name in (*MEASURED, *LEFT):
            batches = defaultdict(list)
            for one in of:
                if one.get(name) is not None:
                    batches[one["batch"]].append(one[name])
            means = [sum(values) / len(values) for values in batches.values()]
            row[name], row[f"{name} +-"] = interval(means) if means else (None, None)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweeps", type=Path, nargs="*", default=sorted(FOLDER.glob("*.yaml")))
    for sweep in parser.parse_args().sweeps:
        target = sweep.with_name(f"{sweep.stem}{SINGLE}.csv")
        if not target.exists():
            write_rows(target, single_edits(sweep))
            print(target)


if __name__ == "__main__":
    main()
