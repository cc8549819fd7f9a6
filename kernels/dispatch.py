"""Which implementation of attention runs, and why not another.

Each one refuses what it cannot do in a sentence. `"auto"` asks those of its platform in
their order, best first, and the last, plain XLA, refuses nothing. A Pallas kernel is
compiled once, small, before it is trusted: some runtimes refuse all of them.
"""

import concurrent.futures
import functools
import importlib.metadata
import warnings
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from jaxtyping import DTypeLike

Implementation = Literal["auto", "xla", "mosaic_tpu", "cudnn", "mosaic_gpu", "triton"]

# Best first. No Pallas kernel of ours has been timed on a GPU yet, and cuDNN is what
# everyone else is compared with: until one has, those are there to be named.
_BY_PLATFORM: dict[str, tuple[Implementation, ...]] = {
    "tpu": ("mosaic_tpu", "xla"),
    "gpu": ("cudnn", "xla"),
    "cpu": ("xla",),
}
FEW = 8  # queries of a row that still count as decoding,
MOST_ROWS = 128  # and what they may be with the heads of their group


class Asked(NamedTuple):
    """What decides between implementations.

    Attributes:
      dtype: of the queries.
      head_dim: H.
      queries: T.
      slots: S, or C of a page.
      group: G, query heads to a key/value head.
      cached: whether the slots are those of a cache (`q_start` is given).
      quantized: whether the slots are held in eight bits.
      paged: whether they lie in pages.
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
        """Whether few queries meet a long cache: reading it takes the time."""
        few = self.queries <= FEW and self.queries * self.group <= MOST_ROWS
        return self.paged or (self.cached and few)


class Choice(NamedTuple):
    """What `"auto"` takes, and what it would rather have taken.

    Attributes:
      implementation: the one that runs.
      passed_over: better ones, each with the reason why not.
    """

    implementation: Implementation
    passed_over: tuple[tuple[Implementation, str], ...]

    def __str__(self) -> str:
        reasons = (f"not {name}: {reason}" for name, reason in self.passed_over)
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
) -> Choice:
    """What `implementation="auto"` takes for such arrays, and why nothing better.

    Args:
      dtype: of the queries.
      head_dim: H.
      queries: T; few of them over a cache are decoding.
      slots: S, or C of a page.
      group: G, query heads to a key/value head.
      cached: whether `q_start` is given.
      quantized: whether keys and values are held in eight bits.
      paged: whether they lie in pages.
      device: where it would run; JAX's first device where not given.
    """
    asked = Asked(dtype, head_dim, queries, slots, group, cached, quantized, paged)
    return choose(asked, device)


def choose(asked: Asked, device: jax.Device | None = None) -> Choice:
    """The best implementation that takes it, on a device or JAX's first one."""
    device = device or jax.devices()[0]
    platform = "gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform
    passed_over: list[tuple[Implementation, str]] = []
    for name in _BY_PLATFORM.get(platform, ("xla",)):
        reason = refusal(name, asked) or _unfit(name, asked, device)
        if reason is None:
            return Choice(name, tuple(passed_over))
        passed_over.append((name, reason))
    raise AssertionError("xla refuses nothing")


def check(name: str, asked: Asked) -> None:
    """Refuse an implementation that does not exist, or does not do what is asked.

    Raises:
      ValueError: with a sentence that says which.
    """
    if name not in get_args(Implementation):
        raise ValueError(
            f"attention implementation {name!r} does not exist; choose from "
            f"{', '.join(get_args(Implementation))}"
        )
    reason = refusal(name, asked)  # type: ignore[arg-type]
    if reason is not None:
        raise ValueError(
            f"attention implementation {name!r} {reason}; name another, or 'auto'"
        )


def refusal(name: Implementation, asked: Asked) -> str | None:
    """Why an implementation does not do what is asked, on any device."""
    dtype = jnp.dtype(asked.dtype)
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
        return f"computes in {names}, not in {dtype.name}"
    step, most = {"mosaic_tpu": (8, 256), "cudnn": (8, 128)}.get(name, (16, 256))
    if asked.head_dim % step or asked.head_dim > most:
        return f"takes heads of up to {most} in steps of {step}, not {asked.head_dim}"
    if name in ("cudnn", "mosaic_gpu") and asked.paged:
        return "does not read pages"
    if name in ("cudnn", "mosaic_gpu") and asked.quantized:
        return "does not read eight-bit slots"
    if name == "mosaic_tpu" and asked.decoding:
        return _refusal_to_decode(asked)
    return None


def _refusal_to_decode(asked: Asked) -> str | None:
    """What the TPU's decoding kernels cannot do: they read the cache where it lies."""
    rows = asked.queries * asked.group
    if rows > MOST_ROWS:
        return f"takes {MOST_ROWS} queries to a head's page, not {rows}"
    step = 128 if asked.quantized or asked.head_dim % 128 else 8
    if asked.slots % step:
        what = "page" if asked.paged else "cache"
        return f"reads a {what} of a multiple of {step} slots, not of {asked.slots}"
    return None


def _unfit(name: Implementation, asked: Asked, device: jax.Device) -> str | None:
    """Why an implementation does not run on a device, or not well."""
    if name == "mosaic_tpu":
        if asked.quantized and asked.decoding and "v4" in device.device_kind:
            # 11,200 bundles a block where reading it takes 1,793 cycles.
            return "unpacks eight-bit slots slower than a v4 reads them"
        return probe(device)
    if name == "cudnn":
        capability = getattr(device, "compute_capability", None) or "0.0"
        if float(capability) < 8.0:
            return f"needs compute capability 8.0 (Ampere), this GPU has {capability}"
        if asked.decoding:
            return "wants slots before heads, for which the cache would be copied"
        if asked.queries % 2 or asked.slots % 2:
            return "has no gradient for odd lengths"
    return None


@functools.cache
def probe(device: jax.Device) -> str | None:
    """Why a TPU's runtime refuses Pallas kernels, None where it takes them.

    A small one is compiled, once for each device, and never run. The first refusal is
    a warning too, because the remedy is one command.
    """
    # In a thread of its own: what is being traced here must not reach into it.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        error = thread.submit(_compile_small, device).result()
    if error is None:
        return None
    wanted = "libtpu==0.0.24" if jax.__version_info__ < (0, 8) else "--upgrade libtpu"
    reason = (
        f"libtpu {_version('libtpu')} refuses the kernels of jax {jax.__version__} "
        f"({error})"
    )
    warnings.warn(
        f"attention falls back to XLA, which is slower: {reason}; to mend it run "
        f"`pip install {wanted}` and restart",
        stacklevel=2,
    )
    return reason


def _compile_small(device: Any) -> str | None:
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
