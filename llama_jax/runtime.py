"""`Runtime`: choices of a run, all with defaults; `LlamaConfig` has a model's facts."""

import dataclasses
from typing import Literal

from llama_jax.arguments import checked
from llama_jax.errors import ConfigError
from llama_jax.kernels import Implementation

DType = Literal["float32", "bfloat16", "float16"]
CacheDType = Literal["int8"]
LayerLayout = Literal["unrolled", "stacked"]
Remat = Literal["none", "block", "dots"]
MeshAxes = tuple[str, ...]
AxisRules = tuple[tuple[str, MeshAxes], ...]
"""Pairs of an axis letter and the mesh axes that split it."""

MESH_AXES: MeshAxes = ("data", "fsdp", "sequence", "tensor")


@checked(ConfigError)
@dataclasses.dataclass(frozen=True)
class Rules:
    """Mesh axes that split each axis letter, for weights and for activations.

    D is split over `fsdp` in weights but not in activations, whose B already is. TS is
    T between blocks, where norms and remat work: devices that share the heads of a
    block share the tokens there.

    Attributes:
      weights: rules of weights.
      activations: rules of activations and caches.

    >>> dict(Rules().activations)["B"]
    ('data', 'fsdp')
    """

    weights: AxisRules = (
        ("D", ("fsdp",)),
        ("NH", ("tensor",)),
        ("KH", ("tensor",)),
        ("F", ("tensor",)),
        ("V", ("tensor",)),
    )
    activations: AxisRules = (
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
"""Rules for training, where `sequence` splits weights too: a step gathers them once for
many tokens, while decoding would gather them for each token."""


@checked(ConfigError)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Runtime:
    """Choices for running a model.

    Attributes:
      dtype: of activations; norms, softmax and logits are always float32. With
        `"float32"`, matrix products have float32 precision on every device.
      param_dtype: of stored weights; `None` means `dtype`.
      cache_dtype: of cached keys and values; `None` means `dtype`, `"int8"` a byte for
        each number and a float32 scale for each slot and head.
      attention: implementation of attention; see `llama_jax.kernels.attention`.
      layer_layout: `"unrolled"` stores one array per layer and loops in Python, for
        prefill and decoding; `"stacked"` stores `[L, ...]` arrays and scans, for
        training: compile time does not grow with depth, but there is no cache.
      remat: what the backward pass recomputes: nothing, all but each block's input, or
        all but each block's matrix products.
      rules: mesh axes that split each axis letter.

    >>> runtime = Runtime(dtype="bfloat16").replace(cache_dtype="int8")
    >>> runtime.weight_dtype, runtime.slot_dtype
    ('bfloat16', 'int8')
    """

    dtype: DType = "float32"
    param_dtype: DType | None = None
    cache_dtype: CacheDType | None = None
    attention: Implementation = "auto"
    layer_layout: LayerLayout = "unrolled"
    remat: Remat = "none"
    rules: Rules = Rules()

    @property
    def weight_dtype(self) -> DType:
        """The dtype of stored weights."""
        return self.param_dtype or self.dtype

    @property
    def slot_dtype(self) -> DType | CacheDType:
        """The dtype of cached keys and values."""
        return self.cache_dtype or self.dtype

    def replace(self, **changes: object) -> "Runtime":
        """Return a copy with some choices changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
