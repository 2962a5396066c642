"""Predicted time of a training step on a GPU, and where it is lost.

A kernel takes the time of an empty launch and the larger of two times: its bytes at the share of the memory's
bandwidth that kernels reach, and its flops at the share of the peak that such products reach. Matrix products pay for
whole tiles, for whole waves of tiles over the SMs, and for the start and the end of each tile. Collectives run beside
the kernels, in the order and with the dependencies of the step (llmc/kernels.py).

Nothing here was measured by this project. The constants are data sheets', published figures' or estimates, as said
beside them; the two of PRODUCT_SHARE are fitted, by scripts/roofline_check.py, which also says how far other published
steps are off (docs/roofline.csv).
"""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Literal

from llmc.kernels import CUDNN, Collective, Event, Fetch, Kernel, Step, Store
from llmc.model_file import FileDtype
from llmc.peak import GPUS as PROCESSORS
from llmc.peak import peak_flops

Generation = Literal["Ampere", "Ada", "Hopper", "Blackwell"]
CAPABILITY_9 = ("Hopper", "Blackwell")  # compute capability 9.0 and newer


@dataclass(frozen=True)
class Gpu:
    """One of NVIDIA's data sheets. Rates per second, of one GPU and one direction."""

    device: str  # the name of the CUDA device, which gives SMs and tensor peak (llmc/peak.py)
    generation: Generation
    memory_mib: int  # as the driver shows it
    bandwidth: float  # bytes of the memory
    fp32: float  # flops without tensor cores
    link_name: str
    link: float  # bytes to the other GPUs of the machine
    network: float  # bytes to other machines: for each GPU its part of the network cards of a usual machine
    host: float  # bytes to the host's memory

    @property
    def sms(self) -> int:
        return PROCESSORS[self.device][0]

    @property
    def fuses_gelu(self) -> bool:
        return self.generation in CAPABILITY_9

    @property
    def begins_early(self) -> bool:
        """A kernel may begin while the one before it ends (csrc/cuda/launch.h)."""
        return self.generation in CAPABILITY_9

    @property
    def has_fp8(self) -> bool:
        return self.generation != "Ampere"

    @property
    def fp8_peak(self) -> float:
        """Twice that of bf16, on all data sheets of those that have it."""
        return 2 * self.peak("bf16", False)

    def peak(self, precision: FileDtype, tf32: bool) -> float:
        peak = peak_flops(self.device, precision) if precision == "bf16" or tf32 else self.fp32
        assert peak is not None
        return peak


NVLINK3, NVLINK4, NVLINK5, PCIE4, PCIE5 = 300e9, 450e9, 900e9, 32e9, 64e9
# GeForce cards have no peer-to-peer access: what they send goes through the host's memory, twice over PCIe.
HOSTED_PCIE4 = PCIE4 / 2
HDR, NDR, SHARED_100G = 25e9, 50e9, 12.5e9 / 8  # InfiniBand of each GPU; one card of 100 Gbit/s for eight

GPUS = {
    "A100": Gpu("NVIDIA A100-SXM4-80GB", "Ampere", 81920, 2039e9, 19.5e12, "NVLink 3", NVLINK3, HDR, PCIE4),
    "A100-40GB": Gpu("NVIDIA A100-SXM4-40GB", "Ampere", 40960, 1555e9, 19.5e12, "NVLink 3", NVLINK3, HDR, PCIE4),
    "A100-PCIe": Gpu("NVIDIA A100 80GB PCIe", "Ampere", 81920, 1935e9, 19.5e12, "PCIe 4", PCIE4, HDR, PCIE4),
    "H100": Gpu("NVIDIA H100 80GB HBM3", "Hopper", 81559, 3350e9, 67e12, "NVLink 4", NVLINK4, NDR, PCIE5),
    "H100-PCIe": Gpu("NVIDIA H100 PCIe", "Hopper", 81559, 2000e9, 51e12, "PCIe 5", PCIE5, NDR, PCIE5),
    "H100-NVL": Gpu("NVIDIA H100 NVL", "Hopper", 95830, 3938e9, 60e12, "PCIe 5", PCIE5, NDR, PCIE5),
    "H200": Gpu("NVIDIA H200", "Hopper", 143771, 4800e9, 67e12, "NVLink 4", NVLINK4, NDR, PCIE5),
    "B200": Gpu("NVIDIA B200", "Blackwell", 183359, 8000e9, 80e12, "NVLink 5", NVLINK5, NDR, PCIE5),
    "4090": Gpu("NVIDIA GeForce RTX 4090", "Ada", 24564, 1008e9, 82.6e12, "PCIe 4", HOSTED_PCIE4, SHARED_100G, PCIE4),
}  # by NVIDIA's data sheets; of the PCIe cards without bridges

# --- constants --------------------------------------------------------------------------------------------------------

# Share of the peak that cuBLASLt's largest tiles reach in a long loop: power, clocks, its own instructions. Ampere's is
# fitted to llm.c's 350M on 8 A100, Hopper's to its 1558M on 8 H100; the others are taken to be like them.
# FP8 is taken to reach the same share of a peak twice as high.
AMPERE, HOPPER = 0.813, 0.695
PRODUCT_SHARE: dict[Generation, float] = {"Ampere": AMPERE, "Ada": AMPERE, "Hopper": HOPPER, "Blackwell": HOPPER}
TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))  # rows and columns of the result
# K may be cut into parts where there are too few tiles; their results are added in fp32.
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
SHORTEST_K = 512
# Smaller tiles read more for each flop. A tile of m by n is slower by 1 + TILE_EDGE·(1/m + 1/n).
TILE_EDGE = 32
TILE_START = 3.5e-6  # seconds in which a tile only waits: for its first operands, and for its result to be written

# Of the data sheet's bandwidth, by kernels that stream several tensors. Copies alone reach about 0.9.
MEMORY_SHARE = 0.8
# Seconds from kernel to kernel in a full stream. CUDA graphs shorten that, and so does programmatic dependent launch,
# by amounts that nobody has published for these GPUs: --cuda-graphs 1 is predicted like 0, and kernels that begin early
# like others. The report says what those could save at most. XLA's save 0 to 1 % of a step of Llama 3 8B on B200, by
# the tables of its pull request 38544.
LAUNCH = 2.5e-6

# Attention: share of the rate of mma.sync for long rows, and the T at which it is half of that. FlashAttention-2's,
# which our kernels are built like, on H100 with head size 64 (FlashAttention-3, Shah et al. 2024, figures 5 and 6;
# causal backward, which is not shown, taken to be slower by the same factor as forward).
ATTENTION: dict[str, tuple[float, int]] = {"forward": (0.49, 320), "backward": (0.44, 530)}
# The same for cuDNN's, as shares of the whole peak, from the same figures: on Hopper it uses other instructions. On
# Ampere and Ada it is taken to be like FlashAttention-2's, on Blackwell to reach the share that it does on Hopper. The
# figures are not of its deterministic backward pass, whose additional bytes are counted (llmc/kernels.py).
CUDNN_ATTENTION: dict[str, tuple[float, int]] = {"forward": (0.40, 370), "backward": (0.41, 530)}
# The rate of mma.sync as a share of the peak, which on newer chips needs other instructions.
MMA_SYNC: dict[Generation, float] = {"Ampere": 1, "Ada": 1, "Hopper": 0.62, "Blackwell": 0.31}

LINK_SHARE = 0.77  # of a link, by NCCL's rings on large messages
COLLECTIVE = 20e-6  # seconds, from its start to the first byte

# --- kernels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """GPUs that are alike, at work in one precision."""

    gpu: Gpu
    precision: FileDtype
    tf32: bool = True
    gpus_per_node: int = 8
    product_share: float | None = None  # instead of the generation's, to fit it

    @property
    def peak(self) -> float:
        return self.gpu.peak(self.precision, self.tf32)

    @property
    def share(self) -> float:
        return PRODUCT_SHARE[self.gpu.generation] if self.product_share is None else self.product_share

    @property
    def bandwidth(self) -> float:
        return MEMORY_SHARE * self.gpu.bandwidth

    def peak_in(self, fp8: bool) -> float:
        return self.gpu.fp8_peak if fp8 else self.peak

    def least_seconds(self, kernel: Kernel) -> float:
        """The roofline of the data sheet."""
        return max(kernel.bytes / self.gpu.bandwidth, kernel.flops / self.peak_in(kernel.fp8))

    def seconds(self, kernel: Kernel) -> float:
        return LAUNCH + max(kernel.bytes / self.bandwidth, self.arithmetic_seconds(kernel))

    def arithmetic_seconds(self, kernel: Kernel) -> float:
        if kernel.product is not None:
            return self.product_seconds(*kernel.product, kernel.fp8)
        if kernel.attention is None or kernel.flops == 0:
            return 0
        direction, T = kernel.attention
        peak, (share, half) = self.peak * MMA_SYNC[self.gpu.generation], ATTENTION[direction]
        if kernel.name == CUDNN and MMA_SYNC[self.gpu.generation] < 1:
            peak, (share, half) = self.peak, CUDNN_ATTENTION[direction]
        return kernel.flops / (peak * share * T / (T + half))

    def product_seconds(self, M: int, N: int, K: int, fp8: bool = False) -> float:
        """With the best tile and the best split of K."""
        splits = [split for split in SPLITS if split == 1 or split * SHORTEST_K <= K]
        return min(self.tiled_seconds(M, N, K, *tile, split, fp8) for tile in TILES for split in splits)

    def tiled_seconds(self, M: int, N: int, K: int, rows: int, columns: int, split: int, fp8: bool = False) -> float:
        """Waves of tiles, each of which has an SM for the time of its flops; then the parts of a split K are added."""
        tiles = math.ceil(M / rows) * math.ceil(N / columns) * split
        waves = math.ceil(tiles / self.gpu.sms)
        edge = (1 + TILE_EDGE * (1 / rows + 1 / columns)) / (1 + TILE_EDGE * (1 / 256 + 1 / 128))
        rate = self.share * self.peak_in(fp8) / self.gpu.sms
        tile_seconds = TILE_START + 2 * rows * columns * K / split * edge / rate
        sums = 2 * split * 4 * M * N / self.bandwidth if split > 1 else 0
        return waves * tile_seconds + sums

    def collective_seconds(self, collective: Collective, ranks: int) -> float:
        """A ring moves the whole tensor but the rank's own part over each link; an all-reduce does it twice."""
        passes = 2 if collective.operation == "all_reduce" else 1
        return COLLECTIVE + passes * collective.bytes * (ranks - 1) / ranks / self.ring(ranks)

    def ring(self, ranks: int) -> float:
        """Bytes per second of the slowest link: several machines have as many rings as a machine has GPUs."""
        link = self.gpu.link
        if ranks > self.gpus_per_node:
            link = min(link, self.gpu.network * self.gpus_per_node)
        return LINK_SHARE * link

    def host_seconds(self, moved: int) -> float:
        return moved / (LINK_SHARE * self.gpu.host)

    def losses(self, kernel: Kernel) -> dict[str, float]:
        """Seconds of a launch beyond those of its useful flops at the peak, by their cause."""
        work, peak = self.seconds(kernel) - LAUNCH, self.peak_in(kernel.fp8)
        ideal = kernel.useful_flops / peak
        losses = {"launches": LAUNCH}
        if kernel.product is None:
            losses[kernel.group] = work - ideal
        else:
            reached = kernel.flops / (self.share * peak)
            losses["recomputed products"] = kernel.flops / peak - ideal
            losses["products: their share of the peak at best"] = reached - kernel.flops / peak
            losses["products: tiles, waves and short loops"] = work - reached
        if kernel.fp8:
            losses["FP8"] = ideal - kernel.useful_flops / self.peak  # a gain
        return losses


# --- the step ---------------------------------------------------------------------------------------------------------


class Timeline:
    """Kernels on one stream, collectives and the two ways of host copies on others, each in its order."""

    def __init__(self, machine: Machine, ranks: int) -> None:
        self.machine, self.ranks = machine, ranks
        self.kernels = self.collectives = 0.0  # seconds, when the last one of each ends
        self.ends: dict[str, float] = {}  # of collectives
        self.fetched = self.stored = self.waited_for_host = 0.0
        self.free = [0.0, 0.0]  # when the slots of the host copies are
        self.seconds: dict[Kernel, float] = {}

    def play(self, event: Event) -> None:
        if isinstance(event, Kernel):
            if event not in self.seconds:
                self.seconds[event] = self.machine.seconds(event)
            self.kernels += self.seconds[event]
        elif isinstance(event, Collective):
            start = max(self.kernels, self.collectives)
            self.collectives = start + self.machine.collective_seconds(event, self.ranks)
            self.ends[event.what] = self.collectives
        elif isinstance(event, Fetch):  # long issued: the host is ahead of the GPU
            self.fetched = max(self.fetched, self.free[event.slot]) + self.machine.host_seconds(event.bytes)
            self.waited_for_host += max(0.0, self.fetched - self.kernels)
            self.kernels = max(self.kernels, self.fetched)
        elif isinstance(event, Store):
            self.stored = max(self.stored, self.kernels) + self.machine.host_seconds(event.bytes)
            self.free[event.slot] = self.stored
        else:
            self.kernels = max(self.kernels, self.ends.get(event.what, 0.0))

    def skip(self, seconds: float) -> None:
        self.kernels += seconds
        self.collectives += seconds
        self.ends = {what: end + seconds for what, end in self.ends.items()}


@dataclass(frozen=True)
class Prediction:
    """Of one step of one rank; times in seconds."""

    seconds: float
    mfu: float  # model flops utilisation
    launches: Counter[Kernel]
    kernel_seconds: float  # of all kernels together
    collective_seconds: float
    moved: int  # bytes of all collectives' tensors
    losses: dict[str, float]  # by cause, the largest first

    @property
    def waiting(self) -> float:
        """For other ranks or host memory, with nothing else to do."""
        return self.seconds - self.kernel_seconds


def predict(step: Step, machine: Machine) -> Prediction:
    timeline = Timeline(machine, step.world_size)
    for phase, repetitions in step.phases():
        before = 0.0
        for _ in range(min(repetitions, 2)):  # the second one is like all after it
            before = timeline.kernels
            for event in phase():
                timeline.play(event)
        if repetitions > 2:
            timeline.skip((repetitions - 2) * (timeline.kernels - before))
    launches, collectives = step.launches(), step.collectives()
    kernel_seconds = sum(machine.seconds(kernel) * count for kernel, count in launches.items())
    losses: defaultdict[str, float] = defaultdict(float)
    for kernel, count in launches.items():
        for cause, seconds in machine.losses(kernel).items():
            losses[cause] += seconds * count
    if step.world_size > 1:
        losses["waiting for other ranks"] = timeline.kernels - kernel_seconds - timeline.waited_for_host
    if step.options.offload_optimizer:
        losses["waiting for the optimizer's state"] = timeline.waited_for_host
    flops = step.model_flops_per_token * step.N * step.accumulation_steps
    return Prediction(
        timeline.kernels,
        flops / timeline.kernels / machine.peak,
        launches,
        kernel_seconds,
        sum(machine.collective_seconds(c, step.world_size) * count for c, count in collectives.items()),
        sum(c.bytes * count for c, count in collectives.items()),
        dict(sorted(losses.items(), key=lambda loss: -loss[1])),
    )
