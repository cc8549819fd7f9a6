"""Training: seconds of a step, beside the chip's peak, products alone, and PyTorch."""

import dataclasses
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from llama_jax.bench.machine import MatmulRate, matmul_rate
from llama_jax.config import LlamaConfig
from llama_jax.conversion.huggingface_config import config_to_hugging_face
from llama_jax.data.batch import Batch
from llama_jax.errors import ConfigError
from llama_jax.model.init import init_params
from llama_jax.model.transformer import Llama
from llama_jax.params import count_params
from llama_jax.planning.flops import train_flops
from llama_jax.planning.topology import local_topology
from llama_jax.runtime import Runtime
from llama_jax.sharding import divisible
from llama_jax.train.loss import next_token_loss
from llama_jax.train.optimizer import make_optimizer
from llama_jax.train.state import init_state
from llama_jax.train.step import make_train_step
from llama_jax.types import Mesh

Rival = Literal["torch"]

_RATE, _B1, _B2, _EPS, _DECAY, _CLIP = 3e-4, 0.9, 0.95, 1e-5, 0.1, 1.0
_WARM = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """The same step of another library, run in turns with ours.

    Attributes:
      name: of the library, with its version.
      seconds: of its middle step.
      tokens_per_s: in that step.
      speedup: its seconds as a multiple of ours.
    """

    name: str
    seconds: float
    tokens_per_s: float
    speedup: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainReport:
    """A step of AdamW on all weights, whose gradients are clipped.

    Attributes:
      params: of the model.
      flops: operations of a step, nothing being computed again.
      compile_seconds: of the first step, which compiles, less the middle one.
      seconds: of the middle step.
      best_seconds: of the fastest.
      tokens_per_s: in the middle step.
      gflops_per_s: of all devices in the middle step.
      matmul: the fastest matrix product of one device, measured in the same run.
      ratio: `gflops_per_s` of each device as a part of that.
      mfu: as a part of what the chip's maker promises; None where that is not known.
      peer: another library's step; None where none was asked for.
    """

    params: int
    flops: float
    compile_seconds: float
    seconds: float
    best_seconds: float
    tokens_per_s: float
    gflops_per_s: float
    matmul: MatmulRate
    ratio: float
    mfu: float | None
    peer: Peer | None


def measure_train(
    config: LlamaConfig,
    runtime: Runtime,
    *,
    batch: int,
    seq: int,
    steps: int,
    mesh: Mesh | None = None,
    against: Rival | None = None,
) -> TrainReport:
    """Train random weights on random tokens, after steps that warm up.

    Args:
      config: of the model.
      runtime: how it is run.
      batch: rows of a step.
      seq: tokens of a row.
      steps: to measure.
      mesh: devices; jax's default one where not given.
      against: who trains the same shape in turns, in the same dtype, on the CPU.

    Raises:
      ConfigError: the other library is not installed.
    """
    theirs = None if against is None else torch_step(config, runtime, batch, seq)
    rate = matmul_rate(config, batch * seq, runtime.dtype)
    ours, params = our_step(config, runtime, batch, seq, mesh)
    start = time.perf_counter()
    ours()
    first = time.perf_counter() - start
    for _ in range(_WARM - 1):
        ours()
    name, run = theirs or ("", None)
    if run:
        for _ in range(_WARM):
            run()
    times: list[float] = []
    their_times: list[float] = []
    for _ in range(steps):
        # In turns, since other programs come and go.
        times.append(_seconds(ours))
        if run:
            their_times.append(_seconds(run))
    middle = statistics.median(times)
    peer = None
    if run:
        other = statistics.median(their_times)
        peer = Peer(
            name=name,
            seconds=other,
            tokens_per_s=batch * seq / other,
            speedup=other / middle,
        )
    devices = 1 if mesh is None else mesh.size
    flops = train_flops(config, batch, seq)
    peak = local_topology().chip.flops.get(runtime.dtype)
    of_each = flops / middle / devices
    return TrainReport(
        params=params,
        flops=flops,
        compile_seconds=first - middle,
        seconds=middle,
        best_seconds=min(times),
        tokens_per_s=batch * seq / middle,
        gflops_per_s=flops / middle / 1e9,
        matmul=rate,
        ratio=of_each / 1e9 / rate.gflops,
        mfu=of_each / peak if peak else None,
        peer=peer,
    )


def our_step(
    config: LlamaConfig,
    runtime: Runtime,
    batch: int,
    seq: int,
    mesh: Mesh | None = None,
) -> tuple[Callable[[], None], int]:
    """A function that does a step, and how many weights it trains."""
    model = Llama(config, runtime, mesh)
    optimizer = make_optimizer(
        _RATE, b1=_B1, b2=_B2, eps=_EPS, weight_decay=_DECAY, clip=_CLIP
    )
    step = make_train_step(
        lambda params, _, batch: next_token_loss(model, params, batch), optimizer
    )
    state = init_state(init_params(model, jax.random.key(0)), optimizer)
    rows = _rows(config, batch, seq)
    if mesh is not None:
        spec = divisible((batch, seq), "B T", runtime.rules, mesh)
        rows = jax.device_put(rows, NamedSharding(mesh, spec))

    def run() -> None:
        nonlocal state
        state, metrics = step(state, {}, rows)
        jax.block_until_ready((state, metrics))

    return run, count_params(state.params)


def torch_step(
    config: LlamaConfig, runtime: Runtime, batch: int, seq: int
) -> tuple[str, Callable[[], None]]:
    """What PyTorch is called, and a function that does the same step with it.

    Eagerly, with the model of `transformers` and all its defaults, on the CPU.

    Raises:
      ConfigError: one of the two is not installed.
    """
    torch, transformers = _imported("torch"), _imported("transformers")
    fields = config_to_hugging_face(config, runtime.dtype, {"bos": 1, "eos": 2})
    with torch.random.fork_rng():
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    model.to(getattr(torch, runtime.weight_dtype)).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_RATE, betas=(_B1, _B2), eps=_EPS, weight_decay=_DECAY
    )
    rows = _rows(config, batch, seq)
    tokens = torch.tensor(np.asarray(rows.tokens, np.int64))
    targets = torch.tensor(np.asarray(rows.targets, np.int64)).flatten()

    def run() -> None:
        optimizer.zero_grad()
        kind = getattr(torch, runtime.dtype)
        narrow = runtime.dtype != runtime.weight_dtype
        with torch.autocast("cpu", dtype=kind, enabled=narrow):
            logits = model(tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()

    version = f"PyTorch {torch.__version__}, transformers {transformers.__version__}"
    return version, run


def _rows(config: LlamaConfig, batch: int, seq: int) -> Batch:
    draw = np.random.default_rng(0)
    ids = draw.integers(config.vocab_size, size=(batch, seq + 1), dtype=np.int32)
    return Batch(
        tokens=jnp.asarray(ids[:, :-1]),
        targets=jnp.asarray(ids[:, 1:]),
        loss_mask=jnp.ones((batch, seq), jnp.float32),
        segment_ids=jnp.ones((batch, seq), jnp.int32),
        positions=jnp.tile(jnp.arange(seq, dtype=jnp.int32), (batch, 1)),
    )


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"--against torch: {name} is not installed; pip install torch transformers"
        ) from error
