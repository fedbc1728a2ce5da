"""Accuracy by weight width, with steps by rule and learned: trains a recipe for each and prints a table.

python benchmarks/bits.py [--recipe digits-conv] [--bits 8,4,3,2,1] [--seeds 0,1,2] [--set KEY=VALUE] [--data DIR] [--json]
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from s3nn_deploy import data, recipes
from s3nn_deploy.train import train

STEPS = ("rule", "learned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits-conv")
    parser.add_argument("--bits", default="8,4,3,2,1")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--data", help="folder of data sets")
    parser.add_argument("--json", action="store_true", help="print plain data")
    options = parser.parse_args()
    widths, seeds = ([int(n) for n in text.split(",")] for text in (options.bits, options.seeds))
    runs = [(bits, step, seed) for bits in widths for step in STEPS for seed in seeds]
    dataset = data.load(recipes.load(options.recipe).data, options.data)
    correct: dict[tuple[int, str], list[int]] = {}
    clock = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for index, (bits, step, seed) in enumerate(runs, 1):
            settings = (*options.set, f"bits={bits}", f"step={step}", f"seed={seed}")
            made = train(recipes.load(options.recipe, settings), dataset, Path(folder) / "model.pt")
            correct.setdefault((bits, step), []).append(made.correct)
            passed = time.perf_counter() - clock
            print(
                f"{index}/{len(runs)}: {bits} bits, {step}, seed {seed}: {made.accuracy:.2%}, "
                f"about {passed / index * (len(runs) - index):.0f} s left",
                file=sys.stderr,
            )
    total = len(dataset.test_y)
    if options.json:
        rows = [{"bits": bits, "step": step, "correct": found} for (bits, step), found in correct.items()]
        facts = {"recipe": options.recipe, "settings": options.set, "seeds": seeds, "test_total": total}
        print(json.dumps({**facts, "torch": torch.__version__, "seconds": round(passed, 1), "rows": rows}, indent=2))
        return
    print(f"{options.recipe}, {total} held-out samples, mean of {len(seeds)} seeds (least to most)")
    print("| bits | " + " | ".join(STEPS) + " |")
    print("|---|" + "---|" * len(STEPS))
    for bits in widths:
        cells = [
            f"{sum(c) / len(c) / total:.2%} ({min(c) / total:.2%} to {max(c) / total:.2%})"
            for c in (correct[bits, step] for step in STEPS)
        ]
        print(f"| {bits} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
