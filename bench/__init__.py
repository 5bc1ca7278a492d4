"""Benchmarks: ``python -m bench``. Each provider runs in a process of its own; nothing is timed before it is right."""
