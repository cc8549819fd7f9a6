"""Benchmarks: how fast the library is on this machine, and what the machine can do.

`python -m llama_jax.bench decode` prints a table, or with `--json` one object. Weights
are random, since speed does not depend on them.
"""
