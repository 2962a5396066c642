"""llmc-train --dry-run: what it prints, read as an outside tool would, against a real model's memory and the plan."""

import math
import re
import struct
from dataclasses import dataclass

import pytest
import torch

import llmc.device
from llmc import _C
from llmc.cli.train import _main as command
from llmc.errors import RunError, UsageError

MIB = 2**20
LIFETIMES = ["parameters", "gradients", "optimizer", "activations"]
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "int32": 4}
ALIGNMENT = 256
BUFFER_LINE = re.compile(
    r"  (?P<lifetime>\w+) +(?P<name>\S+) +(?P<dtype>fp32|bf16|int32) +(?:(?P<count>\d+) x )?\((?P<shape>[\d,]+)\)"
    r" +(?P<mib>\d+\.\d{3})(?:  \(shares memory with (?P<others>[^)]+)\))?"
)
TABLE_LINE = re.compile(r" +(?P<stage>\d) +(?P<recompute>\d) +(?P<mib>\d+\.\d) +(?P<largest>\d+|none)")

SIZES = {"max_seq_len": 32, "vocab_size": 65, "padded_vocab_size": 128, "num_layers": 2, "num_heads": 2, "channels": 32}
SMALL = "-e custom:l=2,c=32,h=2,t=32,v=65 -g 4"


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """An empty working directory: a dry run needs no data."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclass
class Row:
    """A line of the listing."""

    lifetime: str
    name: str
    count: int
    bytes: int  # of all `count` buffers
    mib: float
    others: list[str]  # whose memory it shares


class Report:
    """The output of a dry run."""

    def __init__(self, text):
        self.text = text
        lines = text.splitlines()
        begin = lines.index("memory of each process:") + 2
        listing = lines[begin : lines.index("", begin)]
        self.rows = [self.row(BUFFER_LINE.fullmatch(line)) for line in listing]
        found = re.findall(r"^(\w+): (\d+) bytes, ([\d.]+) MiB", text, re.MULTILINE)
        self.totals = {name: int(size) for name, size, _ in found}
        for _, size, mib in found:
            assert float(mib) == pytest.approx(int(size) / MIB, abs=0.051)  # one decimal
        self.fits = re.search(r"^total.*: (fits|does not fit)$", text, re.MULTILINE)[1] == "fits"
        matches = [match for match in map(TABLE_LINE.fullmatch, lines) if match]
        self.largest = {
            (int(m["stage"]), int(m["recompute"])): 0 if m["largest"] == "none" else int(m["largest"]) for m in matches
        }
        self.need = {(int(m["stage"]), int(m["recompute"])): float(m["mib"]) for m in matches}

    @staticmethod
    def row(match):
        count, others = int(match["count"] or 1), re.findall(r"\w+", match["others"] or "")
        bytes = count * math.prod(map(int, match["shape"].split(","))) * DTYPE_BYTES[match["dtype"]]
        return Row(match["lifetime"], match["name"], count, bytes, float(match["mib"]), others)


@pytest.fixture
def dry_run(capsys):
    def run(flags):
        capsys.readouterr()
        command(["--dry-run", *flags.split()])
        return Report(capsys.readouterr().out)

    return run


def plan(sizes, world_size=1, **options):
    return _C.plan(_C.GPT2Config(**sizes), _C.Options(**options), world_size)


def allocated(rows):
    """Bytes by lifetime of rows of the plan: the last end, padded."""
    ends = {}
    for _, lifetime, _, _, offset, size in rows:
        ends[lifetime] = max(ends.get(lifetime, 0), offset + -(-size // ALIGNMENT) * ALIGNMENT)
    return ends


CONFIGURATIONS = [  # flags, sizes of the model, options of the core
    ("-b 4 -t 32", {}, {}),
    ("-b 3 -t 15", {}, {}),
    ("-b 1 -t 7 -r 0", {}, {"recompute": 0}),
    ("-b 5 -t 31 -r 2", {}, {"recompute": 2}),
    ("-b 4 -t 32 --precision bf16", {}, {"precision": "bf16"}),
    ("-b 3 -t 15 --precision bf16 -w 0", {}, {"precision": "bf16", "master_weights": False}),
    ("-b 3 -t 17 --precision bf16 --grad-dtype fp32", {}, {"precision": "bf16", "grad_dtype": "fp32"}),
    ("-b 2 -t 9 --precision bf16 -r 2", {}, {"precision": "bf16", "recompute": 2}),
    ("-b 2 -t 9 --precision bf16 -r 3", {}, {"precision": "bf16", "recompute": 3}),
    ("-b 5 -t 31 -r 4", {}, {"recompute": 4}),
    # GPT-2's vocabulary: the logits are the largest buffer, here in several chunks.
    (
        "-b 8 -t 128 -r 0 --precision bf16 -e custom:l=3,c=48,h=3,t=128,v=50257",
        {"max_seq_len": 128, "vocab_size": 50257, "padded_vocab_size": 50304}
        | {"num_layers": 3, "num_heads": 3, "channels": 48},
        {"precision": "bf16", "recompute": 0},
    ),
    (
        "-b 2 -t 11 -e gpt2:d6",
        {"max_seq_len": 1024, "vocab_size": 50257, "padded_vocab_size": 50304}
        | {"num_layers": 6, "num_heads": 6, "channels": 384},
        {},
    ),
]


@pytest.mark.parametrize(("flags", "sizes", "options"), CONFIGURATIONS, ids=[row[0] for row in CONFIGURATIONS])
def test_totals_are_what_a_model_allocates(dry_run, flags, sizes, options):
    report = dry_run(f"{SMALL} {flags}")
    B, T = (int(flags.split()[i]) for i in (1, 3))
    sizes = {**SIZES, **sizes}
    model = _C.GPT2(_C.GPT2Config(**sizes), _C.Options(batch_size=B, seq_len=T, gelu_fusion=2, **options))
    assert list(report.totals) == [*LIFETIMES, "total"]
    totals = report.totals
    assert model.allocated_bytes() == totals["parameters"] + totals["activations"]  # before the first step
    model.start_optimizer()
    assert model.allocated_bytes() == totals["total"] - totals["gradients"]
    assert model.memory() == {lifetime: totals[lifetime] for lifetime in LIFETIMES}
    if sizes == SIZES:  # the other models are too large for quick steps
        tokens = torch.zeros(B, T, dtype=torch.int32)
        model.forward(tokens)
        model.backward(tokens)
        assert model.allocated_bytes() == totals["total"]
    per_sequence = float(re.search(r"memory per sequence: ([\d.]+) MiB", report.text)[1])
    assert per_sequence == pytest.approx(totals["activations"] / B / MIB, abs=0.051)


@pytest.mark.parametrize(("flags", "sizes", "options"), CONFIGURATIONS, ids=[row[0] for row in CONFIGURATIONS])
def test_every_buffer_is_listed(dry_run, flags, sizes, options):
    report = dry_run(f"{SMALL} {flags}")
    sizes = {**SIZES, **sizes}
    B, T = (int(flags.split()[i]) for i in (1, 3))
    expected = {}
    for name, lifetime, _, _, _, size in plan(sizes, batch_size=B, seq_len=T, **options):
        key = (lifetime, re.sub(r"^h\d+\.", "h*.", name))
        count, total = expected.get(key, (0, 0))
        expected[key] = (count + 1, total + size)
    assert {(row.lifetime, row.name): (row.count, row.bytes) for row in report.rows} == expected
    for row in report.rows:
        assert row.mib == pytest.approx(row.bytes / MIB, abs=0.00051)  # three decimals


@pytest.mark.parametrize(("flags", "sizes", "options"), CONFIGURATIONS, ids=[row[0] for row in CONFIGURATIONS])
def test_the_listed_sizes_add_up(dry_run, flags, sizes, options):
    """Memory that is shared counts once, as large as its larger side; padding is below 256 bytes a buffer."""
    report = dry_run(f"{SMALL} {flags}")
    sharing = [row for row in report.rows if row.others]
    assert [row.name for row in sharing] == ["logits"]
    others = {name for row in sharing for name in row.others}
    assert others <= {"dresidual", "scratch_bt4c"}
    sums = dict.fromkeys(LIFETIMES, 0)
    buffers = dict.fromkeys(LIFETIMES, 0)
    for row in report.rows:
        buffers[row.lifetime] += row.count
        if row.name not in others and not row.others:
            sums[row.lifetime] += row.bytes
    sides = (others, {row.name for row in sharing})
    sums["activations"] += max(sum(row.bytes for row in report.rows if row.name in side) for side in sides)
    for lifetime in LIFETIMES:
        assert 0 <= report.totals[lifetime] - sums[lifetime] < ALIGNMENT * buffers[lifetime]
    assert report.totals["total"] == sum(report.totals[lifetime] for lifetime in LIFETIMES)


COPIES = [  # flags, bytes of the copies by hand: of N parameters, or of the slices of a unit
    ("", lambda N, n: {"m": 4 * N, "v": 4 * N, "master": 4 * N}),  # which are the model file's, too
    ("--precision bf16", lambda N, n: {"m": 4 * N, "v": 4 * N, "master": 4 * N, "parameters": 2 * N}),
    ("--precision bf16 -w 0", lambda N, n: {"m": 4 * N, "v": 4 * N, "parameters": 2 * N}),
    ("-z 2", lambda N, n: {"m": 4 * N, "v": 4 * N, "master": 4 * N}),  # of one process
    ("-z 2 -pn 3", lambda N, n: {"m": 4 * n, "v": 4 * n, "master": 4 * n, "parameters": 4 * N}),
]


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize(("flags", "expected"), COPIES)
def test_copies_for_checkpoints(dry_run, flags, expected, where):
    """Of a process that also writes the model; in host memory, which is a CPU's own."""
    flags = f"{SMALL} -b 2 -t 8 {flags} -n 5 --device {where} --memory 1"
    flags = flags if "bf16" in flags else f"{flags} --precision fp32"
    without, report = dry_run(flags), dry_run(f"{flags} --async-checkpoint 1")
    N = int(re.search(r"(\d+) parameters", report.text)[1])
    n = sum(-(-size // (128 * 3)) * 128 for _, size, _ in _C.parameter_units(_C.GPT2Config(**SIZES), 3))
    lifetime = "checkpoint" if where == "cpu" else "host"
    expected = {("copy_of_" + name, lifetime): size for name, size in expected(N, n).items()}
    assert {(row.name, row.lifetime): row.bytes for row in report.rows[len(without.rows) :]} == expected
    padding = report.totals[lifetime] - sum(expected.values())
    assert 0 <= padding < ALIGNMENT * len(expected)
    total = re.compile(r"^total.*: (\d+) bytes", re.M)
    needed = [int(total.search(each.text)[1]) for each in (without, report)]
    assert needed[1] - needed[0] == (report.totals["checkpoint"] if where == "cpu" else 0)


def fits(gib, B, T, world_size, stage, recompute, **options):
    options = {"batch_size": B, "seq_len": T, "zero_stage": stage, "recompute": recompute, **options}
    return sum(allocated(plan(SIZES, world_size, **options)).values()) <= round(gib * 2**30)


@pytest.mark.parametrize("gib", ["0.001", "0.0027", "0.01", "0.1"])
@pytest.mark.parametrize(
    "flags", ["-t 15", "-t 32 --precision bf16 --grad-dtype fp32", "-t 16 -pn 8", "-t 16 -b 2 -pn 3"]
)
def test_largest_batch(dry_run, gib, flags):
    report = dry_run(f"{SMALL} {flags} --memory {gib}")
    words = flags.split()
    T, P = int(words[1]), int(words[words.index("-pn") + 1]) if "-pn" in words else 1
    options = {"precision": "bf16", "grad_dtype": "fp32"} if "bf16" in words else {}
    assert list(report.largest) == [(stage, r) for stage in (range(4) if P > 1 else [0]) for r in range(5)]
    for (stage, recompute), B in report.largest.items():
        assert B == 0 or fits(float(gib), B, T, P, stage, recompute, **options)
        assert not fits(float(gib), B + 1, T, P, stage, recompute, **options)


def test_less_memory_fits_less(dry_run):
    tiny, small = dry_run(f"{SMALL} -t 16 --memory 0.0001"), dry_run(f"{SMALL} -t 16 --memory 0.01")
    assert set(tiny.largest.values()) == {0} and not tiny.fits
    assert re.findall(r"\bnone$", tiny.text, re.MULTILINE) == ["none"] * 5
    largest = [0, *(small.largest[0, recompute] for recompute in range(5))]
    assert largest == sorted(set(largest))  # recomputation pays
    assert small.fits


def test_a_total_that_just_fits(dry_run):
    total = dry_run(f"{SMALL} -t 16 -b 5").totals["total"]
    enough, short = (dry_run(f"{SMALL} -t 16 -b 5 --memory {size / 2**30:.12f}") for size in (total, total - 1))
    assert (enough.fits, enough.largest[0, 1]) == (True, 5)
    assert (short.fits, short.largest[0, 1]) == (False, 4)


def test_a_long_context(dry_run):
    """The core refuses batches of 2^31 tokens, so the search must not ask for them."""
    report = dry_run("-e custom:l=1,c=8,h=1,t=1048576,v=65 -t 1048576 -b 1 -g 4 --memory 100000")
    assert report.largest[0, 2] == 2047  # 2^31 - 1 tokens at most


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_processes_share_what_the_stage_says(dry_run, stage):
    flags = f"{SMALL} -t 16 -b 4"
    alone, report = dry_run(flags), dry_run(f"{flags} -pn 8 -z {stage}")
    assert "8 process(es)" in report.text and f" -z {stage}," in report.text
    expected = allocated(plan(SIZES, 8, batch_size=4, seq_len=16, zero_stage=stage))
    assert {name: report.totals[name] for name in LIFETIMES} == expected
    assert report.totals["activations"] == alone.totals["activations"]  # B is per process
    sizes = [{row.name: row.bytes for row in of.rows} for of in (alone, report)]
    for name, first_stage in (("m", 1), ("v", 1), ("gradients", 2), ("parameters", 3)):
        parts = 8 if stage >= first_stage else 1
        # A part of each of the 4 units (embeddings, two blocks, last layernorm) is padded by less than 128 numbers.
        padding = sizes[1][name] - sizes[0][name] / parts
        assert 0 <= padding < 8 / parts * 4 * 128 * 4
    assert report.need[stage, 1] == pytest.approx(report.totals["total"] / MIB, abs=0.051)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_process_has_nothing_to_cut(dry_run, stage):
    alone, report = dry_run(f"{SMALL} -t 16"), dry_run(f"{SMALL} -t 16 -z {stage}")
    assert report.totals == alone.totals and list(report.largest) == list(alone.largest)


def test_a_gpu_on_paper(dry_run):
    """A GPU need not be there; its operations have scratch memory of their own, and bf16 is the default."""
    report = dry_run(f"{SMALL} -b 2 -t 9 --device cuda --memory 40")
    options = {"batch_size": 2, "seq_len": 9, "precision": "bf16"}
    expected = allocated(plan(SIZES, device="cuda", **options))
    assert {name: report.totals[name] for name in LIFETIMES} == expected
    on_cpu = allocated(plan(SIZES, **options))
    workspace = 32 * MIB + 4 * SIZES["channels"] * 4  # cuBLASLt's, and the gradient of a bias in fp32
    assert expected == {**on_cpu, "activations": on_cpu["activations"] + workspace}
    assert "what fits into 40.0 GiB" in report.text


def test_a_gpu_on_paper_needs_its_memory(dry_run):
    if not _C.why_no_cuda_device():
        pytest.skip("there is a GPU, whose memory is known")
    with pytest.raises(UsageError, match=r"--device cuda: .*; use --device cpu, or give a GPU's memory with --memory"):
        dry_run(f"{SMALL} -b 2 -t 9 --device cuda")


def test_memory_is_this_machines(dry_run, monkeypatch):
    monkeypatch.setattr(llmc.device, "memory_bytes", lambda: 3 * 2**30)
    assert re.search(r"^total: .* of 3072\.0 MiB: fits$", dry_run(f"{SMALL} -t 16").text, re.MULTILINE)
    text = dry_run(f"{SMALL} -t 16 --memory 80").text
    assert "of 81920.0 MiB: fits" in text and "what fits into 80.0 GiB at -t 16:" in text


def test_micro_steps(dry_run):
    assert ", 3 micro-step(s)" in dry_run(f"{SMALL} -t 16 -b 2 -d 768 -pn 8").text
    assert ", 1 micro-step(s)" in dry_run(f"{SMALL} -t 16 -b 2").text


STEPS = [  # flags, the line; -b 4 -t 16 are 64 tokens a pass
    ("-x 20", "steps: 20 of 64 tokens = 1.28e3 tokens in all"),
    ("-x 18865 -d 524288 -pn 8", "steps: 18865 of 524288 tokens = 9.89e9 tokens in all"),
    ("-x 2147483647 -b 65536", "steps: 2147483647 of 1048576 tokens = 2.25e15 tokens in all"),
    ("-x 1 -b 1 -t 5", "steps: 1 of 5 tokens = 5.00e0 tokens in all"),
    ("-x 0", "steps: 0 of 64 tokens = 0.00e0 tokens in all"),
    ("-i data/a_*.bin", "steps: 15 of 64 tokens = 9.60e2 tokens in all (an epoch of 1001)"),
    ("-i data/a_*.bin -x 30", "steps: 30 of 64 tokens = 1.92e3 tokens in all"),
    ("-i data/a_*.bin -d 384 -pn 3", "steps: 2 of 384 tokens = 7.68e2 tokens in all (an epoch of 1001)"),
    ("-i data/a_*.bin -d 2048", "steps: 0 of 2048 tokens = 0.00e0 tokens in all (an epoch of 1001)"),
    ("-j data/a_*.bin -a 1", "steps: 15 of 64 tokens = 9.60e2 tokens in all (an epoch of 1001)"),
    ("-i none_*.bin", "steps: one epoch, however long that is: none_*.bin is not there; -x says it"),
]


@pytest.mark.parametrize(("flags", "line"), STEPS, ids=[row[0] for row in STEPS])
def test_steps_and_tokens(dry_run, directory, flags, line):
    (directory / "data").mkdir()
    for number, n in enumerate((301, 700)):
        write(directory / f"data/a_{number}.bin", 20240520, 1, n, content=bytes(2 * n))
    assert dry_run(f"{SMALL} -t 16 {flags}").text.splitlines()[1] == line


def test_a_damaged_shard(dry_run, directory):
    write(directory / "a_0.bin", 20240520, 1, 9, content=bytes(2))
    with pytest.raises(RunError, match=r"a_0\.bin"):
        dry_run(f"{SMALL} -t 16 -i a_*.bin")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_a_stage_saves(dry_run, stage):
    """The difference of the totals; at stage 1 that is 7/8 of m and v, N numbers each."""
    flags = "-e gpt2:d6 -t 64 -b 1 -pn 8"
    report, uncut = dry_run(f"{flags} -z {stage}"), dry_run(flags)
    saved = float(re.search(rf"^-z {stage}: ([\d.]+) MiB less per process than -z 0$", report.text, re.MULTILINE)[1])
    assert saved == pytest.approx((uncut.totals["total"] - report.totals["total"]) / MIB, abs=0.051)
    if stage == 1:
        assert saved == pytest.approx(2 * 30357504 * 4 * 7 / 8 / MIB, abs=0.1)  # less padding
    assert "less per process" not in uncut.text


def write(path, *slots, content=b""):
    path.write_bytes(struct.pack("<256i", *slots, *[0] * (256 - len(slots))) + content)


def write_data(directory, vocab_size):
    data = directory / "data"
    data.mkdir()
    write(data / "a_train_0.bin", 20240520, 1, 4, content=struct.pack("<4H", 0, 1, 2, 3))
    write(data / "tokenizer.bin", 20240328, 2, vocab_size, 0, content=b"\1a" * vocab_size)


def test_nothing_is_written_or_allocated(dry_run, directory, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a dry run allocates no model")

    monkeypatch.setattr(_C, "GPT2", refuse)
    dry_run(f"{SMALL} -t 16 -o out -n 5")
    dry_run("-e d48 -t 1024 -b 16 --memory 80")
    assert list(directory.iterdir()) == []


def test_a_model_file(dry_run, directory):
    """Of the file only the header matters, and it has the right length; its weights are never read."""
    V, C, L, T = 128, 32, 2, 32
    N = V * C + T * C + L * (12 * C * C + 13 * C) + 2 * C
    write(directory / "m.bin", 20240326, 3, 32, 65, 2, 2, 32, 128)
    with open("m.bin", "r+b") as file:
        file.truncate(1024 + 4 * N)
    before = {path: path.stat() for path in directory.iterdir()}
    report = dry_run("-e m.bin -t 16 -g 4")
    assert report.text.startswith(f"m.bin: {N} parameters, fp32, ")
    assert report.totals == dry_run(f"{SMALL} -t 16").totals
    after = {path: path.stat() for path in directory.iterdir()}
    assert {path: stat.st_mtime_ns for path, stat in after.items()} == {
        path: stat.st_mtime_ns for path, stat in before.items()
    }


def test_the_vocabulary_of_the_data(dry_run, directory):
    write_data(directory, vocab_size=200)
    custom = "-e custom:l=2,c=32,h=2,t=32 -t 16 -g 4"
    explicit = dry_run("-e custom:l=2,c=32,h=2,t=32,v=200 -t 16 -g 4").totals
    assert dry_run(f"{custom} -i data/a_*.bin").totals == explicit
    assert dry_run(f"{custom} --tokenizer data/tokenizer.bin").totals == explicit
    (directory / "data/tokenizer.bin").unlink()
    with pytest.raises(UsageError, match=r"add ,v=SIZE"):
        dry_run(f"{custom} -i data/a_*.bin")
    with pytest.raises(RunError, match=r"no token shards match none_\*\.bin"):
        dry_run(f"{custom} -i none_*.bin")


def test_an_explicit_vocabulary_needs_no_data_wherever_it_stands(dry_run):
    assert dry_run("-e custom:v=65,l=2,c=32,h=2,t=32 -t 16 -g 4").totals == dry_run(f"{SMALL} -t 16").totals


ERRORS = [
    ("-t 33", UsageError, "-t 33 is longer than the context of -e custom:l=2,c=32,h=2,t=32,v=65: 32"),
    ("-t 16 -b 2 -d 300 -pn 8", UsageError, "-d 300 is not a multiple of 256"),
    ("-t 16 -e gpt5", UsageError, "-e gpt5 is no model"),
    ("-t 16 -e custom:l=2,c=33,h=2,t=32,v=65", UsageError, "33 channels in 2 heads"),
    ("-t 16 -e missing.bin", RunError, "missing.bin"),
    ("-t 16 --tokenizer missing.bin", RunError, "missing.bin"),
    ("-t 16 -w 0", UsageError, "-w 0 has no effect in fp32"),
    ("-t 16 --grad-dtype bf16", UsageError, "--grad-dtype bf16 needs --precision bf16"),
]


@pytest.mark.parametrize(("flags", "kind", "message"), ERRORS, ids=[row[0] for row in ERRORS])
def test_errors(dry_run, capsys, flags, kind, message):
    with pytest.raises(kind) as caught:
        dry_run(f"{SMALL} {flags}")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""  # nothing before the check
