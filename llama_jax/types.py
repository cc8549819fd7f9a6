"""Types of arrays, trees and paths in signatures.

Letters: B batch, T query length, S cache slots, L layers, D model width, N query
heads, K key/value heads, G = N // K, H head width, F feed-forward width, V vocabulary.
"""

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, UInt32

Params: TypeAlias = Mapping[str, Any]
"""A nested dict whose leaves are arrays, or shapes or lazy leaves of arrays."""

FlatParams: TypeAlias = Mapping[str, Any]
"""The same tree as one dict: `"transformer/layers/0/attention/q_proj"` to leaf."""

JsonObject: TypeAlias = Mapping[str, Any]
"""An object of a JSON file; its reader checks what the values are."""

Path: TypeAlias = str | os.PathLike[str]

AnyArray: TypeAlias = Array | jax.ShapeDtypeStruct
"""An array, or the description of one."""

Mesh: TypeAlias = jax.sharding.Mesh
AnyMesh: TypeAlias = jax.sharding.Mesh | jax.sharding.AbstractMesh

Tokens: TypeAlias = Int[Array, "B T"]
Lengths: TypeAlias = Int[Array, " B"]
Hidden: TypeAlias = Float[Array, "B T D"]
Logits: TypeAlias = Float[Array, "B V"]

__all__ = [
    "AnyArray",
    "AnyMesh",
    "Array",
    "Bool",
    "FlatParams",
    "Float",
    "Hidden",
    "Int",
    "JsonObject",
    "Lengths",
    "Logits",
    "Mesh",
    "PRNGKeyArray",
    "Params",
    "Path",
    "PyTree",
    "Tokens",
    "UInt32",
]
