"""Accelerators by name: what a chip holds, how fast it is, and how chips are joined.

A topology is written as jax and libtpu write it for TPUs (`v5e:4x4`, `v5p:2x2x1`), and
for GPUs as GPUs of one host (`h100:8`) or hosts by GPUs of each (`h100:2x8`).
"""

import dataclasses
import difflib
import math
import os
from collections.abc import Iterator, Mapping
from typing import Literal

import jax

from llama_jax.errors import MeshError
from llama_jax.runtime import MESH_AXES, DType

Links = Literal["torus", "host"]

_GIB = 1 << 30
_MIB = 1 << 20
_GPU_USABLE = 0.9
DEFAULT_GPU_FRACTION = 0.75
"""Of a GPU's memory, what jax takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says more
(docs.jax.dev, "GPU memory allocation")."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator as its maker describes it.

    Attributes:
      name: as in a topology.
      kinds: how jax's `device_kind` of it begins.
      hbm_bytes: memory on the chip.
      limit_bytes: what a program can have of it.
      hbm_bandwidth: bytes/s; None where it is not known.
      flops: peak dense FLOP/s by dtype, multiplication and addition counted as two; a
        dtype that is absent is not fast (T4: bfloat16) or not known.
      links: "torus" where neighbours are joined in as many dimensions as a topology
        has, "host" where all chips of a host are joined and hosts by a network.
      link_bandwidth: bytes/s in one direction; of each link of a torus, or from one
        chip of a host to the others together.
      ring: of a torus: a dimension of a multiple of this many chips is closed.
      network_bandwidth: bytes/s in one direction between hosts, per chip.
      dimensions: of a topology's name.
      flash: whether attention runs without the matrix of its weights.
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
        """What one computes in here: bfloat16 where it is fast, else float16."""
        for dtype in ("bfloat16", "float16"):
            if dtype in self.flops:
                return dtype
        return "float32"


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
        # float32 means float32 (`linear.matmul_precision`): six bfloat16 products.
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


# TPUs: cloud.google.com/tpu/docs, pages v4, v5e, v5p and v6e: peak, memory, its rate,
# and the traffic of all links of a chip (v4 and v5p six, v5e and v6e four), of which a
# link has its part in each direction: v5e 1,600 and v6e 3,200 Gbit/s over four, v5p
# 4,800 over six. v4's (2,400) was not looked up again and may be less exact. A
# dimension is a ring in v5e and v6e where it is a whole pod's (16), in v4 and v5p where
# it is made of whole cubes of 4. `limit` is what libtpu 0.0.52 says a program has,
# when one that needs 256 GiB is compiled for it; of v4 it says so for each of its two
# cores (15.25), which jax uses as one device.
#
# GPUs: NVIDIA's data sheets of the SXM modules (T4 and L4: PCIe cards), without
# sparsity; memory as nvidia-smi shows it, of which a tenth is kept for CUDA, its
# libraries and fragmentation. `link` is half of NVLink's published total (600 GB/s
# A100, 900 H100 and H200), or of a PCIe slot (3.0 x16 T4, 4.0 x16 L4: 16 and 32 GB/s in
# one direction). `network`: one 400 Gbit/s port for each H100 or H200 and one of 200
# for each A100, as in NVIDIA's DGX systems; 100 Gbit/s for a host of eight otherwise.
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
"""Every accelerator that a topology may name."""

_SLICES = {
    2: ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    3: (
        (1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8),
        (4, 8, 8), (8, 8, 8), (8, 8, 16), (8, 16, 16), (16, 16, 16),
    ),
}  # fmt: skip
_GPU_HOSTS = ((1, 1), (1, 2), (1, 4), (1, 8), *((2**n, 8) for n in range(1, 8)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """So many of one chip, joined in a shape.

    Attributes:
      chip: of which kind.
      shape: of a torus; of GPUs: hosts, and GPUs of each.
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        shape = self.shape
        if self.chip.links == "host" and shape[0] == 1:
            shape = shape[1:]
        return f"{self.chip.name}:{'x'.join(map(str, shape))}"

    def larger(self) -> Iterator["Topology"]:
        """What is sold of the same chip with more of them, smallest first."""
        torus = self.chip.links == "torus"
        shapes = _SLICES[self.chip.dimensions] if torus else _GPU_HOSTS
        for shape in shapes:
            if math.prod(shape) > self.chips:
                yield Topology(chip=self.chip, shape=shape)


def parse_topology(text: str) -> Topology:
    """`v5e:16x16`, `v5p:4x4x4`, `h100:8`, `h100:2x8`, or `t4` for a single one.

    Raises:
      MeshError: no chip has this name, or the shape is not one of its.
    """
    name, colon, written = text.partition(":")
    chip = CHIPS.get(name)
    if chip is None:
        close = difflib.get_close_matches(name, CHIPS, n=1)
        raise MeshError(
            f"topology {text!r}: no chip is called {name!r}; "
            + (f"did you mean {close[0]!r}? " if close else "")
            + f"There are: {', '.join(CHIPS)}"
        )
    parts = written.split("x") if colon else ["1"] * chip.dimensions
    fits = all(part.isdecimal() and int(part) for part in parts)
    if chip.links == "host":
        parts = ["1", *parts] if len(parts) == 1 else parts
        example = f"{name}:8, or {name}:2x8 for two hosts"
    else:
        example = f"{name}:{'x'.join('4' * chip.dimensions)}"
    if not fits or len(parts) != chip.dimensions:
        raise MeshError(
            f"topology {text!r}: {written!r} is not a shape of {name}; write {example}"
        )
    return Topology(chip=chip, shape=tuple(map(int, parts)))


def local_topology() -> Topology:
    """The devices of this machine.

    A CPU is a chip with the host's memory, of which nothing else is known; so is an
    accelerator that is not in the table, as far as jax can say what it holds.
    """
    devices = jax.devices()
    first = devices[0]
    for chip in sorted(CHIPS.values(), key=lambda chip: -max(map(len, chip.kinds))):
        if first.device_kind.startswith(chip.kinds):
            break
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if first.platform == "cpu":
            memory //= len(devices)
        chip = Chip(
            name=first.platform,
            kinds=(first.device_kind,),
            hbm_bytes=memory,
            limit_bytes=memory,
            hbm_bandwidth=None,
            flops={},
            links="host",
            link_bandwidth=0.0,
            flash=False,
        )
    stats = first.memory_stats() if first.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        chip = dataclasses.replace(chip, limit_bytes=int(stats["bytes_limit"]))
    places = [getattr(device, "coords", None) for device in devices]
    shape: tuple[int, ...] = (1, len(devices))
    if chip.links == "torus":
        extents = [max(axis) + 1 for axis in zip(*filter(None, places), strict=True)]
        shape = tuple(extents[: chip.dimensions])
    elif first.platform != "cpu":
        hosts = len({device.process_index for device in devices})
        shape = (hosts, len(devices) // hosts)
    return Topology(chip=chip, shape=shape)


def axis_bandwidths(topology: Topology, mesh: Mapping[str, int]) -> dict[str, float]:
    """Bytes/s that each chip can receive along each axis of a mesh, all at once.

    The last axis of the mesh is laid along the last dimension of the topology. A
    dimension gives two links where an axis takes it whole and it is a ring, else one
    (the end of a line has no second neighbour). An axis over several hosts is limited
    by the network, which all its chips of a host share.
    """
    chip, left = topology.chip, list(topology.shape)
    found = {}
    for axis in reversed(MESH_AXES):
        size, links, inside = mesh.get(axis, 1), 0, 1
        for index in reversed(range(len(left))):
            part = math.gcd(size, left[index])
            if part == 1:
                continue
            size, left[index] = size // part, left[index] // part
            ring = part == topology.shape[index] and part % chip.ring == 0
            links += 2 if ring else 1
            if index == len(left) - 1:
                inside = part
        if chip.links == "torus":
            found[axis] = max(links, 1) * chip.link_bandwidth
        elif mesh.get(axis, 1) == inside:
            found[axis] = chip.link_bandwidth
        else:
            found[axis] = min(chip.link_bandwidth, inside * chip.network_bandwidth)
    return found
