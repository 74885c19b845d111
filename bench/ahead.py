"""Lets every library compile what a run will need, in several processes at once: some compile for each shape."""

from __future__ import annotations

import subprocess
import sys

from bench.cases import Problem, Shape, parse_shape
from bench.libraries import load


def compile_ahead(shapes: list[Shape], only: tuple[str, ...], jobs: int) -> None:
    """Runs each library once on each shape. What fails here fails again, and is named, in the run itself."""
    shares = [shapes[i::jobs] for i in range(min(jobs, len(shapes)))]
    command = [sys.executable, "-m", "bench.ahead", ",".join(only)]
    processes = [
        subprocess.Popen([*command, *map(str, share)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for share in shares
    ]
    for process in processes:
        process.wait()


def main() -> None:
    only, *shapes = sys.argv[1:]
    libraries, _ = load(tuple(filter(None, only.split(","))))
    for shape in shapes:
        problem = Problem(parse_shape(shape))
        for library in libraries:
            try:
                library.prepare(problem, lambda message: None)()
            except Exception:  # named in the run itself
                continue


if __name__ == "__main__":
    main()
