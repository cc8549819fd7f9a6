"""Selects the implementation of attention, and explains the selection.

Every implementation reports in one sentence what it does not support. `"auto"` tries
those of its platform in order, best first; the last, plain XLA, supports everything.
Some runtimes reject all Pallas kernels, so a small one is compiled once before any is
selected.
"""

import concurrent.futures
import functools
import importlib.metadata
import warnings
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from jaxtyping import DTypeLike

Implementation = Literal["auto", "xla", "mosaic_tpu", "cudnn", "mosaic_gpu", "triton"]

# Best first. Our GPU kernels have not been timed on a GPU yet, so `auto` does not
# select them.
_BY_PLATFORM: dict[str, tuple[Implementation, ...]] = {
    "tpu": ("mosaic_tpu", "xla"),
    "gpu": ("cudnn", "xla"),
    "cpu": ("xla",),
}
MAX_DECODE_QUERIES = 8  # queries per row that count as decoding,
MAX_DECODE_ROWS = 128  # and their number times the heads of a group


def is_decoding(queries: int, group: int) -> bool:
    """Whether T queries in groups of G over a cache are few enough to be decoding."""
    return queries <= MAX_DECODE_QUERIES and queries * group <= MAX_DECODE_ROWS


class AttentionCall(NamedTuple):
    """The properties of a call on which the selection depends.

    Attributes:
      dtype: dtype of the queries.
      head_dim: H.
      queries: T.
      slots: S, or C of a paged cache.
      group: G, query heads per key/value head.
      cached: whether keys and values come from a cache (`q_start` is given).
      quantized: whether keys and values are int8 (`QuantizedSlots`).
      paged: whether the cache is paged.
    """

    dtype: DTypeLike
    head_dim: int
    queries: int
    slots: int
    group: int = 1
    cached: bool = False
    quantized: bool = False
    paged: bool = False

    @property
    def decoding(self) -> bool:
        """Whether few queries attend to a long cache, so that reading it dominates."""
        few = is_decoding(self.queries, self.group)
        return self.paged or (self.cached and few)


class Selection(NamedTuple):
    """The implementation that `"auto"` selects, and why no better one.

    Attributes:
      implementation: the selected implementation.
      rejected: better ones, each with the reason.
    """

    implementation: Implementation
    rejected: tuple[tuple[Implementation, str], ...]

    def __str__(self) -> str:
        reasons = (f"not {name}: {reason}" for name, reason in self.rejected)
        return "; ".join((self.implementation, *reasons))


def explain(
    dtype: DTypeLike = jnp.bfloat16,
    head_dim: int = 128,
    queries: int = 2048,
    slots: int = 4096,
    *,
    group: int = 1,
    cached: bool = False,
    quantized: bool = False,
    paged: bool = False,
    device: jax.Device | None = None,
) -> Selection:
    """Return what `implementation="auto"` selects for a call, and why nothing better.

    Args:
      dtype: dtype of the queries.
      head_dim: H.
      queries: T; few queries over a cache count as decoding.
      slots: S, or C of a paged cache.
      group: G, query heads per key/value head.
      cached: whether `q_start` is given.
      quantized: whether keys and values are int8 (`QuantizedSlots`).
      paged: whether the cache is paged.
      device: device to run on; defaults to JAX's first device.

    Example:
      >>> import jax
      >>> from llama_jax.kernels import explain
      >>> print(explain(head_dim=64, device=jax.devices("cpu")[0]))
      xla
    """
    call = AttentionCall(
        dtype, head_dim, queries, slots, group, cached, quantized, paged
    )
    return select(call, device)


def select(call: AttentionCall, device: jax.Device | None = None) -> Selection:
    """Select the best implementation for a call on a device (default: JAX's first)."""
    device = device or jax.devices()[0]
    platform = "gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform
    rejected: list[tuple[Implementation, str]] = []
    for name in _BY_PLATFORM.get(platform, ("xla",)):
        reason = unsupported(name, call) or _unsuitable(name, call, device)
        if reason is None:
            return Selection(name, tuple(rejected))
        rejected.append((name, reason))
    raise AssertionError("xla supports every call")


def check(name: str, call: AttentionCall) -> None:
    """Check that an implementation exists and supports a call.

    Raises:
      ValueError: it does not.
    """
    if name not in get_args(Implementation):
        raise ValueError(
            f"attention implementation {name!r} does not exist; choose from "
            f"{', '.join(get_args(Implementation))}"
        )
    reason = unsupported(name, call)  # type: ignore[arg-type]
    if reason is not None:
        raise ValueError(
            f"attention implementation {name!r} {reason}; choose another, or 'auto'"
        )


def unsupported(name: Implementation, call: AttentionCall) -> str | None:
    """Why an implementation does not support a call on any device; None if it does."""
    dtype = jnp.dtype(call.dtype)
    dtypes = {
        "mosaic_tpu": (jnp.bfloat16, jnp.float32),
        "cudnn": (jnp.bfloat16, jnp.float16),
        "mosaic_gpu": (jnp.bfloat16, jnp.float16),
        "triton": (jnp.bfloat16, jnp.float16, jnp.float32),
    }.get(name)
    if dtypes is None:
        return None
    if dtype not in map(jnp.dtype, dtypes):
        names = " or ".join(jnp.dtype(each).name for each in dtypes)
        return f"requires {names}, not {dtype.name}"
    step, largest = {"mosaic_tpu": (8, 256), "cudnn": (8, 128)}.get(name, (16, 256))
    if call.head_dim % step or call.head_dim > largest:
        return (
            f"requires head_dim to be a multiple of {step}, at most {largest}, "
            f"not {call.head_dim}"
        )
    if name in ("cudnn", "mosaic_gpu") and call.paged:
        return "does not support paged caches"
    if name in ("cudnn", "mosaic_gpu") and call.quantized:
        return "does not support int8 slots"
    if name == "mosaic_tpu" and call.decoding:
        return _unsupported_decoding(call)
    return None


def _unsupported_decoding(call: AttentionCall) -> str | None:
    """Why the TPU's decoding kernels, which read the cache in place, cannot run."""
    rows = call.queries * call.group
    if rows > MAX_DECODE_ROWS:
        return (
            f"requires at most {MAX_DECODE_ROWS} query rows per key/value head, "
            f"not {rows}"
        )
    step = 128 if call.quantized or call.head_dim % 128 else 8
    if call.slots % step:
        unit = "pages" if call.paged else "a cache"
        return f"requires {unit} of a multiple of {step} slots, not {call.slots}"
    return None


def _unsuitable(
    name: Implementation, call: AttentionCall, device: jax.Device
) -> str | None:
    """Why an implementation does not run on a device, or not efficiently."""
    if name == "mosaic_tpu":
        if call.quantized and call.decoding and "v4" in device.device_kind:
            # 11,200 bundles for a block that is read in 1,793 cycles.
            return "unpacks int8 slots more slowly than a v4 reads them"
        return probe(device)
    if name == "cudnn":
        capability = getattr(device, "compute_capability", None) or "0.0"
        if float(capability) < 8.0:
            return f"requires compute capability 8.0 (Ampere), not {capability}"
        if call.decoding:
            return "requires slots before heads, which would copy the cache"
        if call.queries % 2 or call.slots % 2:
            return "has no gradient for odd lengths"
    return None


@functools.cache
def probe(device: jax.Device) -> str | None:
    """Why a TPU's runtime rejects Pallas kernels; None if it accepts them.

    A small kernel is compiled, once per device, and never run. A rejection is also a
    warning, which says how to fix it.
    """
    # In a thread of its own, which does not inherit the trace in progress here.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        error = thread.submit(_compile_small, device).result()
    if error is None:
        return None
    wanted = "libtpu==0.0.24" if jax.__version_info__ < (0, 8) else "--upgrade libtpu"
    reason = (
        f"libtpu {_version('libtpu')} rejects the kernels of jax {jax.__version__} "
        f"({error})"
    )
    warnings.warn(
        f"attention falls back to XLA, which is slower: {reason}; to fix this, run "
        f"`pip install {wanted}` and restart",
        stacklevel=2,
    )
    return reason


def _compile_small(device: jax.Device) -> str | None:
    from llama_jax.kernels.tpu.flash import flash_attention

    sharding = SingleDeviceSharding(device)
    heads = jax.ShapeDtypeStruct((1, 128, 1, 128), jnp.bfloat16, sharding=sharding)
    slots = jax.ShapeDtypeStruct((1, 1, 128, 128), jnp.bfloat16, sharding=sharding)
    try:
        jax.jit(flash_attention).lower(heads, slots, slots).compile()
    except Exception as error:  # whatever the plugin raises
        return " ".join(str(error).split())[:200]
    return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "?"
