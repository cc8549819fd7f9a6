"""Names that differ between the oldest and the newest supported jax.

Importing this module does not import Pallas.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jaxtyping import Array

from llama_jax.kernels.refs import Ref


def mosaic_gpu_kernel(
    body: Callable[..., None],
    *,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    interpret: bool,
    **settings: Any,
) -> Callable[..., Sequence[Array]]:
    """`plgpu.kernel`, whose `out_shape` became `out_type`, with interpret mode.

    Raises:
      ValueError: this jax has no interpret mode for such kernels.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    names = inspect.signature(plgpu.kernel).parameters
    settings["out_type" if "out_type" in names else "out_shape"] = out_shape
    if interpret:
        if not hasattr(plgpu, "InterpretGPUParams"):
            raise ValueError(
                "this version of jax has no interpret mode for Mosaic GPU kernels; "
                "upgrade jax or run on Hopper"
            )
        settings["interpret"] = plgpu.InterpretGPUParams(detect_races=True)
    return plgpu.kernel(body, **settings)


def mosaic_gpu_layout(along: Literal["rows", "columns"]) -> Any:
    """Register layout of a vector with one number per row or column of a product."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layout = plgpu.Layout
    if hasattr(layout, "WGMMA_ROW"):
        rows, columns = layout.WGMMA_ROW, layout.WGMMA_COL
    else:
        rows, columns = layout.WGMMA.reduce(1), layout.WGMMA.reduce(0)
    return rows if along == "rows" else columns


def load_vector(ref: Ref, along: Literal["rows", "columns"]) -> Array:
    """Load a vector into registers in `mosaic_gpu_layout(along)`."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
    layout = mosaic_gpu_layout(along)
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def transposed(ref: Ref) -> Ref:
    """A matrix in shared memory, transposed."""
    if hasattr(ref, "transpose"):
        return ref.transpose((1, 0))
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.transpose_ref(ref, (1, 0))


def reciprocal(x: Array, *, approx: bool) -> Array:
    """1 / x within a TPU kernel; moved from `pallas` to `pallas.tpu`."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    module: Any = pltpu if hasattr(pltpu, "reciprocal") else pl
    return module.reciprocal(x, approx=approx)
