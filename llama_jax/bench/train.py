"""Training: time of a step, next to the chip's peak, matrix products, and PyTorch."""

import dataclasses
import importlib
import statistics
import time
import types
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from llama_jax.bench.machine import MatmulRate, measure_matmul_rate
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
from llama_jax.sharding import activation_spec
from llama_jax.train.losses import trained_loss
from llama_jax.train.optimizer import make_optimizer
from llama_jax.train.state import init_state
from llama_jax.train.step import make_train_step
from llama_jax.types import Mesh

PeerName = Literal["torch"]

_RATE, _B1, _B2, _EPS, _DECAY, _CLIP = 3e-4, 0.9, 0.95, 1e-5, 0.1, 1.0
_WARMUP = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """The same step of another library, alternating with ours.

    Attributes:
      name: of the library, with its version.
      seconds: of the median step.
      tokens_per_s: in the median step.
      speedup: its seconds divided by ours.
    """

    name: str
    seconds: float
    tokens_per_s: float
    speedup: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainReport:
    """A step of AdamW on all weights, with gradient clipping.

    Attributes:
      params: number of the model's parameters.
      flops: of a step, without recomputation.
      compile_seconds: of the first step, minus the median step.
      seconds: of the median step.
      best_seconds: of the fastest step.
      tokens_per_s: in the median step.
      gflops_per_s: of all devices, in the median step.
      matmul: the fastest matrix product of one device, measured in the same run.
      ratio: `gflops_per_s` per device divided by that of `matmul`.
      mfu: model FLOPs utilization; None if the chip's peak is unknown.
      peer: another library's step; None unless requested.
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
    against: PeerName | None = None,
) -> TrainReport:
    """Measure steps on random weights and tokens, after others that warm up.

    Args:
      config: the model.
      runtime: how the model runs.
      batch: rows of a step.
      seq: tokens per row.
      steps: number of steps to measure.
      mesh: devices; by default jax's default device.
      against: library that trains the same shape in the same dtype on the CPU, its
        steps alternating with ours.

    Raises:
      ConfigError: the other library is not installed.
    """
    theirs = None if against is None else torch_step(config, runtime, batch, seq)
    rate = measure_matmul_rate(config, batch * seq, runtime.dtype)
    ours, params = our_step(config, runtime, batch, seq, mesh)
    start = time.perf_counter()
    ours()
    first = time.perf_counter() - start
    for _ in range(_WARMUP - 1):
        ours()
    name, run = theirs or ("", None)
    if run:
        for _ in range(_WARMUP):
            run()
    times: list[float] = []
    their_times: list[float] = []
    for _ in range(steps):
        # Alternating, since the load of the machine changes.
        times.append(_seconds(ours))
        if run:
            their_times.append(_seconds(run))
    median = statistics.median(times)
    peer = None
    if run:
        their_median = statistics.median(their_times)
        peer = Peer(
            name=name,
            seconds=their_median,
            tokens_per_s=batch * seq / their_median,
            speedup=their_median / median,
        )
    devices = 1 if mesh is None else mesh.size
    flops = train_flops(config, batch, seq)
    peak = local_topology().chip.flops.get(runtime.dtype)
    per_device = flops / median / devices
    return TrainReport(
        params=params,
        flops=flops,
        compile_seconds=first - median,
        seconds=median,
        best_seconds=min(times),
        tokens_per_s=batch * seq / median,
        gflops_per_s=flops / median / 1e9,
        matmul=rate,
        ratio=per_device / 1e9 / rate.gflops,
        mfu=per_device / peak if peak else None,
        peer=peer,
    )


def our_step(
    config: LlamaConfig,
    runtime: Runtime,
    batch: int,
    seq: int,
    mesh: Mesh | None = None,
) -> tuple[Callable[[], None], int]:
    """A function that runs a step, and the number of parameters."""
    model = Llama(config, runtime, mesh)
    optimizer = make_optimizer(
        _RATE, b1=_B1, b2=_B2, eps=_EPS, weight_decay=_DECAY, clip=_CLIP
    )
    step = make_train_step(trained_loss(model), optimizer)
    state = init_state(init_params(model, jax.random.key(0)), optimizer)
    rows = _rows(config, batch, seq)
    if mesh is not None:
        spec = activation_spec((batch, seq), "B T", runtime.rules, mesh)
        rows = jax.device_put(rows, NamedSharding(mesh, spec))

    def run() -> None:
        nonlocal state
        state, metrics = step(state, {}, rows)
        jax.block_until_ready((state, metrics))

    return run, count_params(state.params)


def torch_step(
    config: LlamaConfig, runtime: Runtime, batch: int, seq: int
) -> tuple[str, Callable[[], None]]:
    """The name of PyTorch, and a function that runs the same step with it.

    It runs eagerly on the CPU, the model of `transformers` with all its defaults.

    Raises:
      ConfigError: PyTorch or transformers is not installed.
    """
    torch, transformers = _import("torch"), _import("transformers")
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
        dtype = getattr(torch, runtime.dtype)
        narrow = runtime.dtype != runtime.weight_dtype
        with torch.autocast("cpu", dtype=dtype, enabled=narrow):
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


def _import(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"--against torch: {name} is not installed; pip install torch transformers"
        ) from error
