"""The models of a server, and what identifies an answer."""

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Iterator, Sequence

import jax

from llama_jax._version import __version__
from llama_jax.checkpoint.fingerprint import fingerprint
from llama_jax.checkpoint.lazy_leaf import lazy_leaves
from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.errors import did_you_mean
from llama_jax.serve.api.call import Served
from llama_jax.serve.api.errors import ApiError
from llama_jax.serve.jobs import Engine


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model, its engine, and its public description."""

    served: Served
    engine: Engine


class Models:
    """Served models by name; the first is the default.

    Args:
      models: at least one.
    """

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = {model.served.name: model for model in models}
        self.default = models[0]

    def __iter__(self) -> Iterator[ServedModel]:
        """Yield the models."""
        return iter(self._models.values())

    def get(self, name: str | None) -> ServedModel:
        """Return a model by name; without a name the default.

        Raises:
          ApiError: there is no such model.
        """
        if name is None:
            return self.default
        if name not in self._models:
            raise ApiError(
                f"model: {name!r} is not served; choose from {', '.join(self._models)}"
                + did_you_mean(name, self._models),
                status=404,
                code="model_not_found",
                param="model",
            )
        return self._models[name]


def system_fingerprint(loaded: Loaded, engine: object = None) -> str:
    """Hash everything that the bits of an answer depend on.

    Args:
      loaded: weights, configuration, runtime and mesh.
      engine: the engine's configuration.
    """
    model = loaded.model
    devices = jax.devices() if model.mesh is None else list(model.mesh.devices.flat)
    facts = (
        fingerprint(lazy_leaves(loaded.params)),
        model.config,
        model.runtime,
        engine,
        hashlib.sha256(loaded.tokenizer.contents).hexdigest(),
        loaded.tokenizer.settings,
        (__version__, jax.__version__, importlib.metadata.version("jaxlib")),
        (devices[0].device_kind, len(devices)),
        None if model.mesh is None else dict(model.mesh.shape),
    )
    return f"fp_{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"
