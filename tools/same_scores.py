"""Whether two folders of lm-eval's results hold the same scores to the last digit; exits with 1 if not.

    python -m tools.same_scores FOLDER OTHER

CI runs it on results of different releases of lm-eval and transformers.
"""

from __future__ import annotations

import sys

from harness_rect.experiments.results import Results, load, newest


def scores(results: Results) -> dict[tuple[str, str], object]:
    """(task or group, metric) -> value and standard error."""
    tables = results.tasks | results.groups
    return {(task, key.metric): score for task, found in tables.items() for key, score in found.items()}


def main(folder: str, other: str) -> int:
    ours, theirs = (scores(load(newest(place)[0])) for place in (folder, other))
    different = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    for key in different:
        print(*key, ours.get(key), theirs.get(key))
    print(f"{len(ours)} scores, {len(different)} of them different or on one side alone")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
