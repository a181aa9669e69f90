"""Hostile inputs for as long as asked: ``make fuzz``, or ``python -m fuzz`` in ``tests/``.

An input that is found is made again by ``python -m fuzz --area AREA --seed SEED --count 1``.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from itertools import count as numbers

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}

from fuzz.more_areas import AREAS
from fuzz.running import Count, table, try_one
from support.long_runs import options


def main() -> int:
    given = options(__doc__, "inputs", "area", AREAS).parse_args()
    logging.disable(logging.CRITICAL)
    areas = given.area or list(AREAS)
    counts = {area: Count() for area in areas}
    end = time.monotonic() + given.seconds
    for number in numbers():
        if number >= given.count or time.monotonic() > end:
            break
        for area in areas:
            seed = f"{given.seed}-{number}" if given.count > 1 else given.seed
            before = len(counts[area].found)
            try_one(area, seed, counts[area])
            for found in counts[area].found[before:]:
                print(f"--- {area}, seed {found[0]}\n{found[1]}\n", flush=True)
    print(table(counts))
    return int(any(count.found for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
