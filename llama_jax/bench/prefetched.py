"""The scalars that a function hands to its Pallas kernels, for known arguments.

Which blocks a kernel executes depends on them: rows' lengths, tables of pages, which
tiles of a mask are empty. Most are computed by the function around the kernel, so that
function is traced and what depends on known numbers alone is computed.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

Known = np.ndarray | None
"""A value, or None where only its shape is known."""


def prefetched(
    function: Callable[..., Any], arguments: Sequence[np.ndarray | jax.ShapeDtypeStruct]
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Name and scalar operands of every Pallas kernel, in the order of the calls.

    Args:
      function: of arrays.
      arguments: its arguments, of those that matter the values.

    Raises:
      ValueError: a kernel's scalars depend on more, or a kernel is called in a loop.
    """
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments]
    closed = jax.make_jaxpr(function)(*shapes)
    known = [x if isinstance(x, np.ndarray) else None for x in arguments]
    found: list[tuple[str, list[np.ndarray]]] = []
    _evaluate(closed, known, found)
    yield from found


def _evaluate(
    closed: Any, arguments: Sequence[Known], found: list[tuple[str, list[np.ndarray]]]
) -> list[Known]:
    """What is known of the results; the kernels that are met are added to `found`."""
    jaxpr = closed.jaxpr
    values: dict[Any, Known] = dict(zip(jaxpr.invars, arguments, strict=True))
    values |= dict(zip(jaxpr.constvars, closed.consts, strict=True))

    def read(atom: Any) -> Known:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        given = [read(atom) for atom in equation.invars]
        results: Sequence[Known] = [None] * len(equation.outvars)
        inner = _called(equation)
        if equation.primitive.name == "pallas_call":
            found.append(_operands(equation, given))
        elif inner is not None:
            results = _evaluate(inner, given, found)
        elif "pallas_call" in str(equation):
            raise ValueError(f"a kernel is called within {equation.primitive.name}")
        elif all(value is not None for value in given) and not equation.effects:
            results = _computed(jaxpr, equation, values)
        values |= dict(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _computed(jaxpr: Any, equation: Any, values: dict[Any, Known]) -> list[Any]:
    """The results of one equation whose operands are known."""
    names = [atom for atom in equation.invars if not isinstance(atom, core.Literal)]
    names = list(dict.fromkeys(names))
    alone = jaxpr.replace(
        constvars=[], invars=names, outvars=equation.outvars, eqns=[equation]
    )
    run = core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))
    return list(run(*(values[name] for name in names)))


def _called(equation: Any) -> Any:
    """The function that an equation calls once, as `jit` and custom gradients do."""
    name = equation.primitive.name
    if not re.fullmatch(r"p?jit|\w*_?call|checkpoint|remat2?|custom_lin", name):
        return None
    if name == "pallas_call":
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"):
        inner = equation.params.get(key)
        if inner is not None:
            return inner if hasattr(inner, "consts") else core.ClosedJaxpr(inner, ())
    return None


def _operands(equation: Any, given: Sequence[Known]) -> tuple[str, list[np.ndarray]]:
    grid = equation.params["grid_mapping"]
    name = equation.params["jaxpr"].debug_info.func_src_info.split(" at ")[0]
    if grid.num_dynamic_grid_bounds:
        raise ValueError(f"{name}: the bounds of its grid are computed")
    scalars = given[: grid.num_index_operands]
    missing = [index for index, scalar in enumerate(scalars) if scalar is None]
    if missing:
        raise ValueError(f"{name}: scalar operands {missing} are not known")
    return name, [np.asarray(scalar) for scalar in scalars]
