"""The version of the package, and nothing else: the build reads it unimported."""

__version__ = "0.1.0"
