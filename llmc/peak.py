"""What NVIDIA GPUs could do at best: the denominator of model flops utilisation.

A peak is SMs x clock x flops per SM and clock of dense matrix products (no sparsity) with fp32 accumulation. Except
where noted, the clock is the boost clock; of laptops, whose makers choose it, the upper end of NVIDIA's range.
"""

from typing import Literal

# Flops per SM and clock with bf16 inputs; TF32 has half of them. GeForce cards, and the L40, halve the rate of their
# chip when the sums are fp32; professional cards have it in full.
GA100 = 2048
GA10X = AD10X = 1024
GEFORCE = HALF_RATE = 512
HOPPER = 4096
GB100 = 8192

GPUS = {  # name of the CUDA device: (SMs, MHz, flops per SM and clock)
    "NVIDIA A100-PCIE-40GB": (108, 1410, GA100),
    "NVIDIA A100-SXM4-40GB": (108, 1410, GA100),
    "NVIDIA A100 80GB PCIe": (108, 1410, GA100),
    "NVIDIA A100-SXM4-80GB": (108, 1410, GA100),
    "NVIDIA A30": (56, 1440, GA100),
    "NVIDIA A10": (72, 1695, GA10X),
    "NVIDIA A40": (84, 1740, GA10X),
    "NVIDIA L4": (58, 2040, AD10X),
    "NVIDIA L40": (142, 2490, HALF_RATE),
    "NVIDIA L40S": (142, 2520, AD10X),
    # From here to B200 the clock is the one that the data sheet's tensor figures are for; the boost clock is higher.
    "NVIDIA H100 PCIe": (114, 1620, HOPPER),
    "NVIDIA H100 80GB HBM3": (132, 1830, HOPPER),
    "NVIDIA H100 NVL": (132, 1545, HOPPER),
    "NVIDIA H200": (132, 1830, HOPPER),
    "NVIDIA H200 NVL": (132, 1545, HOPPER),
    "NVIDIA GH200 480GB": (132, 1830, HOPPER),
    "NVIDIA B200": (148, 1855, GB100),
    "NVIDIA RTX A2000": (26, 1200, GA10X),
    "NVIDIA RTX A2000 12GB": (26, 1200, GA10X),
    "NVIDIA RTX A4000": (48, 1560, GA10X),
    "NVIDIA RTX A4500": (56, 1650, GA10X),
    "NVIDIA RTX A5000": (64, 1695, GA10X),
    "NVIDIA RTX A5500": (80, 1665, GA10X),
    "NVIDIA RTX A6000": (84, 1800, GA10X),
    "NVIDIA RTX 2000 Ada Generation": (22, 2130, AD10X),
    "NVIDIA RTX 4000 Ada Generation": (48, 2175, AD10X),
    "NVIDIA RTX 4500 Ada Generation": (60, 2580, AD10X),
    "NVIDIA RTX 5000 Ada Generation": (100, 2550, AD10X),
    "NVIDIA RTX 6000 Ada Generation": (142, 2505, AD10X),
    "NVIDIA GeForce RTX 3050": (20, 1777, GEFORCE),
    "NVIDIA GeForce RTX 3060": (28, 1777, GEFORCE),
    "NVIDIA GeForce RTX 3060 Ti": (38, 1665, GEFORCE),
    "NVIDIA GeForce RTX 3070": (46, 1725, GEFORCE),
    "NVIDIA GeForce RTX 3070 Ti": (48, 1770, GEFORCE),
    "NVIDIA GeForce RTX 3080": (68, 1710, GEFORCE),  # of 10 GB; the one of 12 GB has 70 SMs and the same name
    "NVIDIA GeForce RTX 3080 Ti": (80, 1665, GEFORCE),
    "NVIDIA GeForce RTX 3090": (82, 1695, GEFORCE),
    "NVIDIA GeForce RTX 3090 Ti": (84, 1860, GEFORCE),
    "NVIDIA GeForce RTX 3060 Laptop GPU": (30, 1703, GEFORCE),
    "NVIDIA GeForce RTX 3070 Laptop GPU": (40, 1620, GEFORCE),
    "NVIDIA GeForce RTX 3070 Ti Laptop GPU": (46, 1485, GEFORCE),
    "NVIDIA GeForce RTX 3080 Laptop GPU": (48, 1710, GEFORCE),
    "NVIDIA GeForce RTX 3080 Ti Laptop GPU": (58, 1590, GEFORCE),
    "NVIDIA GeForce RTX 4060": (24, 2460, GEFORCE),
    "NVIDIA GeForce RTX 4060 Ti": (34, 2535, GEFORCE),
    "NVIDIA GeForce RTX 4070": (46, 2475, GEFORCE),
    "NVIDIA GeForce RTX 4070 SUPER": (56, 2475, GEFORCE),
    "NVIDIA GeForce RTX 4070 Ti": (60, 2610, GEFORCE),
    "NVIDIA GeForce RTX 4070 Ti SUPER": (66, 2610, GEFORCE),
    "NVIDIA GeForce RTX 4080": (76, 2505, GEFORCE),
    "NVIDIA GeForce RTX 4080 SUPER": (80, 2550, GEFORCE),
    "NVIDIA GeForce RTX 4090": (128, 2520, GEFORCE),
    "NVIDIA GeForce RTX 4060 Laptop GPU": (24, 2370, GEFORCE),
    "NVIDIA GeForce RTX 4070 Laptop GPU": (36, 2175, GEFORCE),
    "NVIDIA GeForce RTX 4080 Laptop GPU": (58, 2280, GEFORCE),
    "NVIDIA GeForce RTX 4090 Laptop GPU": (76, 2040, GEFORCE),
    "NVIDIA GeForce RTX 5060": (30, 2497, GEFORCE),
    "NVIDIA GeForce RTX 5060 Ti": (36, 2572, GEFORCE),
    "NVIDIA GeForce RTX 5070": (48, 2512, GEFORCE),
    "NVIDIA GeForce RTX 5070 Ti": (70, 2452, GEFORCE),
    "NVIDIA GeForce RTX 5080": (84, 2617, GEFORCE),
    "NVIDIA GeForce RTX 5090": (170, 2407, GEFORCE),
}


def peak_flops(device_name: str, precision: Literal["fp32", "bf16"]) -> float | None:
    """Dense tensor-core peak in flop/s by the CUDA device's exact name; None for a device that is not in the table.

    precision: bf16 stands for bf16 inputs with fp32 accumulation, fp32 for TF32.
    """
    if device_name not in GPUS:
        return None
    sms, mhz, flops = GPUS[device_name]
    return sms * mhz * 1e6 * flops * {"bf16": 1.0, "fp32": 0.5}[precision]
