"""Operators against their peers: `python -m benchmarks --help`, docs/benchmarking.md."""
