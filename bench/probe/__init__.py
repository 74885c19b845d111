"""Experiments that decide the kernels' designs: `python -m bench.probe`. Each is a kernel and its driver."""
