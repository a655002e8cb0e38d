"""`python -m tests.fuzz`: a table of calls by area, and each fault with the command that repeats it."""

import argparse
import sys
import time
from collections import Counter

import torch

from .areas import AREAS
from .judge import Verdict, judged


def main() -> int:
    """Exit code 1 when a call is a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000, help="of all areas together, by their shares")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--area", choices=AREAS, help="this area only, all calls")
    parser.add_argument("--only", type=int, help="this call of the area only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [options.area] if options.area else list(AREAS)
    total = sum(AREAS[name].share for name in names)
    faults: list[Verdict] = []
    print(f"{'area':<18}{'calls':>7}{'accepted':>10}{'refused':>9}{'faults':>8}{'seconds':>9}")
    sums: Counter[str] = Counter()
    for name in names:
        calls = max(1, round(options.calls * AREAS[name].share / total))
        start = time.perf_counter()
        indices = range(calls) if options.only is None else [options.only]
        verdicts = [judged(name, options.seed, index, AREAS[name].generate) for index in indices]
        seconds = time.perf_counter() - start
        counts = Counter(verdict.outcome for verdict in verdicts)
        row(name, len(verdicts), counts, seconds)
        sums.update(counts | Counter(calls=len(verdicts)))
        sums["milliseconds"] += round(1000 * seconds)
        faults += [verdict for verdict in verdicts if verdict.fault]
        if options.only is not None:
            print(verdicts[0])
    row("all", sums["calls"], sums, sums["milliseconds"] / 1000)
    for fault in faults:
        print(f"\n{fault}\n    {fault.repeat}")
    return 1 if faults else 0


def row(name: str, calls: int, counts: Counter[str], seconds: float) -> None:
    """A line of the table."""
    outcomes = f"{counts['accepted']:>10}{counts['refused']:>9}{counts['fault']:>8}"
    print(f"{name:<18}{calls:>7}{outcomes}{seconds:>9.1f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
