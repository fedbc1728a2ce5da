"""Mutation score: how many single wrong integers in files and engines verification notices, by kind; see tests/mutation.py.

    python -m benchmarks.mutation --mutants 400

Exit code 1 if one is missed that is not proved equivalent.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from mutation import ENGINE, FILES, engine_score, file_score


def main(mutants: int, seed: int) -> int:
    titles = ("mutants", "by reading", "by network", "by population", "equivalent", "missed", "score")
    print(f"{'':40}" + "".join(f"{title:>14}" for title in titles))
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        kinds = [(f"file, {f}", lambda f=f: file_score(f, mutants, Path(folder), seed)) for f in FILES]
        kinds += [(f"engine, {k}", lambda k=k: engine_score(k, mutants, seed)) for k in ENGINE]
        for kind, count in kinds:
            s = count()
            counts = (s.mutants, s.by_reading, s.by_network, s.by_population, s.equivalent, s.missed)
            print(f"{kind:40}" + "".join(f"{n:>14}" for n in counts) + f"{s.score:>14.1%}", flush=True)
            missed += s.missed
    return min(missed, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=400, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    sys.exit(main(**vars(parser.parse_args())))
