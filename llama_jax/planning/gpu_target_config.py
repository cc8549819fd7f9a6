"""Descriptions of NVIDIA GPUs for XLA's compiler, to compile without a GPU."""

from typing import NamedTuple

from llama_jax.errors import MeshError
from llama_jax.planning.chips import Chip


class Multiprocessors(NamedTuple):
    """The streaming multiprocessors of a GPU.

    Attributes:
      capability: compute capability, such as `(9, 0)`.
      cores: number of multiprocessors.
      lanes: float32 units per multiprocessor.
      threads: resident threads per multiprocessor.
      shared_kib: KiB of shared memory per multiprocessor.
      block_kib: KiB of shared memory that a thread block can request.
      cache_mib: MiB of the L2 cache.
      ghz: highest clock rate.
      description: the name that NVIDIA's driver reports.
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


# Multiprocessors, cache and clock: NVIDIA's data sheets and architecture white papers.
# Threads and shared memory: the table of compute capabilities in the CUDA C++
# Programming Guide (from 8.0 on, a block can have 1 KiB less than a multiprocessor).
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
    """The multiprocessors of a GPU.

    Raises:
      MeshError: the GPU is not in the table.
    """
    if chip.name not in _GPUS:
        raise MeshError(
            f"--compile: the multiprocessors of {chip.name} are unknown; describe "
            "the GPU in a file and pass it as --gpu-target-config"
        )
    return _GPUS[chip.name]


def target_config(chip: Chip) -> str:
    """Describe a GPU as the text of XLA's `GpuTargetConfigProto`.

    Raises:
      MeshError: the GPU is not in the table.
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
