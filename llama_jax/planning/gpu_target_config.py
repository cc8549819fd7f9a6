"""NVIDIA's GPUs as XLA's compiler wants to know them, for compiling without one."""

from typing import NamedTuple

from llama_jax.errors import MeshError
from llama_jax.planning.chips import Chip


class Multiprocessors(NamedTuple):
    """What a GPU computes with.

    Attributes:
      capability: compute capability, as `(9, 0)`.
      cores: streaming multiprocessors.
      lanes: float32 units of each.
      threads: that each can have at once.
      shared_kib: KiB of shared memory of each.
      block_kib: KiB that a block of threads may ask for.
      cache_mib: MiB of the second-level cache.
      ghz: highest clock.
      description: the name that NVIDIA's driver gives it.
    """

    capability: tuple[int, int]
    cores: int
    lanes: int
    threads: int
    shared_kib: int
    block_kib: int
    cache_mib: int
    ghz: float
    description: str


# NVIDIA's data sheets and architecture white papers (multiprocessors, cache, clock),
# and the table of compute capabilities in the CUDA C++ Programming Guide (threads and
# shared memory; of a block's at most 1 KiB less than a multiprocessor's, from 8.0 on).
_AMPERE = Multiprocessors((8, 0), 108, 64, 2048, 164, 163, 40, 1.41, "")
_HOPPER = Multiprocessors((9, 0), 132, 128, 2048, 228, 227, 50, 1.98, "")
_GPUS = {
    "t4": Multiprocessors((7, 5), 40, 64, 1024, 64, 64, 4, 1.59, "Tesla T4"),
    "l4": Multiprocessors((8, 9), 58, 128, 1536, 100, 99, 48, 2.04, "NVIDIA L4"),
    "a100-40": _AMPERE._replace(description="NVIDIA A100-SXM4-40GB"),
    "a100-80": _AMPERE._replace(description="NVIDIA A100-SXM4-80GB"),
    "h100": _HOPPER._replace(description="NVIDIA H100 80GB HBM3"),
    "h200": _HOPPER._replace(description="NVIDIA H200"),
}


def multiprocessors(chip: Chip) -> Multiprocessors:
    """Of a GPU of the table.

    Raises:
      MeshError: nothing is known of them.
    """
    if chip.name not in _GPUS:
        raise MeshError(
            f"--compile: nothing is known of the multiprocessors of {chip.name}; "
            "name a file that describes them with --gpu-target-config"
        )
    return _GPUS[chip.name]


def target_config(chip: Chip) -> str:
    """A GPU as the text of XLA's `GpuTargetConfigProto`.

    Raises:
      MeshError: nothing is known of its multiprocessors.
    """
    gpu = multiprocessors(chip)
    major, minor = gpu.capability
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 << 10,
        "shared_memory_per_core": gpu.shared_kib << 10,
        "shared_memory_per_block_optin": gpu.block_kib << 10,
        "threads_per_core_limit": gpu.threads,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.lanes,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": int(chip.hbm_bandwidth or 0),
        "l2_cache_size": gpu.cache_mib << 20,
        "clock_rate_ghz": gpu.ghz,
        "device_memory_size": chip.hbm_bytes,
        "registers_per_core_limit": 1 << 16,
        "registers_per_block_limit": 1 << 16,
    }
    fields = " ".join(f"{name}: {value}" for name, value in info.items())
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor} }}"
    return (
        f"gpu_device_info {{ {fields} {capability} }}\n"
        'platform_name: "CUDA"\n'
        "dnn_version_info { major: 9 minor: 8 }\n"
        f'device_description_str: "{gpu.description}"\n'
    )
