"""The memory plan: bytes worked out by hand, and what the process really takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmc import _C

MIB = 2**20
BYTES = {"fp32": 4, "bf16": 2}

# d12 on 8 ranks, elements of each unit: every tensor is a multiple of 128 long, a unit is padded to one of 8 * 128.
C, L, Vp, T = 768, 12, 50304, 1024
FIRST = (Vp + T) * C  # wte, wpe: 38496 times 1024
BLOCK = 6922 * 1024  # 12 C^2 + 13 C = 7087872 is 6921.75 times 1024
LAST = 2 * 1024  # lnfw, lnfb: 1536
SIZE = FIRST + L * BLOCK + LAST


def lifetimes(options: _C.Options, world_size: int) -> dict[str, int]:
    """Bytes of each allocation for d12: buffers may share memory, so the last end counts."""
    ends: dict[str, int] = {}
    for _, lifetime, _, _, offset, size in _C.plan(_C.GPT2Config(), options, world_size):
        ends[lifetime] = max(ends.get(lifetime, 0), offset + size)
    return ends


@pytest.mark.parametrize("precision,grad_dtype", [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")])
def test_every_zero_stage_of_d12_on_8_ranks(precision, grad_dtype):
    X, G, P = BYTES[precision], BYTES[grad_dtype], 8
    state = 8 if precision == "fp32" else 12  # m, v and the master weights
    # bf16 gradients of wte from many chunks of logits are added up in fp32 first.
    dwte_sum = 4 * Vp * C if grad_dtype == "bf16" else 0
    work = FIRST + 2 * BLOCK + LAST
    expected = [
        {"parameters": X * SIZE, "gradients": G * SIZE, "optimizer": state * SIZE},
        {"parameters": X * SIZE, "gradients": G * SIZE, "optimizer": state * SIZE // P},
        {"parameters": X * SIZE, "gradients": 4 * SIZE // P + G * work, "optimizer": state * SIZE // P},
        {
            "parameters": X * SIZE // P + X * work,
            "gradients": 4 * SIZE // P + G * work,
            "optimizer": state * SIZE // P,
        },
    ]
    totals, activations = [], set()
    for stage in range(4):
        options = _C.Options(precision=precision, grad_dtype=grad_dtype, zero_stage=stage)
        bytes_of = lifetimes(options, P)
        totals.append(sum(bytes_of.values()))
        activations.add(bytes_of.pop("activations"))
        bytes_of["gradients"] -= dwte_sum
        assert bytes_of == expected[stage], stage
    assert totals == sorted(set(totals), reverse=True)
    assert len(activations) == 1


def test_buffers_of_stage_3():
    rows = _C.plan(_C.GPT2Config(), _C.Options(precision="bf16", grad_dtype="fp32", zero_stage=3), 8)
    assert [row[:4] for row in rows if row[1] in ("parameters", "gradients")] == [
        ("parameters", "parameters", "bf16", (SIZE // 8,)),
        ("parameters_first", "parameters", "bf16", (FIRST,)),
        ("parameters_ring", "parameters", "bf16", (2, BLOCK)),
        ("parameters_last", "parameters", "bf16", (LAST,)),
        ("gradients", "gradients", "fp32", (SIZE // 8,)),
        ("gradients_first", "gradients", "fp32", (FIRST,)),
        ("gradients_ring", "gradients", "fp32", (2, BLOCK)),
        ("gradients_last", "gradients", "fp32", (LAST,)),
    ]


def test_zero_stages_on_one_rank():
    """Nothing is padded for other ranks, and nothing sharded."""
    size = 124_475_904  # the parameters of the model file
    sizes = [lifetimes(_C.Options(zero_stage=stage), 1) for stage in range(4)]
    assert sizes[0]["parameters"] == sizes[0]["gradients"] == 4 * size
    assert sizes[0]["optimizer"] == 8 * size
    assert sizes[1] == sizes[2] == sizes[3] == sizes[0]


# In units of T * C values (1.5 MiB in bf16): of a block, of all blocks together, and llm.c's MiB per sequence.
LEVELS = [(0, 16, 0, 397.5), (1, 12, 4, 331.5), (2, 10, 4, 295.5), (3, 6, 4 + 4, 295.5), (4, 1, 4 + 9, 295.5)]


@pytest.mark.parametrize("recompute,block,shared,llmc_mib", LEVELS)
def test_activations_of_d12_against_llm_c(recompute, block, shared, llmc_mib):
    """MiB of activations per sequence at T = 1024 in bf16, at most those that llm.c needs with flash attention.

    A block keeps ln1 1, qkv 3, atty 1, residual2 1, ln2 1, fch 4, fch_gelu 4 and residual3 1 units; recompute 1 drops
    fch_gelu (one for all blocks stays), recompute 2 also ln1 and ln2 (lnf serves them), 3 qkv and residual2 (one of
    each stays), 4 all but residual3: besides fch_gelu one qkv, atty, residual2 and fch stay.

    The difference is llm.c's tensor of all logits, Vp * T * 2 bytes = 98.25 MiB a sequence: here a chunk of them at a
    time shares the memory of scratch_bt4c. One unit of it, 1.5 MiB, goes to dresidual, apart from scratch_btc.
    """
    B = 16
    outside = 2 + 2 + 4 + shared  # encoded, lnf; dresidual, scratch_btc; scratch_bt4c
    # 4 bytes a token: in a block mean and rstd of two layernorms and NH = 12 log-sum-exps, from recompute 4 on once for
    # all; outside mean and rstd of lnf; tokens, targets, token_order, losses and eval_losses
    statistics = 4 * T * ((1 if recompute == 4 else L) * (4 + 12) + 2 + 5)
    per_sequence = 2 * T * C * (L * block + outside) + statistics
    # loss_sum, grad_sum_of_squares, grad_norm, grad_scale, broken_parameters, each aligned to 256 bytes
    scalars = 5 * 256
    options = _C.Options(batch_size=B, seq_len=T, precision="bf16", recompute=recompute)
    assert lifetimes(options, 1)["activations"] == B * per_sequence + scalars - (256 - 4)  # the last one is not padded
    assert per_sequence + scalars <= llmc_mib * MIB


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_more_recomputation_never_needs_more_memory(layers, precision):
    """One block saves nothing, where what all blocks share is as much as it would keep."""
    config = _C.GPT2Config(num_layers=layers)
    sizes = []
    for recompute in range(5):
        rows = _C.plan(config, _C.Options(batch_size=3, seq_len=50, precision=precision, recompute=recompute))
        sizes.append(max(row[4] + -(-row[5] // 256) * 256 for row in rows if row[1] == "activations"))
    assert sizes == sorted(sizes, reverse=True)
    assert layers == 1 or len(set(sizes)) == 5


@pytest.mark.parametrize(
    "kind, B, rows",
    [
        ("cuda", 64, 3968),  # 384 MiB are 4002 rows: 17 chunks of 3856, or 31 tiles of 128 rows
        ("cpu", 64, 3856),
        ("cuda", 32, 1928),  # 192 MiB are 2001 rows: there is no room for 16 tiles
        ("cuda", 4, 640),  # 64 MiB are 667 rows: 7 chunks of 586
        ("cuda", 1, 512),  # two chunks of whole tiles
    ],
)
def test_rows_of_a_chunk_of_logits(kind, B, rows):
    options = _C.Options(batch_size=B, seq_len=T, precision="bf16", device=kind)
    (shape,) = (row[3] for row in _C.plan(_C.GPT2Config(), options) if row[0] == "logits")
    assert shape == (rows, Vp)


# --- what is allocated ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16", "recompute": 0},
        {"precision": "bf16", "master_weights": False, "recompute": 2},
        {"precision": "bf16", "recompute": 4},
        {"precision": "bf16", "classifier_rows": 5},
        {"precision": "bf16", "grad_dtype": "fp32", "zero_stage": 1},
    ],
    ids=str,
)
def test_the_plan_is_what_is_allocated(options):
    config = _C.GPT2Config(
        max_seq_len=64, vocab_size=100, padded_vocab_size=128, num_layers=3, num_heads=2, channels=48
    )
    model = _C.GPT2(config, _C.Options(batch_size=3, seq_len=17, **options))
    memory = model.memory()
    tokens = torch.ones(3, 17, dtype=torch.int32)
    assert model.allocated_bytes() == memory["parameters"] + memory["activations"]
    model.evaluate(tokens, tokens)
    model.forward(tokens)
    assert model.allocated_bytes() == memory["parameters"] + memory["activations"]
    model.backward(tokens)
    assert model.allocated_bytes() == sum(memory.values()) - memory["optimizer"]
    model.update(lr=1e-3, weight_decay=0.1, step=1)
    assert model.allocated_bytes() == sum(memory.values())
    model.reset_optimizer()
    assert model.allocated_bytes() == sum(memory.values()) - memory["optimizer"]


# A step of a model that writes all its memory, twice: the first run also grows what the process keeps for itself (the
# stacks and working memory of threads), so the second model is the only growth.
PROGRAM = """
import mmap
import torch
from llmc import _C

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * mmap.PAGESIZE

def step():
    config = _C.GPT2Config(max_seq_len=256, vocab_size=8192, padded_vocab_size=8192, num_layers=4, num_heads=4,
                           channels=256)
    model = _C.GPT2(config, _C.Options(batch_size=4, seq_len=256))
    for parameter in model.parameters().values():  # in place: malloc may keep what init_random draws into
        parameter.normal_(std=0.02)
    tokens = torch.ones(4, 256, dtype=torch.int32)
    model.forward(tokens)
    model.backward(tokens)
    model.update(lr=1e-3, weight_decay=0.1, step=1)
    return model

step()
before = resident()
model = step()
print(resident() - before, model.allocated_bytes())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident memory from Linux's /proc")
def test_the_process_grows_by_what_is_allocated():
    env = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    grown, allocated = map(int, result.stdout.split())
    assert allocated > 150 * MIB
    # 1%: pages that are only partly used, eval_losses that nobody wrote, and what Python and malloc keep
    assert abs(grown - allocated) <= 0.01 * allocated
