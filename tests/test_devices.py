"""Operations and models on CUDA devices: what is refused and how, streams, and memory that does not suffice."""

from pathlib import Path

import pytest
import torch
from devices import simulator

from llmc import _C


def layernorm_arguments(cuda, C=16):
    x, weight, bias = torch.randn(4, C), torch.ones(C), torch.zeros(C)
    out, mean, rstd = torch.empty_like(x), torch.empty(4), torch.empty(4)
    return [cuda.to_device(tensor) for tensor in (out, mean, rstd, x, weight, bias)]


def test_arguments_must_be_on_one_device(cuda):
    out, mean, rstd, x, weight, _ = layernorm_arguments(cuda)
    with pytest.raises(cuda.core.Error, match="layernorm_forward: bias is on cpu, x on cuda:0"):
        cuda.core.ops.layernorm_forward(out, mean, rstd, x, weight, torch.zeros(16))


def test_arguments_must_be_aligned(cuda):
    x, out = cuda.to_device(torch.zeros(9)), cuda.to_device(torch.zeros(8))
    with pytest.raises(cuda.core.Error, match=r"x must start at a multiple of 16 bytes on CUDA, call \.clone\(\)"):
        cuda.core.ops.gelu_forward(out, x[1:])


def test_rows_must_be_vectors(cuda):
    with pytest.raises(cuda.core.Error, match="layernorm_forward: C is 12, on CUDA it must be a multiple of 8"):
        cuda.core.ops.layernorm_forward(*layernorm_arguments(cuda, C=12))


def test_ids_on_the_device_are_checked(cuda):
    logits, losses = cuda.to_device(torch.zeros(2, 8)), cuda.to_device(torch.zeros(2))
    targets = cuda.to_device(torch.tensor([3, 8], dtype=torch.int32))
    with pytest.raises(cuda.core.Error, match=r"targets holds 8 at index 1, ids must be in \[0, 8\)"):
        cuda.core.ops.fused_classifier(logits, losses, targets, 8, 1.0, True)


def test_sum_of_squares_takes_tensors_of_one_device(cuda):
    with pytest.raises(cuda.core.Error, match="sum_of_squares: the tensors are on cuda:0 and on cpu"):
        cuda.core.ops.sum_of_squares([cuda.to_device(torch.ones(3)), torch.ones(3)])


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:0001", "CPU", ""])
def test_devices_have_names(name):
    with pytest.raises(_C.Error, match=f"the device is {name}, it must be cpu, cuda or cuda:N"):
        _C.Options(device=name)


def test_a_device_that_is_not_there(cuda):
    with pytest.raises(cuda.core.Error, match="there is no CUDA device 99: the last is"):
        cuda.core.GPT2(cuda.core.GPT2Config(), cuda.core.Options(device="cuda:99"))


def test_a_model_that_does_not_fit(cuda):
    config = cuda.core.GPT2Config(num_layers=96, num_heads=96, channels=12288)  # 350 GB of parameters in bf16
    options = cuda.core.Options(device="cuda", precision="bf16", batch_size=1, seq_len=8)
    with pytest.raises(cuda.core.Error, match=r"has no \d+ MiB of memory left \(\d+ of \d+ MiB are free\): lower"):
        cuda.core.GPT2(config, options)
    # and the next one that fits is made
    cuda.core.GPT2(
        cuda.core.GPT2Config(num_layers=1, num_heads=1, channels=8),
        cuda.core.Options(device="cuda", batch_size=1, seq_len=8),
    )


def test_options_show_the_device():
    assert _C.Options().device == "cpu"
    assert _C.Options(device="cuda").device == "cuda:0"
    assert _C.Options(device="cuda:3", tf32=False).device == "cuda:3"


@pytest.mark.gpu
def test_operations_use_torchs_current_stream():
    """On another stream, behind work that takes long: they must not run before it."""
    if reason := _C.why_no_cuda_device():
        pytest.skip(reason)
    x, out = torch.zeros(1 << 20, device="cuda"), torch.zeros(1 << 20, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        x.fill_(1)
        _C.ops.gelu_forward(out, x)
        torch.cuda.current_stream().synchronize()
    expected = torch.nn.functional.gelu(torch.ones(1, dtype=torch.float64), approximate="tanh").item()
    assert out.cpu().sub(expected).abs().max() < 1e-6


@pytest.mark.gpu
def test_views_of_a_model_are_cuda_tensors():
    if reason := _C.why_no_cuda_device():
        pytest.skip(reason)
    model = _C.GPT2(_C.GPT2Config(num_layers=1, num_heads=1, channels=8), _C.Options(device="cuda", seq_len=8))
    model.init_random(seed=1)
    wte = model.parameters()["wte"]
    assert wte.device == torch.device("cuda:0")
    before = wte.clone()
    wte.add_(1)  # torch's default stream comes before the model's next operation
    model.forward(torch.zeros(1, 8, dtype=torch.int32))
    torch.testing.assert_close(model.parameters()["wte"], before + 1)


def test_both_simulators_in_a_process():
    """Each is the one that was asked for, whichever is loaded first."""
    for variant in ("fast", "checked"):
        assert Path(simulator(variant).core.__file__).parent.name == variant
