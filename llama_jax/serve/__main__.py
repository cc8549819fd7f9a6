"""`python -m llama_jax.serve`: serve models over HTTP."""

from llama_jax.cli import command as cli
from llama_jax.cli.serve import main

if __name__ == "__main__":
    cli.run(main)
