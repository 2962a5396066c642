"""What a training step launches on a GPU, on paper: its kernels and collectives, with their bytes and flops.

The schedule is that of csrc/gpt2 (model.cpp, optimizer.cpp, sharding.cpp), the kernels those of csrc/cuda. Bytes and
flops are those of the operations (csrc/ops/ops.h): every tensor is read or written once; scratch memory that stays in
the L2 cache does not count. tests/test_kernels.py compares all of it with what a step really launches.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from llmc.model_file import ITEM_BYTES

if TYPE_CHECKING:
    from llmc import _C

Operation = Literal["all_reduce", "reduce_scatter", "all_gather"]
CUBLAS, CUDNN, MEMSET = "cuBLASLt", "cuDNN", "memset"  # what stands for the name of a kernel that is not our own

VOTES = 2  # of each rank, which travel with the loss: kNumVotes in csrc/gpt2/plan.h
MAX_TENSORS = 64  # of a reduction's launch, kMaxTensors in csrc/cuda/reduce.cu
MAX_SLICES = 448  # of AdamW's launch, kMaxSlices in csrc/cuda/adamw.cu
FP8_WINDOW = 16  # kFp8Window in csrc/gpt2/fp8.h
MAX_LAYERNORM_THREADS = 1024  # a longer row takes two kernels backward, csrc/cuda/layernorm.cu


@dataclass(frozen=True)
class Kernel:
    """One launch."""

    group: str  # what it belongs to, for people
    what: str  # the operation
    name: str  # pattern of the kernel's name; cuBLASLt, cuDNN or memset
    bytes: float  # that must be moved from and to the memory
    flops: float = 0
    useful_flops: float = 0  # of them, those that the model's flops count: no recomputation
    product: tuple[int, int, int] | None = None  # rows and columns of the result, depth
    attention: tuple[str, int] | None = None  # forward or backward, and T
    fp8: bool = False  # of a product's factors


@dataclass(frozen=True)
class Collective:
    """One call of the communicator."""

    operation: Operation
    what: str
    bytes: int  # of the whole tensor


@dataclass(frozen=True)
class Wait:
    """What follows needs the result of the newest collective of that name, if there was one."""

    what: str


@dataclass(frozen=True)
class Fetch:
    """Optimizer state comes from host memory into one of two slots, once what was stored from there has gone."""

    slot: int
    bytes: int


@dataclass(frozen=True)
class Store:
    """It goes back."""

    slot: int
    bytes: int


Event = Kernel | Collective | Wait | Fetch | Store


def product(what: str, M: int, N: int, K: int, moved: float, fp8: bool = False) -> Kernel:
    flops = 2 * M * N * K
    return Kernel("matrix products", what, CUBLAS, moved, flops, flops, (M, N, K), fp8=fp8)


def conversion(what: str, values: int, copies: int = 1, sources: int = 1) -> Kernel:
    """To FP8, as the tensor lies, transposed or both, of what is computed on the way from one or two in bf16."""
    return Kernel("FP8", f"{what}, to FP8", "quantize_kernel*", (2 * sources + copies) * values)


def again(kernel: Kernel) -> Kernel:
    """The kernel in the backward pass, where it computes what was not kept."""
    return replace(kernel, useful_flops=0)


def memset(what: str, moved: float) -> Kernel:
    return Kernel("clearing", f"zeros: {what}", MEMSET, moved)


class Step:
    """A training step of one rank: `accumulation_steps` micro-batches (B,T), and the update."""

    def __init__(
        self, config: "_C.GPT2Config", options: "_C.Options", world_size: int = 1, accumulation_steps: int = 1
    ) -> None:
        from llmc import _C

        self.config, self.options = config, options
        self.world_size, self.accumulation_steps = world_size, accumulation_steps
        self.stage = options.zero_stage if world_size > 1 else 0
        self.B, self.T = options.batch_size, options.seq_len
        self.C, self.L, self.NH = config.channels, config.num_layers, config.num_heads
        self.V, self.Vp = config.vocab_size, config.padded_vocab_size
        self.N = self.B * self.T
        self.x = ITEM_BYTES[options.precision]  # bytes of a parameter or activation
        self.g = ITEM_BYTES[options.grad_dtype]  # of a gradient of a parameter
        self.factor = 1 if options.fp8 else self.x  # of a factor of the blocks' products
        self.fp8_tensors = {0: 0, 1: 12 * self.L, 2: 12 * self.L + 2}[options.fp8]
        self.fp8_inputs = 4 * self.L if options.fp8 else 0  # of them, of the blocks
        self.has_master = options.precision == "bf16" and options.master_weights
        self.model_flops_per_token = 6 * config.num_parameters + 6 * self.L * self.C * self.T
        self.residual = self.x * self.N * self.C
        self.normalised = self.N * self.C * self.factor  # bytes of ln1 and ln2
        units = _C.parameter_units(config, world_size)
        self.unit_sizes = [size for _, size, _ in units]
        self.last_unit = len(units) - 1
        self.num_tensors = sum(len(tensors) for _, _, tensors in units)
        self.unit_numels = [sum(numel for _, _, numel in tensors) for _, _, tensors in units]
        shapes = {row[0]: row[3] for row in _C.plan(config, options, world_size)}
        self.chunk_rows = shapes["logits"][0]
        self.offload_piece = shapes["m_ring"][1] if options.offload_optimizer else 0  # elements
        # Where the tensors of a unit begin and end in it.
        self.tensors = [[(at - offset, at - offset + n) for _, at, n in tensors] for offset, _, tensors in units]
        self.sums_dwte_apart = options.grad_dtype != "fp32" and self.chunk_rows < self.N
        self._gathered: dict[int, int] = {}  # units by place, as in sharding.cpp
        self._reduced: dict[int, int] = {}
        self._slot = 0  # of the offloaded optimizer

    def phases(self) -> list[tuple[Callable[[], Iterator[Event]], int]]:
        """The micro-steps and the update in their order, each with how often it is repeated."""
        A = self.accumulation_steps
        micro_steps = {0: 1, 1: A - 2, A - 1: 1} if A > 2 else dict.fromkeys(range(A), 1)
        self._gathered, self._reduced = {}, {}
        return [*((partial(self.micro_step, k), count) for k, count in micro_steps.items()), (self.update, 1)]

    def launches(self) -> Counter[Kernel]:
        """How often each kernel is launched in the step."""
        counts: Counter[Kernel] = Counter()
        for phase, repetitions in self.phases():
            for event in phase():
                if isinstance(event, Kernel):
                    counts[event] += repetitions
        return counts

    def early_launches(self) -> int:
        """How many of our own kernels come right after one of our own: on GPUs from compute capability 9.0 on they may
        begin while that one ends (csrc/cuda/launch.h)."""
        count = 0
        for phase, repetitions in self.phases():
            after_own = False
            for event in phase():
                if isinstance(event, Wait) and self.world_size == 1:  # for nothing
                    continue
                own = isinstance(event, Kernel) and event.name not in (CUBLAS, CUDNN, MEMSET)
                count += repetitions * (own and after_own)
                after_own = own
        return count

    def collectives(self) -> Counter[Collective]:
        counts: Counter[Collective] = Counter()
        for phase, repetitions in self.phases():
            for event in phase():
                if isinstance(event, Collective):
                    counts[event] += repetitions
        return counts

    # --- model.cpp ----------------------------------------------------------------------------------------------------

    def micro_step(self, number: int) -> Iterator[Event]:
        yield from self.forward()
        yield from self.backward(number)

    def forward(self) -> Iterator[Event]:
        self._gathered.clear()
        yield from self.gather(0)
        yield from self.gather(1)
        yield from self.use(0)
        rows = min(self.N, self.V)  # different rows of wte
        moved = self.residual + self.x * self.C * (rows + self.T)
        yield Kernel("embedding", "embedding forward", "embedding_forward_kernel*", moved)
        yield from self.use(1)
        if self.fp8_tensors:
            yield memset("largest inputs and weights for FP8", 8 * self.fp8_inputs)
        yield self.layernorm()
        for layer in range(self.L):
            yield from self.gather(layer + 2)
            yield from self.forward_block()
            yield from self.use(layer + 2)
            yield self.residual_layernorm(last=layer == self.L - 1)

    def forward_block(self) -> list[Kernel]:
        """Without the layernorm behind it, which waits for the next block's parameters."""
        last = self.product_forward("fc projection", self.C, 4 * self.C, gelu=True)
        return [*self.forward_attention(), *self.forward_attention_projection(), *self.forward_fc(), *last]

    def forward_attention(self) -> list[Kernel]:
        return [*self.product_forward("qkv", 3 * self.C, self.C, normalised=True), self.attention_forward()]

    def forward_attention_projection(self) -> list[Kernel]:
        return [*self.product_forward("attention projection", self.C, self.C), self.residual_layernorm()]

    def forward_fc(self) -> list[Kernel]:
        fused = self.options.gelu_fusion >= 1
        extra = 4 * self.residual if fused else 0
        fc = self.product_forward("fc", 4 * self.C, self.C, extra, normalised=True)
        return fc if fused or self.options.fp8 else [*fc, self.gelu_forward()]

    def backward(self, micro_step: int) -> Iterator[Event]:
        last_micro_step = micro_step == self.accumulation_steps - 1
        accumulate = self.accumulates(micro_step)
        if micro_step == 0 and self.stage >= 2:
            yield memset("gradients", 4 * sum(self.unit_sizes) / self.world_size)
        yield from self.open_gradients(0)
        yield from self.open_gradients(self.last_unit)
        if micro_step == 0:
            yield memset("losses", 4 * self.N)
        if self.fp8_tensors:
            if micro_step == 0:
                yield memset("largest values for FP8", 4 * self.fp8_tensors)
            yield Kernel("FP8", "largest inputs and weights", "raise_kernel*", 24 * self.fp8_inputs)
        yield from self.loss_head(accumulate)
        if last_micro_step:
            yield from self.sum("sum of the losses", "partial_sums_kernel<false>", 4 * self.N, 1)
        yield memset("residual gradient", self.residual)
        yield from self.layernorm_backward(accumulate)
        yield from self.reduce_gradients(self.last_unit, last_micro_step)
        for unit in range(self.L, 0, -1):
            yield from self.use(unit)
            if unit > 1:
                yield from self.gather(unit - 1)
            yield from self.open_gradients(unit)
            yield from self.backward_block(accumulate)
            yield from self.reduce_gradients(unit, last_micro_step)
        yield from self.embedding_backward(accumulate)
        yield from self.reduce_gradients(0, last_micro_step)
        if last_micro_step:
            yield from self.collective("all_reduce", "loss", 4 * (1 + VOTES))
            for place in sorted(self._reduced):
                yield from self.collect_gradients(place)
            yield Wait("loss")

    def accumulates(self, micro_step: int) -> bool:
        """Whether the gradients of parameters are added to what is there."""
        return micro_step > 0 and self.stage < 2

    def backward_block(self, accumulate: bool) -> list[Kernel]:
        C, r, fp8 = self.C, self.options.recompute, self.options.fp8
        kernels = self.recomputed_first()
        fused = self.options.gelu_fusion >= 2
        extra = 4 * self.residual if fused else 0
        kernels += self.product_backward("fc projection", C, 4 * C, accumulate, extra, gelu=True)
        if not fused and not fp8:
            kernels.append(Kernel("GELU", "GELU backward", "gelu_backward_kernel*", 12 * self.residual))
        if r == 2:
            kernels.append(self.layernorm())
        kernels += self.product_backward("fc", 4 * C, C, accumulate, normalised=True, through_gelu=True)
        kernels += self.layernorm_backward(accumulate)
        kernels += self.product_backward("attention projection", C, C, accumulate)
        if r >= 2:
            kernels.append(self.layernorm())
        if r == 3:
            kernels += map(again, self.product_forward("qkv", 3 * C, C, normalised=True))
        kernels += self.attention_backward()
        kernels += self.product_backward("qkv", 3 * C, C, accumulate, normalised=True)
        kernels += self.layernorm_backward(accumulate)
        return kernels

    def recomputed_first(self) -> list[Kernel]:
        """Before anything of the block's backward pass."""
        r = self.options.recompute
        kernels = [self.layernorm(), *self.forward_attention()] if r >= 4 else []
        if r >= 3:
            kernels += self.forward_attention_projection()
        if r >= 4:
            kernels += self.forward_fc()
        elif r >= 1 and not self.options.fp8:
            kernels.append(self.gelu_forward())
        return [again(kernel) for kernel in kernels]

    def loss_head(self, accumulate: bool) -> list[Kernel]:
        """Over chunks of rows."""
        C, Vp, fp8 = self.C, self.Vp, self.options.fp8 == 2
        factor = 1 if fp8 else self.x  # bytes of a product's factor
        dweight = 4 if self.sums_dwte_apart else self.g  # bytes of an element
        kernels = [conversion("logits, weight twice", Vp * C, copies=2)] if fp8 else []
        for begin in range(0, self.N, self.chunk_rows):
            n = min(self.chunk_rows, self.N - begin)
            passes = 2 if begin > 0 or (accumulate and not self.sums_dwte_apart) else 1  # over the weight's gradient
            if fp8:
                kernels.append(conversion("logits, input twice", n * C, copies=2))
            kernels += [
                product("logits", n, Vp, C, factor * (n + Vp) * C + self.x * n * Vp, fp8),
                Kernel("classifier", "fused classifier", "fused_classifier_kernel*", (self.x + factor) * n * Vp),
            ]
            if fp8:
                kernels.append(Kernel("FP8", "logits, gradient transposed", "transpose_kernel*", 2 * n * Vp))
            moved = factor * n * (Vp + C) + passes * dweight * Vp * C
            kernels += [
                product("logits, input gradient", n, C, Vp, factor * (n + C) * Vp + self.x * n * C, fp8),
                product("logits, weight gradient", Vp, C, n, moved, fp8),
            ]
        if self.sums_dwte_apart:
            name = "accumulate_kernel*" if accumulate else "cast_kernel*"
            moved = Vp * C * (4 + self.g * (2 if accumulate else 1))
            kernels.append(Kernel("classifier", "sum of the chunks' weight gradients", name, moved))
        return kernels

    def embedding_backward(self, accumulate: bool) -> list[Kernel]:
        C, g = self.C, self.g
        rows = min(self.N, self.V)
        kernels = [] if accumulate else [memset("gradient of wpe", g * self.config.max_seq_len * C)]
        return [
            *kernels,
            Kernel("embedding", "gradient of wte", "dwte_kernel*", self.residual + 2 * g * C * rows),
            Kernel("embedding", "gradient of wpe", "dwpe_kernel*", self.residual + 2 * g * C * self.T),
        ]

    # --- operations ---------------------------------------------------------------------------------------------------

    def product_forward(
        self, what: str, OC: int, IC: int, extra: float = 0, *, normalised: bool = False, gelu: bool = False
    ) -> list[Kernel]:
        """Of a layernorm, which is in FP8 already, or of the GELU, which in FP8 is computed on the way."""
        N, fp8 = self.N, self.options.fp8 > 0
        moved = self.factor * (N * IC + OC * IC) + self.x * N * OC + extra
        forward = product(what, N, OC, IC, moved, fp8)
        if not fp8:
            return [forward]
        copies = 2 if self.options.recompute == 0 else 1  # one is kept
        x = [] if normalised else [conversion(f"{what}, {'GELU' if gelu else 'input'}", N * IC, copies)]
        return [*x, conversion(f"{what}, weight", OC * IC, copies), forward]

    def product_backward(
        self,
        what: str,
        OC: int,
        IC: int,
        accumulate: bool,
        extra: float = 0,
        *,
        normalised: bool = False,
        gelu: bool = False,
        through_gelu: bool = False,
    ) -> list[Kernel]:
        """normalised, gelu: of the input, as forward. through_gelu: in FP8, of the gradient."""
        N, fp8 = self.N, self.options.fp8 > 0
        moved = self.factor * (N * OC + OC * IC) + self.x * N * IC + extra
        dx = product(f"{what}, input gradient", N, IC, OC, moved, fp8)
        if not fp8:
            return [dx, *self.parameters_backward(what, OC, IC, accumulate)]
        passes = 2 if accumulate else 1  # over the gradient
        dout = conversion(f"{what}, gradient twice", N * OC, copies=2, sources=2 if through_gelu else 1)
        bias = Kernel("bias gradients", "sum of the tiles' rows", "add_groups_kernel*", passes * self.g * OC)
        kept = self.options.recompute == 0
        weight = [] if kept else [conversion(f"{what}, weight", OC * IC)]
        x = [] if kept else [conversion(f"{what}, {'GELU' if gelu else 'input'}", N * IC)]
        if normalised:
            x = [Kernel("FP8", f"{what}, input transposed", "transpose_kernel*", 2 * N * IC)]
        moved = N * (OC + IC) + passes * self.g * OC * IC
        return [dout, bias, *weight, dx, *x, product(f"{what}, weight gradient", OC, IC, N, moved, fp8)]

    def parameters_backward(self, what: str, OC: int, IC: int, accumulate: bool) -> list[Kernel]:
        passes = 2 if accumulate else 1  # over the gradient
        moved = self.x * self.N * (OC + IC) + passes * self.g * OC * IC
        if self.options.bias_fusion:
            both = product(f"{what}, gradients of weight and bias", OC, IC, self.N, moved + self.g * OC)
            adds = Kernel("bias gradients", "sum of the micro-steps", "accumulate_kernel*", 3 * self.g * OC)
            return [both, adds] if accumulate else [both]
        return [
            product(f"{what}, weight gradient", OC, IC, self.N, moved),
            Kernel("bias gradients", "bias gradient", "bias_partials_kernel*", self.x * self.N * OC),
            Kernel("bias gradients", "sum of the rows' groups", "add_groups_kernel*", passes * self.g * OC),
        ]

    def gelu_forward(self) -> Kernel:
        return Kernel("GELU", "GELU forward", "gelu_forward_kernel*", 8 * self.residual)

    def layernorm(self) -> Kernel:
        moved = self.residual + self.normalised
        return Kernel("layernorm", "layernorm", "layernorm_forward_kernel<*false>", moved)

    def residual_layernorm(self, last: bool = False) -> Kernel:
        moved = 3 * self.residual + (self.residual if last else self.normalised)
        return Kernel("layernorm", "residual + layernorm", "layernorm_forward_kernel<*true>", moved)

    def layernorm_backward(self, accumulate: bool) -> list[Kernel]:
        vectors = self.C * self.x / 16  # of 128 bits, one per thread
        passes = 2 if accumulate else 1
        if vectors <= MAX_LAYERNORM_THREADS:
            parts = [Kernel("layernorm", "layernorm backward", "layernorm_backward_kernel*", 4 * self.residual)]
        else:
            parts = [
                Kernel(
                    "layernorm",
                    "layernorm backward: parameters",
                    "layernorm_partials_kernel*",
                    2 * self.residual,
                ),
                Kernel("layernorm", "layernorm backward: input", "layernorm_dx_kernel*", 4 * self.residual),
            ]
        sums = Kernel("layernorm", "sum of the rows' groups", "add_groups_kernel*", passes * self.g * 2 * self.C)
        return [*parts, sums]

    def attention(
        self,
        direction: str,
        part: str,
        name: str,
        values: int,
        statistics: int,
        products: int,
        useful: int,
        matrices: int = 0,
    ) -> Kernel:
        """values: (N,C) tensors read and written; statistics: (B,NH,T) in fp32; products: of (T,HS) and (HS,T) for each
        head, and matrices (T,T) in bf16, of which the causal half is computed."""
        flops = self.B * self.T**2 * self.C
        moved = values * self.residual + statistics * 4 * self.N * self.NH + matrices * self.N * self.NH * self.T
        return Kernel(
            "attention",
            f"attention {direction}{part}",
            name,
            moved,
            products * flops,
            useful * flops,
            attention=(direction, self.T),
        )

    def attention_forward(self) -> Kernel:
        name = CUDNN if self.options.cudnn_attention else "attention_forward_kernel*"
        return self.attention("forward", "", name, 4, 1, products=2, useful=2)

    def attention_backward(self) -> list[Kernel]:
        """Scores and their gradients are computed twice, for queries and for keys; the model's flops count neither.

        cuDNN computes them once. Its deterministic kernels, before Blackwell, write the scores' gradients and read them
        for those of the queries: the workspace of its plans (csrc/ops/workspace.h) says so. How many kernels that are
        it does not say.
        """
        if self.options.cudnn_attention:
            return [self.attention("backward", "", CUDNN, 8, 1, products=5, useful=4, matrices=2)]
        return [
            self.attention("backward", ": delta", "attention_delta_kernel*", 2, 1, products=0, useful=0),
            self.attention("backward", ": k, v", "attention_dkdv_kernel*", 6, 2, products=4, useful=2),
            self.attention("backward", ": q", "attention_dq_kernel*", 5, 2, products=3, useful=2),
        ]

    def sum(self, what: str, name: str, moved: float, tensors: int) -> Iterator[Kernel]:
        for _ in range(math.ceil(tensors / MAX_TENSORS)):
            yield Kernel("norm and loss", what, name, moved / math.ceil(tensors / MAX_TENSORS))
            yield Kernel("norm and loss", "sum of the blocks' sums", "add_partials_kernel*", 0)

    # --- optimizer.cpp ------------------------------------------------------------------------------------------------

    def update(self) -> Iterator[Event]:
        parts = self.world_size if self.stage >= 1 else 1
        gradient = 4 if self.stage >= 2 else self.g
        yield memset("sum of squares", 4)
        read = gradient * sum(self.unit_numels) / parts
        yield from self.sum("sum of squares", "partial_sums_kernel<true>", read, len(self.unit_sizes))
        if self.stage >= 1:
            yield from self.collective("all_reduce", "norm", 4)
        yield Wait("norm")
        yield Kernel("norm and loss", "clip factor", "clip_scale_kernel*", 0)
        if self.fp8_tensors:
            yield Kernel("FP8", "scales", "update_scales_kernel*", 4 * self.fp8_tensors * (1 + 2 * FP8_WINDOW + 2))
        value = 8 + self.x if self.has_master else 2 * self.x  # read and written, but only written with a master copy
        yield memset("broken parameters", 4)
        moved = (gradient + 16 + value) / parts  # for each parameter
        if self.options.offload_optimizer or 1 <= self.stage <= 2:
            for unit, numel in enumerate(self.unit_numels):
                if self.options.offload_optimizer:
                    yield from self.offloaded(unit, numel * moved, parts)
                else:
                    yield self.adamw(numel * moved)
                if 1 <= self.stage <= 2:
                    yield from self.collective("all_gather", f"updated {unit}", self.x * self.unit_sizes[unit])
        else:
            launches = math.ceil(self.num_tensors / MAX_SLICES)
            for _ in range(launches):
                yield self.adamw(sum(self.unit_numels) * moved / launches)
        if self.stage >= 1:
            yield from self.collective("all_reduce", "broken parameters", 4)
        yield Wait("broken parameters")

    def adamw(self, moved: float) -> Kernel:
        return Kernel("optimizer", "AdamW", "adamw_kernel*", moved)

    def offloaded(self, unit: int, moved: float, parts: int) -> Iterator[Event]:
        """The update of the first rank's part, piece by piece."""
        size = self.unit_sizes[unit] // parts
        bytes_each = 12 if self.has_master else 8  # m, v and master
        pieces = -(-size // self.offload_piece)
        piece = min(self.offload_piece, 128 * math.ceil(size / pieces / 128))
        for begin in range(0, size, piece):
            end = min(begin + piece, size)
            self._slot = 1 - self._slot
            yield Fetch(self._slot, bytes_each * (end - begin))
            if any(first < end and begin < last for first, last in self.tensors[unit]):
                yield self.adamw(moved * (end - begin) / size)
            yield Store(self._slot, bytes_each * (end - begin))

    # --- sharding.cpp -------------------------------------------------------------------------------------------------

    def place(self, unit: int) -> int:
        return 0 if unit == 0 else 3 if unit == self.last_unit else 1 + unit % 2

    def collective(self, operation: Operation, what: str, size: int) -> Iterator[Event]:
        if self.world_size > 1:
            yield Collective(operation, what, size)

    def gather(self, unit: int) -> Iterator[Event]:
        if self.stage == 3 and self._gathered.get(self.place(unit)) != unit:
            self._gathered[self.place(unit)] = unit
            yield from self.collective("all_gather", f"parameters {unit}", self.x * self.unit_sizes[unit])

    def use(self, unit: int) -> Iterator[Event]:
        yield from self.gather(unit)
        yield Wait(f"parameters {unit}")

    def open_gradients(self, unit: int) -> Iterator[Event]:
        if self.stage >= 2:
            yield from self.collect_gradients(self.place(unit))
            self._reduced[self.place(unit)] = unit

    def reduce_gradients(self, unit: int, last_micro_step: bool) -> Iterator[Event]:
        if self.stage >= 2 or last_micro_step:
            operation: Operation = "reduce_scatter" if self.stage >= 1 else "all_reduce"
            yield from self.collective(operation, f"gradients {unit}", self.g * self.unit_sizes[unit])

    def collect_gradients(self, place: int) -> Iterator[Event]:
        unit = self._reduced.pop(place, None)
        if unit is not None:
            yield Wait(f"gradients {unit}")
            moved = (8 + self.g) * self.unit_sizes[unit] / self.world_size
            yield Kernel("sums of gradients", "sum of the shard's gradients", "accumulate_kernel*", moved)
