"""Benchmarks: ``python -m bench``. A process per provider, one for all on CUDA, in turn; nothing is timed before it is right."""
