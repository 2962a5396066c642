"""What scripts/benchmark.py measures: training steps and sampled texts, of llmc and of its peers."""

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llmc import models  # before torch, so that PyTorch too runs with llmc's setting of libgomp

import torch  # isort: skip
import torch_peer

from llmc.errors import UsageError
from llmc.model_file import ModelShape
from llmc.sample import generate

if TYPE_CHECKING:
    from llmc import _C

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.1
START_TOKEN = 0  # of texts; any will do, for the weights are random

Answer = Callable[[int], Any]  # of a contender that is asked for so many units of its work


@dataclass(frozen=True)
class Case(ABC):
    """Work on a model with random weights, unit by unit."""

    name: str
    shape: ModelShape
    B: int  # rows
    T: int  # tokens in a row

    unit: ClassVar[str]
    warmup: ClassVar[int]  # units before those that count
    shortest: ClassVar[int]  # lowest T
    peers: ClassVar[dict[str, Callable[[Any], Answer]]]  # what llmc is compared with; each makes a case's answer

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Of a unit."""

    @property
    def flops(self) -> int:
        """Of a unit, 0 where they are not what counts."""
        return 0

    @abstractmethod
    def work_of(self, model: "_C.GPT2") -> Callable[[], object]:
        """A unit of an llmc model."""

    def llmc(self) -> Answer:
        return self.timed(self.work_of(self.llmc_model()))

    def llmc_operations(self) -> Answer:
        """Answers with the seconds of each unit and, of all of them, operation_times()."""
        model = self.llmc_model(timed=True)
        answer = self.timed(self.work_of(model))
        model.operation_times()  # those of the warm-up
        return lambda count: (answer(count), model.operation_times())

    def llmc_model(self, timed: bool = False) -> "_C.GPT2":
        from llmc import _C

        options = _C.Options(batch_size=self.B, seq_len=self.T, gelu_fusion=2)
        model = _C.GPT2(_C.GPT2Config(**vars(self.shape)), options, timed=timed)
        model.init_random()
        return model

    def timed(self, work: Callable[[], object]) -> Callable[[int], list[float]]:
        """The answer of a contender, which is now warm: the seconds of each unit."""

        def seconds() -> float:
            started = time.perf_counter()
            work()
            return time.perf_counter() - started

        for _ in range(self.warmup):
            work()
        return lambda count: [seconds() for _ in range(count)]


class Training(Case):
    """MODEL:BxT: training steps."""

    unit = "step"
    warmup = 3  # allocations, compilation, first touches
    shortest = 1

    @property
    def tokens(self) -> int:
        return self.B * self.T

    @property
    def flops(self) -> int:
        return self.tokens * self.shape.flops_per_token(self.T)

    def random_tokens(self) -> torch.Tensor:
        """(B,T+1): inputs and, one further, targets."""
        return torch.randint(self.shape.vocab_size, (self.B, self.T + 1), generator=torch.Generator().manual_seed(1))

    def work_of(self, model: "_C.GPT2") -> Callable[[], float]:
        return steps_of(model, self.random_tokens())

    def eager(self, compiled: bool = False) -> Answer:
        model, optimizer = torch_peer.make(self.shape, WEIGHT_DECAY)
        tokens = self.random_tokens()
        x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        if compiled:
            model = torch.compile(model)
        return self.timed(lambda: torch_peer.train_step(model, optimizer, x, y, LEARNING_RATE))

    def compiled(self) -> Answer:
        return self.eager(compiled=True)

    peers: ClassVar = {"eager": eager, "compiled": compiled}


def steps_of(model: "_C.GPT2", tokens: torch.Tensor) -> Callable[[], float]:
    """A training step of an llmc model on tokens (B,T+1); returns the loss."""
    x, y = tokens[:, :-1], tokens[:, 1:]
    done = 0

    def step() -> float:
        nonlocal done
        done += 1
        model.forward(x)
        model.backward(y)
        model.update(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, step=done)
        return float(model.loss())

    return step


class Sampling(Case):
    """MODEL:sampleN: texts of T = N tokens, each drawn from the whole distribution. B is 1."""

    unit = "text"
    warmup = 1
    shortest = 2  # the start token and one that is drawn

    @property
    def tokens(self) -> int:
        return self.T - 1

    def work_of(self, model: "_C.GPT2") -> Callable[[], list[int]]:
        return lambda: list(generate(model, self.T, START_TOKEN))

    def eager(self) -> Answer:
        """Without a cache: every token costs a forward pass of all before it."""
        model = torch_peer.make_model(self.shape)
        generator = torch.Generator().manual_seed(1)
        return self.timed(lambda: model.generate(START_TOKEN, self.tokens, top_k=None, generator=generator))

    def huggingface(self) -> Answer:
        """With a cache."""
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=self.shape.vocab_size,
            n_positions=self.shape.max_seq_len,
            n_layer=self.shape.num_layers,
            n_head=self.shape.num_heads,
            n_embd=self.shape.channels,
            attn_implementation="sdpa",
            bos_token_id=None,
            eos_token_id=None,  # no token ends a text early
        )
        model = GPT2LMHeadModel(config).eval()
        start = torch.tensor([[START_TOKEN]])
        settings = {"do_sample": True, "top_k": 0, "max_new_tokens": self.tokens, "use_cache": True}
        return self.timed(lambda: model.generate(start, **settings)[0, 1:].tolist())

    peers: ClassVar = {"eager": eager, "huggingface": huggingface}


def parse_case(name: str) -> Case:
    descriptor, _, work = name.rpartition(":")
    sizes = re.fullmatch(r"(?:([1-9]\d*)x|sample)(\d+)", work)
    if not sizes:
        raise UsageError(f"--cases {name}: give MODEL:BxT or MODEL:sampleN, such as d12:4x64 or d12:sample256")
    kind = Training if sizes[1] else Sampling
    shape = models.resolve(descriptor, None)
    case = kind(name, shape, B=int(sizes[1] or 1), T=int(sizes[2]))
    if not case.shortest <= case.T <= shape.max_seq_len:
        raise UsageError(
            f"--cases {name}: a row has from {case.shortest} to {shape.max_seq_len} tokens, the model's context"
        )
    return case
