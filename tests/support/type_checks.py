"""Run-time type checks of annotations, where the test run has them."""

import contextlib
from collections.abc import Iterator

import jaxtyping


@contextlib.contextmanager
def without_type_checks() -> Iterator[None]:
    """Pass values that annotations forbid, to test that the library refuses them."""
    checked = not jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", not checked)
