"""Types of the compiled core, for editors and type checkers; its source is csrc/bindings.

`ops`, `random` and `chess` are modules; a single stub can only show them as classes of static functions.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

class Error(RuntimeError):
    """What every check of the core throws."""

def build_info() -> dict[str, Any]:
    """What this build of the core is made of."""

def why_no_cuda_device() -> str:
    """Why no model can run on CUDA, or an empty string."""

def cuda_free_memory(device: int = 0) -> int:
    """Bytes of a CUDA device's memory that are free now."""

def cuda_devices() -> list[dict[str, Any]]:
    """The CUDA devices that can be used: name, PCI bus id, compute capability, multiprocessors, memory in bytes."""

def peak_flops() -> float:
    """fp32 multiply-add rate in flop/s that all threads together reach in registers; measured in about 50 ms."""

class GPT2Config:
    """Shape of a GPT-2: what the model file's header holds."""

    def __init__(
        self,
        *,
        max_seq_len: int = 1024,
        vocab_size: int = 50257,
        padded_vocab_size: int = 50304,
        num_layers: int = 12,
        num_heads: int = 12,
        channels: int = 768,
    ) -> None: ...
    @property
    def max_seq_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def padded_vocab_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def num_parameters(self) -> int: ...

class Options:
    """How a model is run; see csrc/gpt2/config.h."""

    def __init__(
        self,
        *,
        batch_size: int = 4,
        seq_len: int = 1024,
        precision: Literal["fp32", "bf16"] = "fp32",
        grad_dtype: Literal["fp32", "bf16"] | None = None,
        recompute: int = 1,
        gelu_fusion: int = 0,
        master_weights: bool = True,
        zero_stage: int = 0,
        classifier_rows: int = 0,
        device: str = "cpu",
        tf32: bool = True,
        offload_optimizer: bool = False,
        offload_piece: int = 0,
        cudnn_attention: bool = False,
        bias_fusion: bool = False,
        cuda_graphs: bool = False,
        fp8: int = 0,
    ) -> None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def precision(self) -> Literal["fp32", "bf16"]: ...
    @property
    def grad_dtype(self) -> Literal["fp32", "bf16"]: ...
    @property
    def recompute(self) -> int: ...
    @property
    def gelu_fusion(self) -> int: ...
    @property
    def master_weights(self) -> bool: ...
    @property
    def zero_stage(self) -> int: ...
    @property
    def classifier_rows(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def tf32(self) -> bool: ...
    @property
    def offload_optimizer(self) -> bool: ...
    @property
    def offload_piece(self) -> int: ...
    @property
    def cudnn_attention(self) -> bool: ...
    @property
    def bias_fusion(self) -> bool: ...
    @property
    def cuda_graphs(self) -> bool: ...
    @property
    def fp8(self) -> int: ...

def plan(
    config: GPT2Config, options: Options, world_size: int = 1
) -> list[tuple[str, str, str, tuple[int, ...], int, int]]:
    """The memory of one rank before anything is allocated: (name, lifetime, dtype, shape, offset, bytes)."""

def parameter_units(config: GPT2Config, world_size: int = 1) -> list[tuple[int, int, list[tuple[str, int, int]]]]:
    """Where parameters are: units (offset, size, [(name, offset, numel), ...]) in elements from the start of all.

    Rank r of P owns slice [r*size/P, (r+1)*size/P) of every unit where a ZeRO stage cuts them; in buffers that hold
    slices only, that of a unit starts at offset/P.
    """

class Communicator:
    """What the ranks of a run do together; see csrc/comm/communicator.h.

    All ranks make the same calls in the same order. Collectives work in place on contiguous tensors, fp32 or bf16,
    return a ticket at once and run in the background: do not touch their tensors until wait(ticket). `what` names the
    data in errors. When a collective fails, all later calls do.
    """

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def all_reduce_average(self, x: Tensor, what: str = "") -> int:
        """x = average over the ranks, the same bits on all."""

    def all_reduce_sum(self, x: Tensor, what: str = "") -> int:
        """x = sum over the ranks, the same bits on all."""

    def reduce_scatter_average(self, x: Tensor, what: str = "") -> int:
        """Of x, cut into one slice per rank: this rank's slice = average over the ranks, the others are undefined."""

    def all_gather(self, x: Tensor, own: Tensor, what: str = "") -> int:
        """x = the slices `own` of all ranks; own may be this rank's slice of x, or lie apart."""

    def wait(self, ticket: int) -> None:
        """What the device does from here on sees the result of that collective and of those before it."""

    def finish(self, ticket: int) -> None:
        """The host waits for that collective and those before it, no longer than the time-out."""

def gloo_communicator(group_name: str) -> Communicator:
    """The ranks of the torch.distributed process group with that name, on CPUs through Gloo."""

def nccl_unique_id() -> bytes:
    """128 bytes, made by rank 0 for all ranks of one nccl_communicator()."""

def nccl_communicator(unique_id: bytes, rank: int, size: int, device: int, timeout_seconds: float) -> Communicator:
    """Ranks on GPUs through NCCL; returns when all ranks have called it.

    timeout_seconds: the longest wait for another rank, here and in its collectives.
    """

class GPT2:
    """GPT-2 with its training step; see csrc/gpt2/model.h."""

    rng_state: int
    last_update_rng_state: int
    fp8_history: list[float]
    def __init__(
        self, config: GPT2Config, options: Options, comm: Communicator | None = None, timed: bool = False
    ) -> None: ...
    @property
    def config(self) -> GPT2Config: ...
    @property
    def options(self) -> Options: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def init_random(self, seed: int = 42) -> None:
        """Random parameters: GPT-2's initialisation, drawn like torch's from mt19937. Forgets the optimizer state."""

    def reset_optimizer(self) -> None:
        """Forget m, v and master weights: needed after parameters were written from outside a used model."""

    def forward(self, tokens: Tensor) -> None:
        """Run tokens (b,t), int32 or int64, b <= B and t <= T, up to the last layernorm."""

    def extend(self, tokens: Tensor) -> None:
        """Run tokens (1,n) behind those of the last forward or extend, which must have had one row, at the cost of n
        positions. Logits may follow, no backward."""

    def backward(self, targets: Tensor, micro_step: int = 0, accumulation_steps: int = 1) -> None:
        """Loss and gradients of the last forward. micro_step 0 starts both anew; the last one completes the step."""

    def evaluate(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Per-token losses, fp32 (b,t), without gradients."""

    def logits(self, begin: int, end: int) -> Tensor:
        """Logits, fp32 (end - begin, V), of rows [begin, end) of the last forward's (b*t) rows."""

    def start_optimizer(self) -> None:
        """Allocate the optimizer state if it is not there: m = v = 0, master = the parameters."""

    def choose_algorithms(self, known: dict[str, list[int]], timing: bool) -> None:
        """Of products on a GPU, from here on: those known by the product's description; otherwise, if timing, the
        fastest when a product is first seen, and then what the next passes compute is of no use; otherwise cuBLASLt's
        first."""

    def algorithms(self) -> dict[str, list[int]]:
        """The known and timed algorithms that products have taken since."""

    def restore_parameters(self) -> None:
        """Parameters = master weights, rounded as the last update rounded them (see last_update_rng_state)."""

    def update(
        self,
        lr: float,
        weight_decay: float,
        step: int,
        beta1: float = 0.9,
        beta2: float = 0.95,
        eps: float = 1e-8,
        grad_clip: float = 1.0,
    ) -> None:
        """Clip the gradient norm and do one AdamW step; step counts from 1.

        With a loss or norm that is not finite nothing changes.
        """

    def loss(self) -> float:
        """Mean loss over the micro-steps (and ranks) of the last complete backward."""

    def grad_norm(self) -> float:
        """Global gradient norm of the last complete backward, before clipping."""

    def vote(self, votes: Sequence[float]) -> None:
        """What this rank has to say to all, until it says otherwise; averaged with the loss by a complete backward."""

    def votes(self) -> list[float]:
        """The averages over the ranks of the last complete backward, the same bits on all of them."""

    def parameters_finite(self) -> bool:
        """Whether all parameters that the last update wrote, on any rank, are finite."""

    def parameters(self) -> dict[str, Tensor]:
        """Views of the parameters by name: wte, wpe, h0.ln1w, ..., lnfb.

        At ZeRO stage 3 of the parts this rank owns, flat.
        """

    def gather_parameters(self, unit: int) -> dict[str, Tensor]:
        """The whole parameters of one of parameter_units() by name, until the next call of the model.

        At ZeRO stage 3 all ranks must call it.
        """

    def gradients(self) -> dict[str, Tensor]:
        """Views of the gradients by name; they exist after the first backward.

        From ZeRO stage 2 on of the parts this rank owns, flat; at stage 1 only those parts are averages over the ranks.
        """

    def optimizer_state(self, name: str) -> dict[str, Tensor]:
        """Views of m, v or master by parameter name, from ZeRO stage 1 on of the parts this rank owns, flat.

        They exist after start_optimizer() or the first update.
        """

    def buffer(self, name: str) -> Tensor:
        """View of any buffer of the plan, for example the activation h0.atty (B,T,C)."""

    def memory(self) -> dict[str, int]:
        """Bytes of the plan by lifetime; each lifetime is allocated when it is first needed."""

    def host_memory(self, n: int, dtype: str) -> Tensor:
        """n values of the host's memory, zeroed and the caller's; a GPU copies from and to it at full speed."""

    def operation_times(self) -> dict[str, tuple[int, float, float, float]]:
        """Of a model made with timed=True, what its operations took since the last call: by name, and of products shape
        m x n x k, (calls, seconds, flops, bytes); see csrc/ops/timed_ops.h."""

    def allocated_bytes(self) -> int:
        """Bytes that the model holds now."""

class ops:
    """Every operation of the training step on torch tensors; csrc/ops/ops.h has the contracts."""

    @staticmethod
    def embedding_forward(out: Tensor, tokens: Tensor, wte: Tensor, wpe: Tensor) -> None:
        """out[b,t] = wte[tokens[b,t]] + wpe[t]"""

    @staticmethod
    def embedding_backward(dwte: Tensor, dwpe: Tensor, dout: Tensor, tokens: Tensor, seed: int = 0) -> None:
        """dwte[v] += sum of dout where tokens == v; dwpe[t] += sum of dout over b"""

    @staticmethod
    def layernorm_forward(out: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
        """out = (x - mean) * rstd * weight + bias per row of x (N,C), eps 1e-5"""

    @staticmethod
    def residual_layernorm_forward(
        residual: Tensor, out: Tensor, mean: Tensor, rstd: Tensor, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor
    ) -> None:
        """residual = a + b; out = layernorm(residual)"""

    @staticmethod
    def layernorm_backward(
        dx: Tensor,
        dweight: Tensor,
        dbias: Tensor,
        dout: Tensor,
        x: Tensor,
        weight: Tensor,
        mean: Tensor,
        rstd: Tensor,
        accumulate: bool = True,
    ) -> None:
        """dx += ..., dweight += ..., dbias += ..., the last two = without accumulate"""

    @staticmethod
    def matmul_forward(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """out (N,OC) = x (N,IC) @ weight (OC,IC).T + bias"""

    @staticmethod
    def matmul_gelu_forward(out: Tensor, pre: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """pre = x @ weight.T + bias; out = gelu(pre)"""

    @staticmethod
    def matmul_backward_input(dx: Tensor, dout: Tensor, weight: Tensor) -> None:
        """dx = dout @ weight"""

    @staticmethod
    def matmul_gelu_backward_input(dpre: Tensor, dout: Tensor, weight: Tensor, pre: Tensor) -> None:
        """dpre = (dout @ weight) * gelu'(pre)"""

    @staticmethod
    def matmul_backward_weight(dweight: Tensor, dout: Tensor, x: Tensor, accumulate: bool = True) -> None:
        """dweight += dout.T @ x, = without accumulate"""

    @staticmethod
    def bias_backward(dbias: Tensor, dout: Tensor, accumulate: bool = True) -> None:
        """dbias += dout.sum over rows, = without accumulate"""

    @staticmethod
    def matmul_bias_backward_weight(
        dweight: Tensor, dbias: Tensor, dout: Tensor, x: Tensor, accumulate: bool = True
    ) -> None:
        """dweight += dout.T @ x; dbias += dout.sum over rows; = without accumulate"""

    @staticmethod
    def quantize(
        out: Tensor | None, transposed: Tensor | None, amax: Tensor | None, x: Tensor, scale: Tensor | None
    ) -> None:
        """out = x * scale[0] in FP8, saturated; transposed = out.T; amax = max(amax, |x|); each may be None"""

    @staticmethod
    def quantize_gelu(
        out: Tensor | None, transposed: Tensor | None, amax: Tensor | None, pre: Tensor, scale: Tensor | None
    ) -> None:
        """quantize of gelu(pre), to E4M3"""

    @staticmethod
    def quantize_gradient(
        out: Tensor | None,
        transposed: Tensor | None,
        amax: Tensor | None,
        dbias: Tensor | None,
        dout: Tensor,
        pre: Tensor | None,
        scale: Tensor | None,
        accumulate: bool = False,
    ) -> None:
        """quantize of dout, or with pre of dout * gelu'(pre), to E5M2; dbias = or += its sum over rows"""

    @staticmethod
    def fp8_layernorm_forward(
        out: Tensor | None,
        amax: Tensor | None,
        residual: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        a: Tensor,
        b: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor | None,
    ) -> None:
        """residual = a + b; out = layernorm(residual), in E4M3; without residual and b that of a"""

    @staticmethod
    def fp8_transpose(out: Tensor, x: Tensor) -> None:
        """out = x.T"""

    @staticmethod
    def fp8_scale(scale: Tensor, amax: Tensor, e5m2: bool) -> None:
        """scale = the largest power of two by which amax fits the format, and its inverse"""

    @staticmethod
    def raise_amax(amax: Tensor, other: Tensor) -> None:
        """amax = max(amax, other), NaN above all"""

    @staticmethod
    def update_fp8_scales(
        scales: Tensor, history: Tensor, amax: Tensor | None, grad_scale: Tensor | None, first_e5m2: int
    ) -> None:
        """history (n,window) takes amax, unless that or grad_scale is not finite; scales (n,2) = those of its maxima"""

    @staticmethod
    def fp8_matmul_forward(
        out: Tensor, x: Tensor, unscale_x: Tensor, weight: Tensor, unscale_weight: Tensor, bias: Tensor | None = None
    ) -> None:
        """out (N,OC) = x (N,IC) @ weight (OC,IC).T + bias of FP8 values times their scales"""

    @staticmethod
    def fp8_matmul_backward(
        out: Tensor, a: Tensor, unscale_a: Tensor, b: Tensor, unscale_b: Tensor, accumulate: bool = False
    ) -> None:
        """out (N,M) = or += a (N,K) @ b (M,K).T"""

    @staticmethod
    def gelu_forward(out: Tensor, x: Tensor) -> None:
        """out = gelu(x), tanh form"""

    @staticmethod
    def gelu_backward(dx: Tensor, x: Tensor) -> None:
        """dx *= gelu'(x), in place"""

    @staticmethod
    def attention_forward(out: Tensor, lse: Tensor, qkv: Tensor, num_heads: int, first: int = 0) -> None:
        """Causal self-attention of the positions from first on: out (B,T,C), lse (B,NH,T) from qkv (B,T,3C)"""

    @staticmethod
    def attention_backward(dqkv: Tensor, dout: Tensor, out: Tensor, lse: Tensor, qkv: Tensor, num_heads: int) -> None:
        """dqkv = gradient of attention_forward"""

    @staticmethod
    def fused_classifier(
        logits: Tensor, losses: Tensor, targets: Tensor, vocab_size: int, dloss: float, write_dlogits: bool
    ) -> None:
        """losses += cross entropy; logits = (softmax - onehot) * dloss in place if write_dlogits"""

    @staticmethod
    def fp8_classifier(
        dlogits: Tensor,
        unscale: Tensor,
        losses: Tensor,
        logits: Tensor,
        targets: Tensor,
        vocab_size: int,
        dloss: float,
    ) -> None:
        """losses += cross entropy; dlogits * unscale = (softmax - onehot) * dloss, in E5M2"""

    @staticmethod
    def adamw(
        param: Tensor,
        grad: Tensor,
        m: Tensor,
        v: Tensor,
        master: Tensor | None,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        t: int,
        grad_scale: float,
        seed: int = 0,
        layer: int = 0,
        first: int = 0,
    ) -> bool:
        """One AdamW step of one tensor; bf16 parameters are rounded stochastically.

        With a grad_scale of NaN nothing changes. Whether all that was written to param is finite.
        """

    @staticmethod
    def round_parameters(param: Tensor, master: Tensor, seed: int = 0, layer: int = 0, first: int = 0) -> None:
        """param = fp32 master, rounded exactly as adamw rounds it"""

    @staticmethod
    def sum_of_squares(tensors: Sequence[Tensor]) -> float:
        """Sum of squares over a list of tensors"""

    @staticmethod
    def clip_scale(sum: float, loss: float, max_norm: float, device: str = "cpu") -> tuple[float, float]:
        """(norm, scale) of a sum of squares; a scale of NaN if norm or loss is not finite"""

    @staticmethod
    def cast(out: Tensor, x: Tensor) -> None:
        """out = x, between fp32 and bf16"""

    @staticmethod
    def accumulate(out: Tensor, x: Tensor) -> None:
        """out += x, fp32 or bf16 each"""

    @staticmethod
    def sum(x: Tensor) -> float:
        """Sum of an fp32 tensor"""

    @staticmethod
    def allow_tf32(allowed: bool) -> None:
        """Let fp32 products and attention on CUDA tensors round their operands to TF32; off at first, as in torch."""

class random:
    """The random number generators of the core."""

    @staticmethod
    def normal(seed: int, n: int, mean: float, std: float) -> tuple[Tensor, int]:
        """(n normal values as torch's CPU normal_ draws them, the next 32 random bits)"""

    @staticmethod
    def squirrel5(position: int, seed: int) -> int: ...
    @staticmethod
    def noise_2d(x: int, y: int, seed: int) -> int: ...
    @staticmethod
    def stochastic_round(x: float, noise: int) -> int:
        """The bits of x rounded to bf16 with 16 bits of noise."""

    @staticmethod
    def xorshift64(state: int) -> tuple[int, int]:
        """(32 random bits, new state) of xorshift64*."""

class chess:
    """Games of chess to tokens and back. Positions are FEN, moves UCI."""

    @staticmethod
    def encode_pgn(
        text: bytes,
        *,
        rated: bool = False,
        min_elo: int = 0,
        max_elo: int = 0,
        time_control: str = "",
        min_plies: int = 1,
        promotions: bool = False,
    ) -> tuple[np.ndarray, dict[str, int]]:
        """(uint16 tokens, number of games by fate) of PGN text; csrc/chess/games.h explains the filter."""

    @staticmethod
    def encode_uci(text: bytes, *, min_plies: int = 1, promotions: bool = False) -> tuple[np.ndarray, dict[str, int]]:
        """The same of lines of UCI moves, a game each."""

    @staticmethod
    def replay(tokens: Sequence[int]) -> tuple[list[str], int, str]:
        """(legal moves, tokens they took, position after them) of a game up to what is no legal move."""

    @staticmethod
    def legal_moves(fen: str) -> list[str]: ...
    @staticmethod
    def make_move(fen: str, move: str) -> str:
        """The position after a move."""

    @staticmethod
    def read_san(fen: str, san: str) -> str:
        """The move that short algebraic notation means."""

    @staticmethod
    def state(fen: str) -> Literal["checkmate", "stalemate", "insufficient material", "ongoing"]:
        """ "checkmate" or "stalemate" of the side to move, "insufficient material", or "ongoing"."""

    @staticmethod
    def perft(fen: str, depth: int) -> int:
        """Number of sequences of `depth` legal moves."""
