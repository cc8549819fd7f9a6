"""Benchmarks: how fast the library is on this machine, beside what the machine can do.

Every figure comes with the machine's own limit, measured in the same run.
"""
