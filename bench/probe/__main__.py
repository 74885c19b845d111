"""Runs the probes on the GPU and writes their figures: python -m bench.probe [promotion weight_stream split_stream]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import machine
from bench.cases import make_layers
from bench.probe import promotion, split_stream, weight_stream
from bench.report import write_json

PROBES = ("promotion", "weight_stream", "split_stream")


def log(message: str) -> None:
    print(message, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.probe", description=__doc__)
    parser.add_argument("probes", nargs="*", default=PROBES, metavar="PROBE", help=f"of {', '.join(PROBES)}; all")
    parser.add_argument("--out", type=Path, default=Path("bench/results/probes.json"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--layers", type=int, default=8, help="of the decode chain")
    arguments = parser.parse_args()
    if unknown := set(arguments.probes) - set(PROBES):
        parser.error(f"no probe {', '.join(sorted(unknown))}; there are {', '.join(PROBES)}")
    machine.require_gpu()

    result = machine.describe()
    monitor = machine.Monitor()
    layers = []
    if set(arguments.probes) - {"promotion"}:
        layers = [[data for data, _ in layer] for layer in make_layers(arguments.layers)]
    measures = {
        "promotion": lambda: promotion.measure(log, arguments.repeats),
        "weight_stream": lambda: weight_stream.measure(layers, log, arguments.repeats),
        "split_stream": lambda: split_stream.measure(layers, log, arguments.repeats),
    }
    for name in arguments.probes:
        with monitor:
            result[name] = measures[name]()
        result[name]["clocks"] = monitor.summary()
        write_json(result, arguments.out)
    print(f"written: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
