"""What is spelled differently in the oldest and the newest jax that is supported.

Written so that importing this imports no Pallas.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal


def mosaic_gpu_kernel(
    body: Callable[..., None], *, out_shape: Any, interpret: bool, **settings: Any
) -> Callable[..., Any]:
    """`plgpu.kernel`: `out_shape` became `out_type`, and interpreting came later.

    Raises:
      ValueError: this jax cannot interpret such kernels.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    names = inspect.signature(plgpu.kernel).parameters
    settings["out_type" if "out_type" in names else "out_shape"] = out_shape
    if interpret:
        if not hasattr(plgpu, "InterpretGPUParams"):
            raise ValueError(
                "this jax runs Mosaic GPU kernels on Hopper only; interpreting them "
                "needs a newer one"
            )
        settings["interpret"] = plgpu.InterpretGPUParams(detect_races=True)
    return plgpu.kernel(body, **settings)


def mosaic_gpu_layout(along: Literal["rows", "columns"]) -> Any:
    """How a vector lies in registers, one number to each row or column of a product."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layout: Any = plgpu.Layout
    if hasattr(layout, "WGMMA_ROW"):
        rows, columns = layout.WGMMA_ROW, layout.WGMMA_COL
    else:
        rows, columns = layout.WGMMA.reduce(1), layout.WGMMA.reduce(0)
    return rows if along == "rows" else columns


def load_vector(ref: Any, along: Literal["rows", "columns"]) -> Any:
    """Fetch numbers into registers in `mosaic_gpu_layout(along)`."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    place = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
    layout = mosaic_gpu_layout(along)
    return plgpu.load(ref, *place, layout=layout, optimized=False)


def transposed(ref: Any) -> Any:
    """A matrix in shared memory, read the other way round."""
    if hasattr(ref, "transpose"):
        return ref.transpose((1, 0))
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.transpose_ref(ref, (1, 0))


def reciprocal(x: Any, *, approx: bool) -> Any:
    """1 / x within a TPU kernel: it moved from Pallas to its TPU part."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    module: Any = pltpu if hasattr(pltpu, "reciprocal") else pl
    return module.reciprocal(x, approx=approx)
