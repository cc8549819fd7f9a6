"""`Runtime`: the choices of this run. Every field has a default; none is a fact."""

import dataclasses
from typing import Literal, get_args

from llama_jax.errors import ConfigError
from llama_jax.kernels import Implementation

DType = Literal["float32", "bfloat16", "float16"]
CacheDType = Literal["int8"]
LayerLayout = Literal["unrolled", "stacked"]
Remat = Literal["none", "block", "dots"]
MeshAxes = tuple[str, ...]

MESH_AXES: MeshAxes = ("data", "fsdp", "sequence", "tensor")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which mesh axes each axis letter is split over.

    Weights and activations have tables of their own, because D is split over `fsdp`
    in a weight and must not be in an activation whose B already is. Of activations, TS
    is T of the stream between blocks, which norms read and remat keeps: whoever shares
    the heads of a block's tokens shares the tokens there.
    """

    weights: tuple[tuple[str, MeshAxes], ...] = (
        ("D", ("fsdp",)),
        ("NH", ("tensor",)),
        ("KH", ("tensor",)),
        ("F", ("tensor",)),
        ("V", ("tensor",)),
    )
    activations: tuple[tuple[str, MeshAxes], ...] = (
        ("B", ("data", "fsdp")),
        ("T", ("sequence",)),
        ("TS", ("sequence", "tensor")),
        ("S", ("sequence",)),
        ("N", ("tensor",)),
        ("K", ("tensor",)),
        ("NH", ("tensor",)),
        ("F", ("tensor",)),
        ("V", ("tensor",)),
    )


TRAINING_RULES = Rules(
    weights=tuple(
        (letter, ("fsdp", "sequence") if letter == "D" else axes)
        for letter, axes in Rules().weights
    )
)
"""Of training: a `sequence` axis cuts weights too, which each step gathers only once
for many tokens; in decoding it would gather them for each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a model is run here and now.

    Attributes:
      dtype: what activations are computed in; norms, softmax and logits are float32
        whatever it is. float32 means real float32 products on every device.
      param_dtype: what weights are held in; `None` means `dtype`.
      cache_dtype: what a cache holds keys and values in; `None` means `dtype`, "int8"
        a byte for each number and a float32 scale for each slot and head.
      attention: which attention implementation; see `llama_jax.kernels.attention`.
      layer_layout: `"unrolled"` holds one array per layer and loops in Python, for
        prefill and decoding; `"stacked"` holds `[L, ...]` arrays under `nn.scan`, for
        training (its compile time does not grow with depth; it takes no cache).
      remat: what the backward pass computes again: nothing, all but each block's
        input, or all but each block's matrix products.
      rules: how axis letters map to mesh axes.
    """

    dtype: DType = "float32"
    param_dtype: DType | None = None
    cache_dtype: CacheDType | None = None
    attention: Implementation = "auto"
    layer_layout: LayerLayout = "unrolled"
    remat: Remat = "none"
    rules: Rules = Rules()

    def __post_init__(self) -> None:
        dtypes = ("float32", "bfloat16", "float16")
        for name, value, allowed in (
            ("dtype", self.dtype, dtypes),
            ("param_dtype", self.param_dtype, (*dtypes, None)),
            ("cache_dtype", self.cache_dtype, (*get_args(CacheDType), None)),
            ("attention", self.attention, get_args(Implementation)),
            ("layer_layout", self.layer_layout, ("unrolled", "stacked")),
            ("remat", self.remat, ("none", "block", "dots")),
        ):
            if value not in allowed:
                choices = ", ".join(str(choice) for choice in allowed)
                raise ConfigError(
                    f"runtime: {name} is {value!r}; choose from {choices}"
                )

    @property
    def weight_dtype(self) -> DType:
        """`param_dtype`, or `dtype` where it is not given."""
        return self.param_dtype or self.dtype

    @property
    def slot_dtype(self) -> DType | CacheDType:
        """`cache_dtype`, or `dtype` where it is not given."""
        return self.cache_dtype or self.dtype

    def replace(self, **changes: object) -> "Runtime":
        """A copy with some choices changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
