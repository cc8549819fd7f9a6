"""Devices that are not there, for which programs can be compiled all the same."""

import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies

from llama_jax.errors import MeshError

# What libtpu must find in the environment of a host without a TPU: it would ask the
# cloud's metadata server, and wait for other processes to leave the chip.
_HOST_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu_devices(name: str) -> list[Any]:
    """The devices of a TPU slice, as placements of arguments in ahead-of-time compiles.

    `jax.jit(f).lower(shapes).compile()`, with shapes whose sharding names these
    devices, runs the TPU's real compiler, which refuses what would not fit. Nothing
    can be run on them. On a host without a TPU this sets what libtpu wants to know in
    the process's environment, which libtpu reads once: call it before anything else
    uses libtpu.

    Args:
      name: generation and chips, such as `v5e:2x2`, `v6e:4x4` or `v5p:2x2x1`.

    Raises:
      ImportError: libtpu is not installed.
      MeshError: libtpu knows no such slice.
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
    except Exception as error:  # the plugin raises what XLA's status happens to be
        raise MeshError(
            f"there is no TPU slice {name!r}, or libtpu cannot say ({error}); "
            "write generation and chips, such as v5e:2x2"
        ) from error


def gpu_devices(name: str, target_config: str) -> list[Any]:
    """The devices of a GPU cluster, as placements of arguments like `tpu_devices`'s.

    XLA:GPU compiles for them on any host, down to machine code, Pallas kernels too,
    but for what calls cuDNN, which needs its library. Triton kernels must be lowered
    in `jax.sharding.use_abstract_mesh` of a mesh whose `abstract_device` is the GPU.

    Args:
      name: slices, hosts and GPUs of each, such as `1x1x8`, or `1x2x8` for sixteen.
      target_config: the GPU, as the text of an XLA `GpuTargetConfigProto`; what
        `--xla_dump_to` writes as `*.gpu_target_config.pbtxt` where there is such a GPU.

    Raises:
      ImportError: XLA's GPU plugin is not installed.
      MeshError: the name or the text says nothing to the plugin.
    """
    if not any(map(_is_there, ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"))):
        raise ImportError(
            "compiling for a GPU needs XLA's plugin of jax's own version; pip install "
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
    except Exception as error:  # the plugin raises what XLA's status happens to be
        raise MeshError(
            f"there are no GPUs {name!r} of this target_config ({error}); write "
            "slices, hosts and GPUs of each, such as 1x1x8"
        ) from error


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of what it would be in
        return False
