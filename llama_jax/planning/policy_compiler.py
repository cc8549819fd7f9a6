"""Compile the programs of policy optimization for chips that need not be present."""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh, NamedSharding

from llama_jax.model.lora import Lora, adapt, lora_shapes
from llama_jax.model.quantize import quantized_shapes
from llama_jax.model.transformer import Llama, ScalarModel
from llama_jax.params import SCALAR_HEAD, param_shapes
from llama_jax.planning.compiler import parse_out_of_memory
from llama_jax.planning.policy import Phase, PolicyPlan, PolicyWork
from llama_jax.planning.programs import (
    Lowerable,
    choose_attention,
    decode_program,
    shard_bytes,
    shard_weights,
)
from llama_jax.planning.workload import Workload
from llama_jax.rlhf.policy import PolicyBatch
from llama_jax.rlhf.policy_config import PolicyConfig
from llama_jax.rlhf.policy_models import PolicyModels
from llama_jax.runtime import Runtime
from llama_jax.sharding import activation_spec, make_mesh
from llama_jax.train.losses import next_token_loss, trained_loss
from llama_jax.train.methods import Method
from llama_jax.train.state import state_shapes
from llama_jax.train.step import make_train_step
from llama_jax.types import Params, PyTree


class CompiledPhase(NamedTuple):
    """The program of a phase, as compiled.

    Attributes:
      temporary: bytes on each chip besides its arguments, with outputs and code; what
        the program needs in all if the compiler ran out of memory and says so.
      seconds: time of tracing, lowering and compiling.
      out_of_memory: the compiler's error message if it ran out of memory.
    """

    temporary: int
    seconds: float
    out_of_memory: str | None = None


class CompiledPolicy(NamedTuple):
    """Policy optimization as compiled for its chips.

    Attributes:
      plan: by formula.
      stored: bytes on each chip by model, of the arrays that the programs take; names
        as in `PolicyPlan.stored`.
      phases: sampling (a step of decoding), scoring and the update.
      sampling: bytes on each chip of the policy's copy for sampling and its cache.
    """

    plan: PolicyPlan
    stored: Mapping[str, int]
    phases: Mapping[Phase, CompiledPhase]
    sampling: int

    @property
    def temporary(self) -> dict[Phase, int]:
        """Bytes on each chip that a phase needs besides what is stored."""
        sizes = {name: phase.temporary for name, phase in self.phases.items()}
        return sizes | {"sample": sizes["sample"] + self.sampling}

    @property
    def total(self) -> int:
        """The largest number of bytes on a chip, over all phases."""
        return sum(self.stored.values()) + max(self.temporary.values())

    @property
    def fits(self) -> bool:
        """Whether all phases compiled and are within the limit."""
        failed = any(phase.out_of_memory for phase in self.phases.values())
        return not failed and self.total <= self.plan.limit_bytes


def compile_policy(plan: PolicyPlan, devices: Sequence[jax.Device]) -> CompiledPolicy:
    """Compile the programs of an iteration.

    Args:
      plan: workload and mesh.
      devices: as many as the mesh has; they need not be present.

    Raises:
      MeshError: the mesh does not divide the model.
    """
    work, mesh = plan.work, make_mesh(plan.mesh, devices)
    policy, critic = _methods(work, mesh)
    config = PolicyConfig(
        steps=1,
        batch_size=work.answers,
        mini_batch=work.update.batch,
        max_new_tokens=work.new_tokens,
        seq_length=work.update.seq,
    )
    models = PolicyModels(config, policy, critic)
    optimizer = config.make_optimizer(1)
    shapes = {"policy": policy.shapes, "critic": critic.shapes}
    state = state_shapes(shapes, optimizer, mesh)
    frozen = {"base": policy.frozen, "reference": policy.shapes}
    batch = _batch(work, mesh)
    step = make_train_step(models.loss, optimizer)
    reward_model = _reward_model(work, mesh)
    stored = {
        "base": shard_bytes(policy.frozen),
        "policy": shard_bytes(policy.shapes),
        "reference": shard_bytes(policy.shapes),
        "critic": shard_bytes(critic.shapes),
        "reward model": shard_bytes(reward_model),
        "optimizer": shard_bytes(state.opt_state),
    }
    decoding, sampled = _decoding(work, mesh)
    score = jax.jit(models.logprobs)
    phases: dict[Phase, CompiledPhase] = {
        "sample": decoding,
        "score": _compile(score, policy.shapes, policy.frozen, batch),
        "update": _compile(step, state, frozen, batch),
    }
    used = {name: size for name, size in stored.items() if size}
    return CompiledPolicy(plan, used, phases, sampled)


def _compile(function: Lowerable, *arguments: object) -> CompiledPhase:
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    try:
        memory = lowered.compile().memory_analysis()
    except JaxRuntimeError as error:
        out_of_memory = parse_out_of_memory(str(error))
        if out_of_memory is None:
            raise
        message, needed = out_of_memory
        return CompiledPhase(needed or 0, time.perf_counter() - start, message)
    assert memory is not None
    outputs = int(memory.output_size_in_bytes) - int(memory.alias_size_in_bytes)
    temporary = int(memory.temp_size_in_bytes) + max(outputs, 0)
    code = int(memory.generated_code_size_in_bytes)
    return CompiledPhase(temporary + code, time.perf_counter() - start)


def _methods(work: PolicyWork, mesh: Mesh) -> tuple[Method, Method]:
    """Policy and critic, with shapes in place of arrays."""
    update = work.update
    runtime = _training_runtime(update, mesh)
    config = update.config
    models = (
        Llama(config, runtime, mesh),
        ScalarModel(config.replace(head="scalar"), runtime, mesh),
    )
    lora, base = None, {}
    if work.has_adapters:
        lora = Lora(rank=update.rank, alpha=float(update.rank))
        base = shard_weights(_frozen(update, runtime), models[0], mesh)
    policy, critic = (_method(model, update, lora, base) for model in models)
    return policy, critic


def _method(
    model: Llama | ScalarModel, update: Workload, lora: Lora | None, base: Params
) -> Method:
    assert model.mesh is not None
    shapes = _trained(model, update, lora)
    sharded = shard_weights(shapes, model, model.mesh)
    return Method(
        model=model,
        shapes=sharded,
        init=lambda: sharded,
        frozen=base,
        loss=trained_loss(model, next_token_loss, lora),
        lora=lora,
    )


def _trained(
    model: Llama | ScalarModel, update: Workload, lora: Lora | None
) -> dict[str, PyTree]:
    if lora is None:
        dtype = jnp.dtype(update.param_dtype)
        return param_shapes(model.config, "stacked", dtype=dtype)
    shapes = lora_shapes(model.config, lora, dtype=update.param_dtype)
    if model.config.head == "scalar":
        head = jax.ShapeDtypeStruct((model.config.embed_dim,), update.param_dtype)
        shapes[SCALAR_HEAD] = head
    return shapes


def _frozen(update: Workload, runtime: Runtime) -> dict[str, PyTree]:
    if update.quantize != "none":
        return quantized_shapes(update.config, runtime, update.quantize)
    dtype = jnp.dtype(update.dtype)
    return param_shapes(update.config, runtime.layer_layout, dtype=dtype)


def _training_runtime(update: Workload, mesh: Mesh) -> Runtime:
    return Runtime(
        dtype=update.dtype,
        param_dtype=update.param_dtype if update.task == "train" else update.dtype,
        attention=choose_attention(update, mesh.devices.flat[0]),
        layer_layout="stacked",
        remat=update.remat,
        rules=update.rules,
    )


def _reward_model(work: PolicyWork, mesh: Mesh) -> Params:
    """What a reward model stores: adapters with a head, or all its weights."""
    update, scalar = work.update, work.scalar.config
    if work.has_adapters:
        model = ScalarModel(scalar, _training_runtime(update, mesh), mesh)
        lora = Lora(rank=update.rank, alpha=float(update.rank))
        shapes = _trained(model, update.replace(param_dtype="float32"), lora)
    else:
        model = ScalarModel(scalar, Runtime(dtype=update.dtype), mesh)
        shapes = param_shapes(scalar, "unrolled", dtype=jnp.dtype(update.dtype))
    return shard_weights(shapes, model, mesh)


def _batch(work: PolicyWork, mesh: Mesh) -> PolicyBatch:
    shape = (work.update.batch, work.update.seq)
    spec = activation_spec(shape, "B T", work.update.rules, mesh)
    sharding = NamedSharding(mesh, spec)

    def array(dtype: jnp.dtype) -> PyTree:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    ids, floats = array(jnp.dtype("int32")), array(jnp.dtype("float32"))
    return PolicyBatch(ids, ids, array(jnp.dtype("bool")), *[floats] * 5)


def _decoding(work: PolicyWork, mesh: Mesh) -> tuple[CompiledPhase, int]:
    """Compile a step of decoding; also the bytes of the policy's copy and its cache."""
    decode = work.inference("decode")
    runtime = Runtime(
        dtype=decode.dtype,
        attention=choose_attention(decode, mesh.devices.flat[0]),
        rules=decode.rules,
    )
    model = Llama(decode.config, runtime, mesh)
    params = _frozen(decode, runtime)
    if work.has_adapters:
        lora = Lora(rank=decode.rank, alpha=float(decode.rank))
        adapters = lora_shapes(decode.config, lora, layout="unrolled")
        params = adapt(params, adapters, lora.scaling)
    params = shard_weights(params, model, mesh)
    program = decode_program(decode, model, mesh, params)
    phase = _compile(program.function, *program.arguments)
    return phase, sum(map(shard_bytes, program.kinds.values()))
