"""The Llama family in JAX: one code path for inference and fine-tuning."""

import importlib as _importlib
import pathlib as _pathlib
from typing import TYPE_CHECKING
from typing import Any as _Any

from llama_jax._version import __version__

if TYPE_CHECKING:
    from llama_jax.checkpoint.model_folder import Loaded as Loaded
    from llama_jax.checkpoint.model_folder import save_params as save_params
    from llama_jax.config import LlamaConfig as LlamaConfig
    from llama_jax.config import RopeScaling as RopeScaling
    from llama_jax.data.batch import Batch as Batch
    from llama_jax.data.loader import Loader as Loader
    from llama_jax.errors import LlamaJaxError as LlamaJaxError
    from llama_jax.generation.completion import chat_completion as chat_completion
    from llama_jax.generation.completion import text_completion as text_completion
    from llama_jax.generation.completion import text_infilling as text_infilling
    from llama_jax.generation.decode import decode_step as decode_step
    from llama_jax.generation.decode import prefill as prefill
    from llama_jax.generation.generate import Completion as Completion
    from llama_jax.generation.generate import Delta as Delta
    from llama_jax.generation.generate import generate as generate
    from llama_jax.generation.generate import stream as stream
    from llama_jax.generation.request import Request as Request
    from llama_jax.generation.request import chat_request as chat_request
    from llama_jax.generation.request import infill_request as infill_request
    from llama_jax.generation.request import text_request as text_request
    from llama_jax.generation.sampling import Sampling as Sampling
    from llama_jax.generation.scoring import Score as Score
    from llama_jax.generation.scoring import score as score
    from llama_jax.loading import default_runtime as default_runtime
    from llama_jax.loading import load as load
    from llama_jax.loading import open_model as open_model
    from llama_jax.model.cache import KVCache as KVCache
    from llama_jax.model.cache import init_cache as init_cache
    from llama_jax.model.cache import init_paged_cache as init_paged_cache
    from llama_jax.model.init import init_params as init_params
    from llama_jax.model.lora import Lora as Lora
    from llama_jax.model.lora import adapt as adapt
    from llama_jax.model.lora import init_lora as init_lora
    from llama_jax.model.lora import merge as merge
    from llama_jax.model.presets import PRESETS as PRESETS
    from llama_jax.model.presets import preset as preset
    from llama_jax.model.quantize import quantize_params as quantize_params
    from llama_jax.model.transformer import Llama as Llama
    from llama_jax.model.transformer import ScalarModel as ScalarModel
    from llama_jax.model.transformer import apply as apply
    from llama_jax.params import AXES as AXES
    from llama_jax.runtime import Rules as Rules
    from llama_jax.runtime import Runtime as Runtime
    from llama_jax.sharding import make_mesh as make_mesh
    from llama_jax.sharding import parse_mesh as parse_mesh
    from llama_jax.text.prompt_formats import completion_prompt as completion_prompt
    from llama_jax.text.prompt_formats import get_format as get_format
    from llama_jax.text.prompt_formats import infilling_prompt as infilling_prompt
    from llama_jax.text.settings import AddedToken as AddedToken
    from llama_jax.text.settings import TextSettings as TextSettings
    from llama_jax.text.tokenizer import Tokenizer as Tokenizer
    from llama_jax.train.adapters import merge_checkpoint as merge_checkpoint
    from llama_jax.train.adapters import save_adapters as save_adapters
    from llama_jax.train.loop import Callbacks as Callbacks
    from llama_jax.train.loop import fit as fit
    from llama_jax.train.losses import next_token_loss as next_token_loss
    from llama_jax.train.methods import train_adapters as train_adapters
    from llama_jax.train.methods import train_weights as train_weights
    from llama_jax.train.optimizer import make_optimizer as make_optimizer
    from llama_jax.train.optimizer import make_schedule as make_schedule
    from llama_jax.train.run import run as run
    from llama_jax.train.run_config import RunConfig as RunConfig
    from llama_jax.train.state import TrainState as TrainState
    from llama_jax.train.state import init_state as init_state
    from llama_jax.train.step import make_train_step as make_train_step

# The modules of the public names. They are imported when a name is first used: a
# process that only tokenizes need not load JAX, and `import llama_jax` costs nothing.
_HOMES = {
    "model.cache": ("KVCache", "init_cache", "init_paged_cache"),
    "checkpoint.model_folder": ("Loaded", "save_params"),
    "generation.completion": ("chat_completion", "text_completion", "text_infilling"),
    "config": ("LlamaConfig", "RopeScaling"),
    "model.presets": ("PRESETS", "preset"),
    "generation.decode": ("decode_step", "prefill"),
    "errors": ("LlamaJaxError",),
    "generation.generate": ("Completion", "Delta", "generate", "stream"),
    "loading": ("default_runtime", "load", "open_model"),
    "model.init": ("init_params",),
    "model.transformer": ("Llama", "ScalarModel", "apply"),
    "params": ("AXES",),
    "text.prompt_formats": ("completion_prompt", "get_format", "infilling_prompt"),
    "runtime": ("Rules", "Runtime"),
    "generation.request": (
        "Request",
        "chat_request",
        "infill_request",
        "text_request",
    ),
    "generation.sampling": ("Sampling",),
    "generation.scoring": ("Score", "score"),
    "sharding": ("make_mesh", "parse_mesh"),
    "text.settings": ("AddedToken", "TextSettings"),
    "text.tokenizer": ("Tokenizer",),
    "data.batch": ("Batch",),
    "data.loader": ("Loader",),
    "model.lora": ("Lora", "adapt", "init_lora", "merge"),
    "model.quantize": ("quantize_params",),
    "train.adapters": ("merge_checkpoint", "save_adapters"),
    "train.loop": ("Callbacks", "fit"),
    "train.losses": ("next_token_loss",),
    "train.methods": ("train_adapters", "train_weights"),
    "train.optimizer": ("make_optimizer", "make_schedule"),
    "train.run": ("run",),
    "train.run_config": ("RunConfig",),
    "train.state": ("TrainState", "init_state"),
    "train.step": ("make_train_step",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: PLE0604
    "__version__",
    *_HOME_OF,
]


def __getattr__(name: str) -> _Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'llama_jax' has no attribute {name!r}")
    value = getattr(_importlib.import_module(f"llama_jax.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})


# `kernels/` and `conversion/` are next to this package in a checkout, and inside it
# once installed. After a plain `pip install .`, Python run in the checkout imports this
# folder first, and needs the two from the checkout as well.
_root = _pathlib.Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").exists() and (_root / "kernels/__init__.py").exists():
    __path__.append(str(_root))
