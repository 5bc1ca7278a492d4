"""Benchmarks: ``python -m bench``. A process per provider, rounds interleaved; nothing is timed before it is right."""
