"""Whether a model fits, how fast it could be, and on which mesh, without running it."""
