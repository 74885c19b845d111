"""Benchmarks of Phalanx beside its peers and the chip's ceilings: `python -m bench`. See bench/README.md."""
