"""Accelerators by name: memory, peak rates and links of each."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from llama_jax.runtime import DType

Links = Literal["torus", "host"]

_GIB = 1 << 30
_MIB = 1 << 20
_GPU_USABLE = 0.9
DEFAULT_GPU_FRACTION = 0.75
"""Fraction of a GPU's memory that jax allocates by default; the environment variable
XLA_PYTHON_CLIENT_MEM_FRACTION changes it (docs.jax.dev, "GPU memory allocation")."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator, as its vendor describes it.

    Attributes:
      name: as written in a topology.
      kinds: prefixes of jax's `device_kind` that identify it.
      hbm_bytes: memory on the chip.
      limit_bytes: the part of it that a program can use.
      hbm_bandwidth: bytes/s; None if unknown.
      flops: peak dense FLOP/s by dtype; a multiply-add counts as two. An absent dtype
        is slow (T4: bfloat16) or its rate is unknown.
      links: "torus" if neighbours are connected along each dimension of the topology,
        "host" if all chips of a host are connected and hosts share a network.
      link_bandwidth: bytes/s in one direction; per link of a torus, or from one chip to
        all others of its host together.
      ring: torus dimensions that are a multiple of this many chips wrap around.
      network_bandwidth: bytes/s in one direction between hosts, per chip.
      dimensions: number of dimensions in a topology's name.
      flash: whether a flash attention kernel exists for it.
    """

    name: str
    kinds: tuple[str, ...]
    hbm_bytes: int
    limit_bytes: int
    hbm_bandwidth: float | None
    flops: Mapping[str, float]
    links: Links
    link_bandwidth: float
    ring: int = 1
    network_bandwidth: float = 0.0
    dimensions: int = 2
    flash: bool = True

    @property
    def dtype(self) -> DType:
        """The fast dtype to compute in: bfloat16, else float16, else float32."""
        for dtype in ("bfloat16", "float16"):
            if dtype in self.flops:
                return dtype
        return "float32"

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU of the table."""
        return self.links == "host" and bool(self.flops)


def _tpu(
    name: str,
    kind: str,
    *,
    hbm: float,
    limit: float,
    gbps: float,
    tflops: float,
    link: float,
    dimensions: int,
) -> Chip:
    return Chip(
        name=name,
        kinds=(kind,),
        hbm_bytes=int(hbm * _GIB),
        limit_bytes=int(limit * _GIB),
        hbm_bandwidth=gbps * 1e9,
        # float32 means float32 (`kernels.precision`): six bfloat16 products.
        flops={"bfloat16": tflops * 1e12, "float32": tflops * 1e12 / 6},
        links="torus",
        link_bandwidth=link * 1e9,
        ring=16 if dimensions == 2 else 4,
        dimensions=dimensions,
    )


def _gpu(
    name: str,
    *kinds: str,
    mib: int,
    gbps: float,
    tflops: float,
    tflops_float32: float,
    link: float,
    network: float,
    bfloat16: bool = True,
) -> Chip:
    flops = {"float16": tflops * 1e12, "float32": tflops_float32 * 1e12}
    if bfloat16:
        flops["bfloat16"] = tflops * 1e12
    return Chip(
        name=name,
        kinds=kinds,
        hbm_bytes=mib * _MIB,
        limit_bytes=int(mib * _MIB * _GPU_USABLE),
        hbm_bandwidth=gbps * 1e9,
        flops=flops,
        links="host",
        link_bandwidth=link * 1e9,
        network_bandwidth=network * 1e9,
        flash=bfloat16,
    )


# TPUs: cloud.google.com/tpu/docs, pages v4, v5e, v5p and v6e: peak, memory, memory
# bandwidth, and total interconnect bandwidth per chip, divided by its number of links
# (v4 and v5p: six; v5e and v6e: four): v5e 1,600 and v6e 3,200 Gbit/s over four, v5p
# 4,800 over six. v4's total (2,400) has not been checked again and may be less exact.
# A dimension wraps around in v5e and v6e if it spans the whole pod (16), in v4 and v5p
# if it consists of whole cubes of 4. `limit` is the limit that libtpu 0.0.52 reports
# when a program that needs 256 GiB is compiled; for v4 it reports each of the two cores
# (15.25), which jax uses as one device.
#
# GPUs: NVIDIA's data sheets of the SXM modules (T4 and L4: PCIe cards), without
# sparsity; memory as nvidia-smi reports it, a tenth of which is reserved for CUDA, its
# libraries and fragmentation. `link` is half of NVLink's published total (600 GB/s
# A100, 900 H100 and H200), or a PCIe slot (3.0 x16 T4, 4.0 x16 L4: 16 and 32 GB/s in
# one direction). `network`: one 400 Gbit/s port per H100 or H200 and one 200 Gbit/s
# port per A100, as in NVIDIA's DGX systems; otherwise 100 Gbit/s per host of eight.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        _tpu("v4", "TPU v4", hbm=32, limit=30.5, gbps=1200, tflops=275, link=50,
             dimensions=3),
        _tpu("v5e", "TPU v5 lite", hbm=16, limit=15.75, gbps=819, tflops=197, link=50,
             dimensions=2),
        _tpu("v5p", "TPU v5", hbm=96, limit=95.73, gbps=2765, tflops=459, link=100,
             dimensions=3),
        _tpu("v6e", "TPU v6 lite", hbm=32, limit=31.24, gbps=1600, tflops=918,
             link=100, dimensions=2),
        _gpu("t4", "Tesla T4", "NVIDIA T4", mib=15360, gbps=320, tflops=65,
             tflops_float32=8.1, link=16, network=1.5, bfloat16=False),
        _gpu("l4", "NVIDIA L4", mib=23034, gbps=300, tflops=121, tflops_float32=30.3,
             link=32, network=1.5),
        _gpu("a100-40", "NVIDIA A100-SXM4-40", "NVIDIA A100-PCIE-40", mib=40960,
             gbps=1555, tflops=312, tflops_float32=19.5, link=300, network=25),
        _gpu("a100-80", "NVIDIA A100-SXM4-80", "NVIDIA A100 80GB", mib=81920,
             gbps=2039, tflops=312, tflops_float32=19.5, link=300, network=25),
        _gpu("h100", "NVIDIA H100", mib=81041, gbps=3350, tflops=989,
             tflops_float32=67, link=450, network=50),
        _gpu("h200", "NVIDIA H200", mib=143771, gbps=4800, tflops=989,
             tflops_float32=67, link=450, network=50),
    )
}  # fmt: skip
"""Every accelerator that a topology can name."""
