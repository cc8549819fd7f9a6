"""The scalar operands of the Pallas kernels in a function, for known arguments.

Which blocks a kernel executes depends on them: lengths of rows, page tables, empty
tiles of a mask. The function around the kernel computes most of them, so it is traced,
and whatever depends on known values alone is evaluated.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import jax
import numpy as np
from jax.extend import core

from llama_jax.types import PyTree

Atom: TypeAlias = core.Var | core.Literal

Known = np.ndarray | jax.Array | None
"""A value, or None if only its shape is known."""

KernelScalars = tuple[str, list[np.ndarray]]
"""The name of a kernel, and its scalar operands."""


def scalar_operands(
    function: Callable[..., PyTree],
    arguments: Sequence[np.ndarray | jax.ShapeDtypeStruct],
) -> Iterator[KernelScalars]:
    """Evaluate the scalar operands of every Pallas kernel, in the order of the calls.

    Args:
      function: of arrays.
      arguments: values if scalars depend on them, else shapes.

    Raises:
      ValueError: scalars depend on unknown values, or a kernel is called in a loop.
    """
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments]
    closed = jax.make_jaxpr(function)(*shapes)
    known = [x if isinstance(x, np.ndarray) else None for x in arguments]
    kernels: list[KernelScalars] = []
    _evaluate(closed, known, kernels)
    yield from kernels


def _evaluate(
    closed: core.ClosedJaxpr, arguments: Sequence[Known], kernels: list[KernelScalars]
) -> list[Known]:
    """Evaluate what is known of the results, and append kernels to `kernels`."""
    jaxpr = closed.jaxpr
    values: dict[Atom, Known] = dict(zip(jaxpr.invars, arguments, strict=True))
    values |= dict(zip(jaxpr.constvars, closed.consts, strict=True))

    def read(atom: Atom) -> Known:
        return np.asarray(atom.val) if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        results: Sequence[Known] = [None] * len(equation.outvars)
        inner = _called(equation)
        if equation.primitive.name == "pallas_call":
            kernels.append(_scalars(equation, operands))
        elif inner is not None:
            results = _evaluate(inner, operands, kernels)
        elif "pallas_call" in str(equation):
            raise ValueError(f"a kernel is called within {equation.primitive.name}")
        elif all(value is not None for value in operands) and not equation.effects:
            results = _compute(jaxpr, equation, values)
        values |= dict(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _compute(
    jaxpr: core.Jaxpr, equation: core.JaxprEqn, values: dict[Atom, Known]
) -> list[Known]:
    """Compute one equation whose operands are known."""
    names = [atom for atom in equation.invars if not isinstance(atom, core.Literal)]
    names = list(dict.fromkeys(names))
    single = jaxpr.replace(
        constvars=[], invars=names, outvars=equation.outvars, eqns=[equation]
    )
    run = core.jaxpr_as_fun(core.ClosedJaxpr(single, ()))
    return list(run(*(values[name] for name in names)))


def _called(equation: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """The function that an equation calls once, such as `jit` or a custom gradient."""
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


def _scalars(equation: core.JaxprEqn, operands: Sequence[Known]) -> KernelScalars:
    grid = equation.params["grid_mapping"]
    name = equation.params["jaxpr"].debug_info.func_src_info.split(" at ")[0]
    if grid.num_dynamic_grid_bounds:
        raise ValueError(f"{name}: its grid has dynamic bounds")
    scalars = operands[: grid.num_index_operands]
    missing = [index for index, scalar in enumerate(scalars) if scalar is None]
    if missing:
        raise ValueError(f"{name}: scalar operands {missing} are unknown")
    return name, [np.asarray(scalar) for scalar in scalars]
