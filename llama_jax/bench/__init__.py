"""How fast the library is on whatever device is there, beside what the device can do.

`python -m llama_jax.bench decode` and `prefill` print a table, or with `--json` an
object. Weights are random: speed does not depend on them.
"""
