"""What the kernels promise about their machine code; the scripts that look, kernel_report.py and kernel_launches.py."""

import csv
import re
import subprocess
import sys
import sysconfig
from fnmatch import fnmatchcase
from pathlib import Path

import devices
import pytest
import torch

ROOT = Path(__file__).parent.parent
KERNELS, LAUNCHES = ROOT / "docs" / "kernels.csv", ROOT / "docs" / "launches.csv"
ARCHITECTURES = {"sm_80", "sm_90", "sm_100"}

# By a pattern of the name: of how many tensors 128-bit loads and stores are made at least, and whether the tensor cores
# multiply. 64 bits are the widest where a tensor of 16-bit elements goes along with one of 32 bits.
PROMISES = {
    "accumulate_kernel<bf16, float>": (1, 0, False),
    "accumulate_kernel<float, bf16>": (1, 1, False),
    "accumulate_kernel<bf16, bf16>": (2, 1, False),
    "accumulate_kernel<float, float>": (2, 1, False),
    "adamw_kernel<*>": (3, 3, False),
    "add_groups_kernel<*>": (1, 0, False),
    "add_partials_kernel": (0, 0, False),  # up to 1024 numbers
    "attention_delta_kernel<*>": (2, 0, False),
    "attention_dkdv_kernel<attention::Fp32, *>": (4, 2, False),
    "attention_dkdv_kernel<attention::[BT]*>": (4, 2, True),
    "attention_dq_kernel<attention::Fp32, *>": (4, 1, False),
    "attention_dq_kernel<attention::[BT]*>": (4, 1, True),
    "attention_forward_kernel<attention::Fp32, *>": (3, 1, False),
    "attention_forward_kernel<attention::[BT]*>": (3, 1, True),
    "bias_partials_kernel<*>": (1, 1, False),
    "cast_kernel<bf16, float>": (1, 0, False),
    "cast_kernel<float, bf16>": (0, 1, False),
    "cast_kernel<bf16, bf16>": (1, 1, False),
    "cast_kernel<float, float>": (1, 1, False),
    "clip_scale_kernel": (0, 0, False),  # one number
    "dwpe_kernel<float, *>": (2, 1, False),
    "dwpe_kernel<bf16, *>": (1, 0, False),
    "dwte_kernel<float, *>": (2, 1, False),
    "dwte_kernel<bf16, *>": (1, 0, False),
    "embedding_forward_kernel<*>": (2, 1, False),
    "fused_classifier_kernel<bf16, bf16>": (2, 1, False),
    "fused_classifier_kernel<bf16, e5m2>": (2, 0, False),  # 64 bits of FP8
    "fused_classifier_kernel<float, float>": (2, 1, False),
    "gelu_backward_kernel<*>": (2, 1, False),
    "gelu_forward_kernel<*>": (1, 1, False),
    "layernorm_backward_kernel<*>": (3, 2, False),
    "layernorm_dx_kernel<*>": (3, 1, False),
    "layernorm_forward_kernel<*, Plain<*>, *, true>": (4, 2, False),
    "layernorm_forward_kernel<*, Plain<*>, *, false>": (3, 1, False),
    "layernorm_forward_kernel<*, InE4M3, *, true>": (4, 1, False),  # 64 bits of FP8
    "layernorm_forward_kernel<*, InE4M3, *, false>": (3, 0, False),
    "layernorm_partials_kernel<*>": (2, 2, False),
    "partial_sums_kernel<*>": (2, 0, False),
    "quantize_kernel<*, GeluGradient>": (8, 2, False),
    "quantize_kernel<*, Gelu>": (4, 2, False),  # transposed; what lies as it was is 64 bits wide
    "quantize_kernel<*, Itself>": (4, 2, False),
    "raise_kernel": (0, 0, False),  # a number of a tensor
    "round_parameters_kernel<*>": (1, 0, False),
    "scale_kernel": (0, 0, False),  # two numbers
    "transpose_kernel": (0, 2, False),  # 64 bits wide
    "update_scales_kernel": (0, 0, False),  # 16 numbers of a tensor
}


@pytest.fixture(scope="module", autouse=True)
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        yield


@pytest.fixture(scope="module")
def kernel_report():
    import kernel_report

    return kernel_report


@pytest.fixture(scope="module")
def kernel_launches():
    import kernel_launches

    return kernel_launches


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --- the promises -----------------------------------------------------------------------------------------------------


def broken_promises(rows):
    broken = []
    for row in rows:
        name = f"{row['kernel']} on {row['arch']}"
        matching = [promise for pattern, promise in PROMISES.items() if fnmatchcase(row["kernel"], pattern)]
        if len(matching) != 1:
            broken.append(f"{name}: {len(matching)} entries of PROMISES")
            continue
        loads, stores, matrix = matching[0]
        if int(row["stack"]) or int(row["local_accesses"]):
            broken.append(f"{name}: {row['stack']} bytes of stack, {row['local_accesses']} accesses to it")
        if int(row["wide_loads"]) < loads:
            broken.append(f"{name}: {row['wide_loads']} wide loads instead of {loads}")
        if int(row["wide_stores"]) < stores:
            broken.append(f"{name}: {row['wide_stores']} wide stores instead of {stores}")
        if bool(int(row["matrix"])) != matrix:
            broken.append(f"{name}: {row['matrix']} matrix instructions")
    return broken


def test_the_promises_are_kept():
    assert broken_promises(read_csv(KERNELS)) == []


@pytest.mark.parametrize(
    ("column", "value"),
    [("stack", 8), ("local_accesses", 1), ("wide_loads", 0), ("wide_stores", 0), ("matrix", 1), ("kernel", "new")],
)
def test_a_broken_promise_is_seen(column, value):
    good = {"kernel": "gelu_forward_kernel<bf16>", "arch": "sm_80", "stack": 0, "local_accesses": 0}
    good |= {"wide_loads": 1, "wide_stores": 1, "matrix": 0}
    assert broken_promises([good]) == []
    assert len(broken_promises([good | {column: value}])) == 1


def test_every_kernel_is_in_the_table_for_every_architecture():
    rows = read_csv(KERNELS)
    names = {row["kernel"] for row in rows}
    assert {(row["kernel"], row["arch"]) for row in rows} == {(name, arch) for name in names for arch in ARCHITECTURES}
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu*"))
    in_sources = set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", sources))
    assert in_sources == {name.partition("<")[0] for name in names}
    assert len(in_sources) > 10


@pytest.fixture
def objects(kernel_report):
    """Of the build, if it is complete and newer than its sources."""
    objects = kernel_report.built_objects()
    kernel_files = {f"{path.name}.o" for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    if {path.name for path in objects} != kernel_files:
        pytest.skip("there is no complete build with CUDA")
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cu", ".cuh")]
    if max(path.stat().st_mtime for path in sources) > min(path.stat().st_mtime for path in objects):
        pytest.skip("the build with CUDA is older than its sources")
    need_tools(kernel_report)
    return objects


def test_the_table_is_that_of_the_build(kernel_report, objects):
    """Where there is a build by the compiler of scripts/cuda_wheels.txt. Another one may use other registers."""
    found = kernel_report.rows(kernel_report.report(objects, kernel_report.known_launches()))
    header, *rest = found
    assert broken_promises(dict(zip(header, row, strict=True)) for row in rest) == []
    compiler = next(objects[0].parents[4].glob("CMakeFiles/*/CMakeCUDACompiler.cmake")).read_text()
    if 'set(CMAKE_CUDA_COMPILER_VERSION "13.0.88")' in compiler:
        with open(KERNELS, newline="") as file:
            assert list(csv.reader(file)) == found, "run python scripts/kernel_report.py --csv docs/kernels.csv"


DEVICE_MEMORY = ("LD", "LDG", "LDGSTS", "ST", "STG", "ATOM", "ATOMG", "RED", "REDG")


def unordered(kernel_report, code):
    """The instructions that the wait for the kernel before (griddepcontrol.wait) does not order: what touches device
    memory or ends before it, and reads through a cache that it leaves alone."""
    names = kernel_report.INSTRUCTION.findall
    early = [name for name in names(code.partition("ACQBULK")[0]) if name.split(".")[0] in (*DEVICE_MEMORY, "EXIT")]
    return early + [name for name in names(code) if "CONSTANT" in name.split(".")]


def test_kernels_begin_after_the_one_before(kernel_report, objects):
    """From compute capability 9.0 on, whatever nvcc has moved."""
    for path in objects:
        dump = kernel_report.run("cuobjdump", "--dump-sass", str(path))
        for arch, name, code in kernel_report.functions(dump, r"(?m)^\s*Function : "):
            waits = code.count("ACQBULK"), code.count("PREEXIT")
            assert waits == ((0, 0) if arch == "sm_80" else (1, 1)), f"{name} on {arch}"
            assert arch == "sm_80" or unordered(kernel_report, code) == [], f"{name} on {arch}"


SM_90 = """
        /*0010*/                   LDC R1, c[0x0][0x28] ;                              /* 0x0000000402047981 */
        /*0020*/                   ACQBULK ;                                           /* 0x0000000402047981 */
        /*0030*/                   PREEXIT ;                                           /* 0x0000000402047981 */
        /*0040*/               @P0 EXIT ;                                              /* 0x0000000402047981 */
        /*0050*/                   LDG.E.128 R4, desc[UR4][R2.64] ;                    /* 0x0000000402047981 */
"""


def test_what_is_not_ordered_is_seen(kernel_report):
    assert unordered(kernel_report, SM_90) == []
    assert unordered(kernel_report, SM_90.replace("ACQBULK", "NOP")) == ["EXIT", "LDG.E.128"]
    assert unordered(kernel_report, SM_90.replace("LDC", "ATOMG.E.ADD")) == ["ATOMG.E.ADD"]
    assert unordered(kernel_report, SM_90.replace("LDG.E.128", "LDG.E.128.CONSTANT")) == ["LDG.E.128.CONSTANT"]


def need_tools(kernel_report, *names):
    for name in names or ("cuobjdump", "nvdisasm"):
        if kernel_report.tool_path(name) is None:
            pytest.skip(f"{name} is not installed")


# --- machine code -----------------------------------------------------------------------------------------------------

SM_80 = """
        /*0040*/                   IMAD.WIDE R2, R0, R3, c[0x0][0x168] ;               /* 0x00005a0000027625 */
                                                                                       /* 0x000fca00078e0203 */
        /*0050*/              @!P0 LDG.E.EF.128 R4, [R2.64] ;                          /* 0x0000000402047981 */
        /*0060*/                   LDG.E.U16.CONSTANT R4, [R2.64] ;                    /* 0x0000000402047981 */
        /*0070*/                   LDGSTS.E.BYPASS.128.ZFILL [R5], [R2.64], !P1 ;      /* 0x0000000402047981 */
        /*0080*/                   LDG.E.64 R4, [R2.64] ;                              /* 0x0000000402047981 */
        /*0090*/                   LDS.128 R4, [R2] ;                                  /* 0x0000000402047981 */
        /*00a0*/                   LDSM.16.M88.4 R4, [R2] ;                            /* 0x0000000402047981 */
        /*00b0*/                   LDC R1, c[0x0][0x28] ;                              /* 0x0000000402047981 */
        /*00c0*/               @P2 HMMA.16816.F32.BF16 R24, R4, R24, RZ ;              /* 0x000000180418723c */
        /*00d0*/                   HMMA.1688.F32.TF32 R24, R4, R24, RZ ;               /* 0x000000180418723c */
        /*00e0*/                   STS.128 [R5], R4 ;                                  /* 0x0000000402007986 */
        /*00f0*/                   STG.E.128 [R2.64], R4 ;                             /* 0x0000000402007986 */
        /*0100*/                   STG.E [R2.64], R4 ;                                 /* 0x0000000402007986 */
        /*0110*/                   STL.64 [R1], R4 ;                                   /* 0x0000000402007986 */
        /*0120*/                   LDL R4, [R1] ;                                      /* 0x0000000402007986 */
"""
SM_100 = """
        /*0050*/                   LDG.E.ENL2.256 R8, R4, desc[UR4][R2.64] ;           /* 0x0000000402047981 */
        /*0060*/             @!UP0 LDCU.128 UR4, c[0x0][0x380] ;                       /* 0x0000000402047981 */
        /*0070*/                   LD.E R4, desc[UR4][R2.64] ;                         /* 0x0000000402047981 */
        /*0080*/              @!PT ST.E.128 desc[UR4][R2.64], R4 ;                     /* 0x0000000402007986 */
        /*0090*/                   STG.E.U16 desc[UR4][R2.64], R4 ;                    /* 0x0000000402007986 */
"""


def test_instructions_are_counted(kernel_report):
    assert kernel_report.count_instructions(SM_80) == {
        **{"wide_loads": 2, "narrow_loads": 2, "wide_stores": 1, "narrow_stores": 1},
        **{"matrix": 2, "local": 2},
    }
    assert kernel_report.count_instructions(SM_100) == {
        **{"wide_loads": 1, "narrow_loads": 1, "wide_stores": 1, "narrow_stores": 1},
    }


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        (
            "void llmc::cuda::(anonymous namespace)::adamw_kernel<llmc::bf16, float>(llmc::cuda::(anonymous "
            "namespace)::Table, float const*)",
            "adamw_kernel<bf16, float>",
        ),
        ("llmc::cuda::(anonymous namespace)::clip_scale_kernel(float*, float*)", "clip_scale_kernel"),
        ("void llmc::cuda::k<float, 32, (llmc::Kind)1, true>(float*, void (*)(int))", "k<float, 32, (Kind)1, true>"),
        ("main", "main"),
    ],
)
def test_short_names(kernel_report, demangled, short):
    assert kernel_report.short_name(demangled) == short


PROBE = """
#include <cuda_bf16.h>
namespace llmc { namespace cuda { namespace {
__global__ void wide_kernel(float4* out, const float4* in) { out[threadIdx.x] = in[threadIdx.x]; }
__global__ void narrow_kernel(float* out, const float* in) { out[threadIdx.x] = in[threadIdx.x]; }
__global__ void shared_kernel(float* out, const float* in) {
  __shared__ float x[64];
  extern __shared__ float y[];
  y[threadIdx.x] = x[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = x[63 - threadIdx.x] + y[31 - threadIdx.x];
}
template <int N> __global__ void __launch_bounds__(1024) spilling_kernel(float* x) {
  float v[N];
#pragma unroll
  for (int i = 0; i < N; i++) v[i] = x[threadIdx.x + i * 1024];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; i++) x[threadIdx.x * N + i] = v[i * 7 % N] * v[i];
}
}  // namespace
void* kernels[] = {(void*)wide_kernel, (void*)narrow_kernel, (void*)shared_kernel, (void*)spilling_kernel<200>};
} }  // namespace llmc::cuda
"""


def test_what_nvcc_makes_of_good_and_bad_kernels(kernel_report, tmp_path):
    need_tools(kernel_report, "cuobjdump", "nvdisasm", "nvcc")
    (tmp_path / "probe.cu").write_text(PROBE)
    architectures = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90)]
    nvcc = kernel_report.tool_path("nvcc")
    object_file = tmp_path / "probe.cu.o"
    subprocess.run([nvcc, "-O3", *architectures, "-c", tmp_path / "probe.cu", "-o", object_file], check=True)
    launches = {"shared_kernel": kernel_report.Launch(threads=64, dynamic_shared=40000)}
    found = {(k.kernel, k.arch): k for k in kernel_report.report([object_file], launches)}
    assert len(found) == 8
    for arch in ("sm_80", "sm_90"):
        wide, narrow = found["wide_kernel", arch], found["narrow_kernel", arch]
        assert (wide.wide_loads, wide.narrow_loads, wide.wide_stores, wide.narrow_stores) == (1, 0, 1, 0)
        assert (narrow.wide_loads, narrow.narrow_loads, narrow.wide_stores, narrow.narrow_stores) == (0, 1, 0, 1)
        assert (wide.stack, wide.local_accesses, wide.static_shared, wide.occupancy) == (0, 0, 0, None)
        assert wide.file == "probe.cu"
        spilling = found["spilling_kernel<200>", arch]
        assert spilling.stack > 0
        assert spilling.local_accesses > 0
        assert spilling.registers <= 64
        shared = found["shared_kernel", arch]
        assert (shared.static_shared, shared.dynamic_shared, shared.threads) == (256, 40000, 64)
    # 164 or 228 KiB hold 4 or 5 blocks of 40000 + 256 + 1024 bytes with 2 of 64 warps each.
    assert (found["shared_kernel", "sm_80"].occupancy, found["shared_kernel", "sm_90"].occupancy) == (12.5, 15.6)


# --- occupancy --------------------------------------------------------------------------------------------------------

# NVIDIA's own calculation, for a device with the limits of the Programming Guide's table.
CALCULATOR = """
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
  int major, threads, registers, shared;
  while (std::scanf("%d %d %d %d", &major, &threads, &registers, &shared) == 4) {
    cudaOccDeviceProp device;
    device.computeMajor = major;
    device.computeMinor = 0;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = 2048;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 << 10;
    device.sharedMemPerMultiprocessor = (major == 8 ? 164 : 228) << 10;
    device.sharedMemPerBlockOptin = (major == 8 ? 163 : 227) << 10;
    device.reservedSharedMemPerBlock = 1 << 10;
    device.numSms = 1;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = 0;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = device.sharedMemPerBlockOptin;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    cudaOccResult result;
    const int status = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared);
    std::printf("%d\\n", status == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -status);
  }
}
"""


def test_occupancy_is_that_of_nvidias_calculator(kernel_report, tmp_path):
    folders = [Path(sysconfig.get_paths()["purelib"]) / "nvidia/cu13/include", Path("/usr/local/cuda/include")]
    include = next((folder for folder in folders if (folder / "cuda_occupancy.h").exists()), None)
    if include is None:
        pytest.skip("cuda_occupancy.h is not installed")
    (tmp_path / "calculator.cpp").write_text(CALCULATOR)
    program = tmp_path / "calculator"
    subprocess.run(["c++", "-isystem", include, tmp_path / "calculator.cpp", "-o", program], check=True)
    cases = [
        (arch, threads, registers, shared)
        for arch in ("sm_80", "sm_90", "sm_100")
        for threads in (32, 96, 128, 224, 256, 384, 512, 1000, 1024)
        for registers in (16, 32, 33, 40, 64, 65, 96, 128, 168, 255)
        for shared in (0, 1, 1024, 12288, 16385, 49152, 99 << 10, 163 << 10)
    ]
    asked = [f"{arch.removeprefix('sm_')[:-1]} {t} {r} {s}" for arch, t, r, s in cases]
    result = subprocess.run([program], input="\n".join(asked), capture_output=True, text=True, check=True)
    assert [kernel_report.blocks_per_sm(*case) for case in cases] == [int(line) for line in result.stdout.split()]


# --- launches ---------------------------------------------------------------------------------------------------------


def test_the_table_of_launches_is_that_of_the_step():
    """In a process of its own: the recorder takes the place of the simulator's functions."""
    devices.simulator("fast")  # skips the test where it is not built
    command = [sys.executable, ROOT / "scripts" / "kernel_launches.py", "--csv", "/dev/stdout"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == LAUNCHES.read_text(), "run python scripts/kernel_launches.py --csv docs/launches.csv"


RECORD = """
import kernel_launches as k
step = k.Step("tiny", "custom:l=2,c=32,h=2,t=16,v=65", B=2, T=16, precision="{precision}")
print(sum(launch.kernel not in (k.CUBLAS, k.MEMSET) for launch in k.Recorder().record(step)))
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_simulator_counts_as_many_launches(precision):
    simulator = devices.simulator("fast")
    core = simulator.core
    config = core.GPT2Config(
        max_seq_len=16, vocab_size=65, padded_vocab_size=128, num_layers=2, num_heads=2, channels=32
    )  # fmt: skip
    options = core.Options(
        batch_size=2, seq_len=16, precision=precision, grad_dtype=precision, bias_fusion=True, device="cuda"
    )
    model = core.GPT2(config, options)
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    counts = []
    for step in (1, 2):
        model.forward(tokens)
        model.backward(tokens)
        model.update(1e-3, 0.1, step)
        counts.append(simulator.launches())
    command = [sys.executable, "-c", RECORD.format(precision=precision)]
    result = subprocess.run(command, cwd=ROOT / "scripts", capture_output=True, text=True, check=True)
    assert int(result.stdout) == counts[1] - counts[0] > 0


def test_the_least_time_of_a_step_is_the_slower_of_memory_and_arithmetic(kernel_launches):
    """A100: 2039 GB/s; 312 TFLOP/s in bf16, half of that in TF32, 19.5 in fp32. 1 %: peaks are SMs times clock."""
    Step, Work = kernel_launches.Step, kernel_launches.Work
    bf16, tf32 = Step("", "d12", 1), Step("", "d12", 1, precision="fp32")
    fp32 = Step("", "d12", 1, precision="fp32", tf32=False)
    gpus = kernel_launches.GPUS
    for work, gpu, step, seconds in (
        (Work(2039e9, 1e12), "A100", bf16, 1),
        (Work(2039e9, 624e12), "A100", bf16, 2),
        (Work(0, 312e12), "A100", tf32, 2),
        (Work(0, 19.5e12), "A100", fp32, 1),
        (Work(3350e9), "H100", bf16, 1),
    ):
        assert kernel_launches.least_seconds(work, gpus[gpu], step) == pytest.approx(seconds, rel=0.01)
