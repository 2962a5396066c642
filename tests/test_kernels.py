"""llmc/kernels.py: what a step launches and moves on paper, against what the recorder sees it launch, and by hand."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import devices
import pytest

from llmc import _C
from llmc.kernels import CUDNN, Kernel, Step, Wait

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"

TINY = "custom:l=3,c=32,h=2,t=16,v=65"
CHUNKS = "custom:l=2,c=64,h=1,t=512,v=50257"  # whose logits take several chunks
STEPS = [
    # Every recomputation with every fusion, in both precisions
    *(
        {
            "descriptor": TINY,
            "B": 2,
            "T": 16,
            "precision": precision,
            "recompute": r,
            "gelu_fusion": ge,
            "bias_fusion": bool(ge),
        }
        for precision in ("fp32", "bf16")
        for r in (0, 1, 2, 3, 4)
        for ge in (0, 1, 2)
    ),
    # Every stage, with micro-steps that begin, go on and end a step, on ranks that do and do not divide the units
    *(
        {"descriptor": TINY, "B": 2, "T": 16, "zero_stage": z, "world_size": P, "accumulation_steps": A}
        for z in (0, 1, 2, 3)
        for P, A in ((1, 3), (2, 1), (3, 4))
    ),
    *(
        {"descriptor": TINY, "B": 2, "T": 16, "fp8": True, "recompute": r, "accumulation_steps": A}
        for r, A in ((0, 1), (1, 3), (2, 2), (3, 1), (4, 2))
    ),
    {"descriptor": TINY, "B": 2, "T": 16, "fp8": True, "zero_stage": 2, "world_size": 2, "grad_dtype": "fp32"},
    *({"descriptor": TINY, "B": 2, "T": 16, "fp8": 2, "recompute": r, "accumulation_steps": 2} for r in (0, 4)),
    *({"descriptor": CHUNKS, "B": 3, "T": 512, "fp8": 2, "accumulation_steps": A} for A in (1, 2)),
    {"descriptor": CHUNKS, "B": 3, "T": 512, "fp8": 2, "grad_dtype": "fp32", "zero_stage": 2, "world_size": 2},
    {"descriptor": TINY, "B": 2, "T": 16, "accumulation_steps": 3, "bias_fusion": False},
    {"descriptor": "custom:l=1,c=32,h=2,t=16,v=65", "B": 1, "T": 16, "zero_stage": 3, "world_size": 2},
    *(
        {
            "descriptor": TINY,
            "B": 2,
            "T": 16,
            "precision": precision,
            "offload_piece": 256,
            "zero_stage": z,
            "world_size": P,
        }
        for precision in ("fp32", "bf16")
        for z, P in ((0, 1), (1, 3), (3, 2))
    ),
    {"descriptor": CHUNKS, "B": 3, "T": 512},
    {"descriptor": CHUNKS, "B": 3, "T": 512, "accumulation_steps": 2},
    {"descriptor": CHUNKS, "B": 3, "T": 512, "grad_dtype": "fp32", "accumulation_steps": 2},
    {"descriptor": CHUNKS, "B": 3, "T": 512, "grad_dtype": "fp32", "zero_stage": 2, "world_size": 4},
    {
        "descriptor": "custom:l=80,c=8,h=1,t=8,v=65",
        "B": 1,
        "T": 8,
        "precision": "fp32",
    },  # more units than a table holds
    {"descriptor": "custom:l=1,c=16384,h=128,t=8,v=65", "B": 1, "T": 8},  # rows too long for one kernel
]

SMALL = {"max_seq_len": 16, "vocab_size": 65, "padded_vocab_size": 128, "num_layers": 2, "num_heads": 2, "channels": 32}

COMPARE = """
import json, sys
import kernel_launches as k
recorder = k.Recorder()
steps = [k.Step("", **settings) for settings in json.load(sys.stdin)]
print(json.dumps([k.differences(step, recorder.record(step)) for step in steps]))
"""


def test_the_launches_are_those_of_the_step():
    """Kernels, and shapes and bytes of products, zeros and collectives. One process: there is one recorder in each."""
    devices.simulator("fast")  # skips the test where it is not built
    command = [sys.executable, "-c", COMPARE]
    result = subprocess.run(command, cwd=SCRIPTS, input=json.dumps(STEPS), capture_output=True, text=True, check=True)
    differences = json.loads(result.stdout)
    assert len(differences) == len(STEPS)
    assert {json.dumps(step): found for step, found in zip(STEPS, differences, strict=True) if found} == {}


COUNT_EARLY = """
import json, sys
import kernel_launches as k
recorder, counts = k.Recorder(), []
for settings in json.load(sys.stdin):
    step = k.Step("", **settings)
    launches = recorder.record(step)
    own = [launch.kernel.endswith("_kernel") or "_kernel<" in launch.kernel for launch in launches]
    counts.append([step.on_paper().early_launches(), sum(a and b for a, b in zip(own, own[1:]))])
print(json.dumps(counts))
"""


def test_own_kernels_after_own_kernels():
    """Of one micro-step and one process: the embedding of another one comes after the copy of its tokens, which nothing
    records, and so do collectives."""
    devices.simulator("fast")
    several = {"world_size", "offload_piece", "accumulation_steps"}
    alone = [step for step in STEPS if not several & step.keys()]
    command = [sys.executable, "-c", COUNT_EARLY]
    result = subprocess.run(command, cwd=SCRIPTS, input=json.dumps(alone), capture_output=True, text=True, check=True)
    counts = json.loads(result.stdout)
    assert len(counts) == len(alone) > 30
    assert all(paper == launched > 0 for paper, launched in counts), counts


def test_bytes_and_flops_by_hand():
    """Of 124M with B = 64 in bf16: N = 65536 rows, C = 768, L = 12, V = 50257, Vp = 50304, 124475904 parameters."""
    config = _C.GPT2Config(max_seq_len=1024, num_layers=12, num_heads=12, channels=768)
    step = Step(config, _C.Options(batch_size=64, seq_len=1024, precision="bf16", device="cuda"))
    residual = 65536 * 768 * 2  # bytes
    sums = Counter()
    for kernel, count in step.launches().items():
        sums[kernel.name, "bytes"] += kernel.bytes * count
        sums[kernel.name, "flops"] += kernel.flops * count
        sums[kernel.name, "useful"] += kernel.useful_flops * count
    expected = {
        "embedding_forward_kernel*": residual + (50257 + 1024) * 768 * 2,
        "dwte_kernel*": residual + 2 * 50257 * 768 * 2,
        "dwpe_kernel*": residual + 2 * 1024 * 768 * 2,
        "layernorm_forward_kernel<*true>": 24 * 4 * residual,
        "layernorm_forward_kernel<*false>": 2 * residual,
        "layernorm_backward_kernel*": 25 * 4 * residual,
        "gelu_forward_kernel*": 24 * 8 * residual,  # twice: at -r 1 it is computed again
        "gelu_backward_kernel*": 12 * 12 * residual,
        "attention_forward_kernel*": 12 * (4 * residual + 65536 * 12 * 4),
        "attention_delta_kernel*": 12 * (2 * residual + 65536 * 12 * 4),
        "attention_dkdv_kernel*": 12 * (6 * residual + 2 * 65536 * 12 * 4),
        "attention_dq_kernel*": 12 * (5 * residual + 2 * 65536 * 12 * 4),
        "bias_partials_kernel*": 12 * 9 * residual,
        "add_groups_kernel*": (12 * 9 + 25 * 2) * 768 * 2,
        "fused_classifier_kernel*": 2 * 65536 * 50304 * 2,
        "cast_kernel*": 50304 * 768 * (4 + 2),
        "adamw_kernel*": 124475904 * 28,  # gradient 2, m and v 16, master 8, parameter 2
        "partial_sums_kernel<true>": 124475904 * 2,
        "partial_sums_kernel<false>": 65536 * 4,
        "add_partials_kernel*": 0,
        "clip_scale_kernel*": 0,
    }
    found = {name: value for (name, what), value in sums.items() if what == "bytes"}
    assert found == {**expected, "cuBLASLt": found["cuBLASLt"], "memset": found["memset"]}  # which the recorder sees
    # Each head: two products of (T,T,HS) forward, of which half lies in the future; of the seven backward three are
    # computed for the second time, or would be with one kernel for all.
    pair = 12 * 64 * 12 * (2 * 1024 * 1024 * 64) / 2
    assert sums["attention_forward_kernel*", "flops"] == sums["attention_forward_kernel*", "useful"] == 2 * pair
    assert sums["attention_dkdv_kernel*", "flops"] + sums["attention_dq_kernel*", "flops"] == 7 * pair
    assert sums["attention_dkdv_kernel*", "useful"] + sums["attention_dq_kernel*", "useful"] == 4 * pair
    weights = 12 * 12 * 768 * 768 + 50304 * 768
    assert sums["cuBLASLt", "flops"] == sums["cuBLASLt", "useful"] == 6 * 65536 * weights
    # What the model's flops count besides: 6 per token for each value of wpe, biases and layernorms.
    useful = sum(value for (_, what), value in sums.items() if what == "useful")
    others = 1024 * 768 + 12 * 13 * 768 + 2 * 768
    assert step.model_flops_per_token * 65536 == useful + 6 * 65536 * others


def test_conversions_to_fp8_by_hand():
    """Two bytes of a value of bf16 are read, one is written as it lies and one transposed. Forward, layernorms
    write ln1 and ln2 themselves; weights and attention's output go both ways, and so does the GELU of fch. Backward,
    ln1 and ln2 are transposed; gradients go both ways, that of the GELU's input with it."""
    config = _C.GPT2Config(max_seq_len=1024, num_layers=12, num_heads=12, channels=768)
    options = _C.Options(batch_size=64, seq_len=1024, precision="bf16", device="cuda", recompute=0, fp8=True)
    moved, products = Counter(), Counter()
    for kernel, count in Step(config, options).launches().items():
        moved[kernel.name] += kernel.bytes * count
        products[kernel.fp8] += kernel.bytes * count * (kernel.name == "cuBLASLt" and "logits" not in kernel.what)
    N, C, weights = 65536, 768, 12 * 768**2
    shapes = ((2304, 768), (768, 768), (3072, 768), (768, 3072))
    inputs, gradients = 4 * N * C + 4 * N * 4 * C, 4 * N * (3 + 1 + 1) * C + 6 * N * 4 * C
    assert moved["quantize_kernel*"] == 12 * (4 * weights + inputs + gradients)
    assert moved["transpose_kernel*"] == 12 * 2 * 2 * N * C
    assert moved["layernorm_forward_kernel<*true>"] == 23 * 7 * N * C + 8 * N * C  # the last one's output is in bf16
    sums = sum(2 * (N * (IC + OC) + OC * IC) for OC, IC in shapes)  # results in bf16: out, dx and dweight
    assert products == {True: 12 * (sums + sum(2 * (N * (IC + OC) + OC * IC) for OC, IC in shapes)), False: 0}


def test_the_loss_head_in_fp8_by_hand():
    """Over 12 chunks. wte is converted once, lnf in chunks, as they lie and transposed: four bytes of a value move.
    The classifier reads two bytes of a logit and writes one, which is then transposed."""
    config = _C.GPT2Config(max_seq_len=1024, num_layers=12, num_heads=12, channels=768)
    options = {"batch_size": 64, "seq_len": 1024, "precision": "bf16", "device": "cuda", "recompute": 0}
    sums: list[Counter[str]] = []
    for level in (1, 2):
        sums.append(Counter())
        for kernel, count in Step(config, _C.Options(**options, fp8=level)).launches().items():
            what = f"{kernel.what}{', FP8' * kernel.fp8}" if kernel.name == "cuBLASLt" else kernel.name
            sums[-1][what] += kernel.bytes * count
    N, C, Vp, chunks = 65536, 768, 50304, 12
    changes = {what: sums[1][what] - sums[0][what] for what in sums[1] if sums[1][what] != sums[0][what]}
    assert changes == {
        "quantize_kernel*": 4 * (Vp * C + N * C),
        "fused_classifier_kernel*": -N * Vp,
        "transpose_kernel*": 2 * N * Vp,
        "update_scales_kernel*": 2 * 4 * (1 + 2 * 16 + 2),
        "memset": 2 * 4,
        "logits, FP8": N * C + chunks * Vp * C + 2 * N * Vp,
        "logits, input gradient, FP8": N * Vp + chunks * Vp * C + 2 * N * C,
        "logits, weight gradient, FP8": N * (Vp + C) + (2 * chunks - 1) * 4 * Vp * C,
    }


def test_cudnns_attention_by_hand():
    """Five products backward, and the causal half of a (T,T) matrix of bf16 per head written and read."""
    config = _C.GPT2Config(max_seq_len=1024, num_layers=12, num_heads=12, channels=768)
    options = _C.Options(batch_size=64, seq_len=1024, precision="bf16", device="cuda", cudnn_attention=True)
    kernels = {kernel: count for kernel, count in Step(config, options).launches().items() if kernel.name == CUDNN}
    residual, lse, matrix = 65536 * 768 * 2, 65536 * 12 * 4, 64 * 12 * 1024 * 1024
    pair = 64 * 12 * (2 * 1024 * 1024 * 64) / 2
    assert {(k.what, k.bytes, k.flops, k.useful_flops, count) for k, count in kernels.items()} == {
        ("attention forward", 4 * residual + lse, 2 * pair, 2 * pair, 12),
        ("attention backward", 8 * residual + lse + 2 * matrix, 5 * pair, 4 * pair, 12),
    }


@pytest.mark.parametrize(("precision", "master_weights", "moved"), [("bf16", False, 22), ("fp32", True, 28)])
def test_bytes_of_the_update_without_master_weights(precision, master_weights, moved):
    """A gradient is read, parameter, m and v are read and written."""
    config = _C.GPT2Config(**SMALL)
    options = _C.Options(precision=precision, master_weights=master_weights, seq_len=16)
    launches = Step(config, options).launches()
    found = sum(kernel.bytes * count for kernel, count in launches.items() if kernel.name == "adamw_kernel*")
    assert found == config.num_parameters * moved


def order_of(step, *names):
    """The events with these words in their names, as text."""
    found = []
    for phase, _ in step.phases():
        for event in phase():
            before = "" if isinstance(event, Kernel) else "wait " if isinstance(event, Wait) else f"{event.operation} "
            text = before + event.what
            if any(name in text for name in names):
                found.append(text)
    return found


def test_the_order_of_communication():
    """At stage 3 the next block comes while one is computed; its gradients go while the one before it is computed."""
    config = _C.GPT2Config(**SMALL)
    step = Step(config, _C.Options(seq_len=16, zero_stage=3), world_size=2)
    names = (
        "parameters ",
        "gradients 1",
        "gradients 2",
        "AdamW",
        "attention forward",
        "attention backward: q",
        "logits",
    )
    assert order_of(step, *names) == [
        *("all_gather parameters 0", "all_gather parameters 1", "wait parameters 0", "wait parameters 1"),
        *("all_gather parameters 2", "attention forward", "wait parameters 2"),
        *("all_gather parameters 3", "attention forward", "wait parameters 3"),
        *("logits", "logits, input gradient", "logits, weight gradient"),
        *("wait parameters 2", "attention backward: q", "reduce_scatter gradients 2"),
        *("wait parameters 1", "attention backward: q", "reduce_scatter gradients 1"),
        *("wait gradients 2", "wait gradients 1"),
        "AdamW",
    ]
