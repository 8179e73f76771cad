"""The benchmark harness: bytes, rounds and seconds counted where they arise. Run from the repository root: `python -m benchmarks`."""
