"""Peaks against the TFLOP/s printed in NVIDIA's data sheets and white papers."""

import pytest

from llmc.peak import peak_flops

# Dense bf16 with fp32 accumulation. Where a sheet has only figures with sparsity, half of them.
SHEETS = {
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A30": 165,
    "NVIDIA A10": 125,
    "NVIDIA A40": 149.7,
    "NVIDIA L4": 121,
    "NVIDIA L40": 181.05,
    "NVIDIA L40S": 733 / 2,  # printed beside 362.05 dense, which is not half of it; TF32's 183 is
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 NVL": 1671 / 2,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 1671 / 2,
    "NVIDIA GH200 480GB": 990,
    "NVIDIA B200": 2250,
    "NVIDIA RTX A4000": 153.4 / 2,
    "NVIDIA RTX A5000": 222.2 / 2,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA RTX 6000 Ada Generation": 364.2,
    "NVIDIA GeForce RTX 3070": 40.6,
    "NVIDIA GeForce RTX 3080": 59.5,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 3090 Ti": 80,
    "NVIDIA GeForce RTX 4080": 97.5,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5070 Ti": 87.9,
    "NVIDIA GeForce RTX 5080": 112.6,
    "NVIDIA GeForce RTX 5090": 209.5,
}
TF32_SHEETS = {
    "NVIDIA A100-SXM4-80GB": 156,
    "NVIDIA A40": 74.8,
    "NVIDIA L40S": 183,
    "NVIDIA H100 80GB HBM3": 494.7,
    "NVIDIA GeForce RTX 3090": 35.6,
    "NVIDIA GeForce RTX 4090": 82.6,
}


@pytest.mark.parametrize(("name", "teraflops"), SHEETS.items())
def test_bf16(name: str, teraflops: float) -> None:
    """1 %: sheets round their figures and clocks."""
    assert peak_flops(name, "bf16") == pytest.approx(teraflops * 1e12, rel=0.01)


@pytest.mark.parametrize(("name", "teraflops"), TF32_SHEETS.items())
def test_tf32(name: str, teraflops: float) -> None:
    assert peak_flops(name, "fp32") == pytest.approx(teraflops * 1e12, rel=0.01)


@pytest.mark.parametrize("name", ["", "NVIDIA", "nvidia l4", "NVIDIA L40SX", "NVIDIA GeForce RTX 4090 X", "Tesla K80"])
def test_unknown_devices(name: str) -> None:
    assert peak_flops(name, "bf16") is None
    assert peak_flops(name, "fp32") is None
