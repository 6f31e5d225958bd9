"""Is every solution right whatever its check draws? Many seeds for each exercise, in as many processes as there are cores.

    python notebooks/seeds.py                 a hundred seeds for each part of each check
    python notebooks/seeds.py 2000 05 my-3    two thousand, for notebook 05 and step 3

A part of a check that takes longer than --seconds is tried with fewer seeds, and the table says with how many. A part that draws
nothing is tried once. Exit status 1 if a solution is ever not right; the seed that it prints draws the same inputs again.
"""

import argparse
import multiprocessing
import os
import sys
import time

import build
import grading
import numpy as np


def solution(exercise):
    """The official answer to an exercise."""
    number, k = grading.place(exercise)
    if number == grading.OWN:
        return grading.own_answer(
            build.steps((grading.HERE / "build_it.py").read_text(encoding="utf-8"), solutions=True)
        )
    source = next(source for source in grading.sources() if source.name.startswith(number))
    return grading.answer(build.make(source, solutions=True), k)


def tried(job):
    """(exercise, part, seeds tried, seconds, [(seed, what was said)] of those that were not right)."""
    exercise, i, seeds, seconds = job
    part, function = grading.load_checks()[exercise][i], solution(exercise)
    wrong, began = [], time.perf_counter()
    for seed in range(seeds):
        rng = np.random.default_rng([seed, i])
        before = str(rng.bit_generator.state)
        if (said := grading.said(exercise, part, function, rng)) != "right":
            wrong.append((seed, said))
        if time.perf_counter() - began > seconds or str(rng.bit_generator.state) == before:  # it draws nothing
            break
    return exercise, part.name, seed + 1, time.perf_counter() - began, wrong


def main(argv=None):
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="?", type=lambda text: max(int(text), 1), default=100, help="how many (100)")
    parser.add_argument("exercises", nargs="*", metavar="NAME", help="how an exercise begins, such as 05 or my-3 (all)")
    parser.add_argument("--seconds", type=float, default=np.inf, help="the most for one part of a check (no limit)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="how many at a time (the cores)")
    args = parser.parse_args(argv)
    chosen = [
        e
        for e in sorted(grading.load_checks(), key=grading.place)
        if not args.exercises or e.startswith(tuple(args.exercises))
    ]
    jobs = [(e, i, args.seeds, args.seconds) for e in chosen for i in range(len(grading.CHECKS[e]))]
    failed = 0
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for exercise, part, seeds, seconds, wrong in pool.imap(tried, jobs):
            print(
                f"{exercise:6} {part:62} {seeds:5} seeds, {len(wrong)} not right, {1000 * seconds / seeds:6.0f} ms each",
                flush=True,
            )
            for seed, said in wrong[:3]:
                print(f"       seed {seed}: {said}")
            failed += bool(wrong)
    return int(failed > 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
