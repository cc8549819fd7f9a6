"""Devices to compile for that need not be present."""

import importlib.util
import inspect
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, use_abstract_mesh

from llama_jax.errors import MeshError
from llama_jax.planning.gpu_target_config import target_config
from llama_jax.planning.topology import Topology

# Environment of libtpu on a host without a TPU. Without it, libtpu would query the
# cloud's metadata server and wait for other processes to release the chip.
_HOST_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def target_devices(
    topology: Topology, *, gpu_config: str | None = None
) -> Sequence[jax.Device]:
    """The devices of a topology, to compile for; nothing can run on them.

    Args:
      topology: of TPUs or NVIDIA GPUs.
      gpu_config: the GPU as text (see `gpu_devices`); by default from the table.

    Raises:
      MeshError: the compiler is not installed, or does not know these chips.
    """
    try:
        if topology.chip.links == "torus":
            return tpu_devices(str(topology))
        text = gpu_config or target_config(topology.chip)
        return gpu_devices("x".join(map(str, (1, *topology.shape))), text)
    except ImportError as error:
        raise MeshError(f"--compile for {topology}: {error}") from error


def tpu_devices(name: str) -> list[jax.Device]:
    """Return the devices of a TPU slice, for ahead-of-time compilation.

    `jax.jit(f).lower(shapes).compile()` with shapes sharded over these devices runs the
    real TPU compiler, which rejects programs that do not fit. Nothing can run on them.
    On a host without a TPU this sets variables in the process's environment, which
    libtpu reads once: call it before anything else uses libtpu.

    Args:
      name: generation and shape, such as `v5e:2x2`, `v6e:4x4` or `v5p:2x2x1`.

    Raises:
      ImportError: libtpu is not installed.
      MeshError: libtpu does not know this slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "compiling for a TPU needs its compiler; pip install libtpu (Linux, x86)"
        )
    if jax.default_backend() != "tpu":
        for variable, value in _HOST_WITHOUT_TPU.items():
            os.putenv(variable, value)  # for the C library alone
    try:
        return list(topologies.get_topology_desc(name, platform="tpu").devices)
    except Exception as error:  # the type depends on XLA's status
        raise MeshError(
            f"topology {name!r}: libtpu does not know this slice ({error}); write "
            "generation and shape, such as v5e:2x2"
        ) from error


def gpu_devices(name: str, target_config: str) -> list[jax.Device]:
    """Return the devices of a GPU cluster, for ahead-of-time compilation.

    XLA:GPU compiles for them on any host, down to machine code, including Pallas
    kernels, but not calls of cuDNN, which need its library. Lower Triton kernels inside
    `jax.sharding.use_abstract_mesh` of a mesh whose `abstract_device` is the GPU.

    Args:
      name: slices, hosts per slice and GPUs per host, such as `1x1x8` for eight GPUs,
        or `1x2x8` for sixteen.
      target_config: the GPU as the text of an XLA `GpuTargetConfigProto`; on a host
        with such a GPU, `--xla_dump_to` writes it as `*.gpu_target_config.pbtxt`.

    Raises:
      ImportError: XLA's GPU plugin is not installed.
      MeshError: the plugin does not understand the name or the text.
    """
    if not any(
        map(_is_installed, ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"))
    ):
        raise ImportError(
            "compiling for a GPU needs XLA's plugin in jax's version; pip install "
            "--no-deps jax-cuda13-plugin jax-cuda13-pjrt (Linux; no CUDA is needed)"
        )
    try:
        described = topologies.get_topology_desc(
            topology_name="",
            platform="cuda",
            topology=name,
            target_config=target_config,
        )
        return list(described.devices)
    except Exception as error:  # the type depends on XLA's status
        raise MeshError(
            f"topology {name!r}: XLA's GPU plugin does not accept it or the "
            f"target_config ({error}); write slices, hosts and GPUs, such as 1x1x8"
        ) from error


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def abstract_device(
    kind: str, *, num_cores: int, platform: str
) -> AbstractContextManager[object]:
    """A context in which kernels are traced and lowered for a device.

    Kernels that ask for their device find this one. jax 0.7 has no such description,
    and its kernels do not ask.

    Args:
      kind: jax's `device_kind`.
      num_cores: TensorCores of a TPU, multiprocessors of a GPU.
      platform: "tpu" or "cuda".
    """
    make_device = getattr(jax.sharding, "AbstractDevice", None)
    if make_device is None:
        return nullcontext()
    facts = {"device_kind": kind, "num_cores": num_cores}
    if "platform" in inspect.signature(make_device).parameters:
        facts["platform"] = platform
    elif platform != "tpu":
        return nullcontext()  # this jax describes TPUs only
    mesh = AbstractMesh((), (), abstract_device=make_device(**facts))
    return use_abstract_mesh(mesh)
