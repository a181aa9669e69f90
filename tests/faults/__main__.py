"""Faults for as long as asked: ``make faults``, or ``python -m faults`` in ``tests/``.

A fault is injected again by ``python -m faults --only CLASS --seed SEED --count 1``.
"""

from __future__ import annotations

import os
import random
import sys
import time
from itertools import count as numbers

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from faults.classes import CLASSES
from faults.works import prepared
from support.long_runs import options

#: What takes longest is done in every so many rounds only.
RARE = {"real processes": 12, "together: sweeps": 4, "damaged: sweep checksums": 4, "killed: lm_eval": 3}
RARE |= dict.fromkeys(("killed: sweep", "damaged: sweep results", "damaged: unfinished trajectories"), 2)


def main() -> int:
    given = options(__doc__, "faults", "only", CLASSES).parse_args()
    torch.set_num_threads(1)
    chosen = given.only or list(CLASSES)
    tried, defects = dict.fromkeys(chosen, 0), dict.fromkeys(chosen, 0)
    end = time.monotonic() + given.seconds
    with prepared():
        for number in numbers():
            for name in chosen:
                if number >= given.count or time.monotonic() > end:
                    break
                if number % RARE.get(name, 1) and not given.only:
                    continue
                seed = f"{given.seed}-{number}" if given.count > 1 else given.seed
                found = CLASSES[name](random.Random(seed))
                tried[name] += found is not None
                if found:
                    defects[name] += 1
                    print(f"--- {name}, seed {seed}", *found, "", sep="\n", flush=True)
            if number >= given.count or time.monotonic() > end:
                break
    print(f"{'fault':<34}{'tried':>8}{'defects':>9}")
    for name in chosen:
        print(f"{name:<34}{tried[name]:>8}{defects[name]:>9}")
    print(f"{'all':<34}{sum(tried.values()):>8}{sum(defects.values()):>9}")
    return int(any(defects.values()))


if __name__ == "__main__":
    sys.exit(main())
