"""A short hash that identifies the weights of a model."""

import hashlib
from collections.abc import Mapping

import numpy as np

from llama_jax.checkpoint.lazy_leaf import LazyLeaf
from llama_jax.distributed import to_host

_SAMPLES = 4096
_NORM = "transformer/final_norm/scale"
_LAYERS = "transformer/layers/"


def fingerprint(leaves: Mapping[str, LazyLeaf]) -> str:
    """Compute a hash of the final norm and of three layers' projections.

    The layers are the first, the middle and the last; of each weight 4,096 numbers
    count. Fine-tuning changes them, also of adapters that were merged, which leave
    norms as they are. The dtype on disk does not count if the numbers are the same.

    Args:
      leaves: one per layer and weight.
    """
    layers = sorted({_layer(path) for path in leaves if path.startswith(_LAYERS)})
    chosen = {layers[0], layers[len(layers) // 2], layers[-1]}
    digest = hashlib.sha256()
    for path in sorted(leaves):
        is_projection = path.startswith(_LAYERS) and path.endswith("_proj")
        if path != _NORM and not (is_projection and _layer(path) in chosen):
            continue
        weight = np.asarray(to_host(leaves[path].read()))
        numbers = weight.flat[:: max(weight.size // _SAMPLES, 1)]
        digest.update(path.encode())
        digest.update(np.asarray(numbers).astype(np.float32).tobytes())
    return digest.hexdigest()[:16]


def _layer(path: str) -> int:
    return int(path.removeprefix(_LAYERS).partition("/")[0])
