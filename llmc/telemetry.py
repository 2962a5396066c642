"""The state of a GPU for -lg, read through NVML, the management library of NVIDIA's driver."""

from collections.abc import Callable
from typing import Any

import pynvml

from llmc.errors import RunError

INDENT = " " * 18  # below the loss of the step line

POWER = pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown
THERMAL = pynvml.nvmlClocksEventReasonSwThermalSlowdown | pynvml.nvmlClocksEventReasonHwThermalSlowdown
IDLE = pynvml.nvmlClocksEventReasonGpuIdle  # low clocks because there is nothing to do: no cap


class Telemetry:
    """The sensors of one GPU.

    pci_bus_id: "domain:bus:device.function" in hexadecimal, as the CUDA device has it. An index would not do: NVML
    counts all GPUs of the machine, CUDA those that CUDA_VISIBLE_DEVICES leaves, and in another order.
    Raises RunError when NVML or that GPU is not there. Sensors that are not there show as n/a.
    """

    def __init__(self, pci_bus_id: str) -> None:
        try:
            pynvml.nvmlInit()
            self.gpu = pynvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id)
        except pynvml.NVMLError as error:
            raise RunError(
                f"the sensors of GPU {pci_bus_id} cannot be read through NVML, which comes with NVIDIA's driver "
                f"({error}): run without -lg"
            ) from error

    def line(self) -> str:
        """llm.c's line: part of the last second or less in which kernels ran and memory was accessed, fan, SM clock now
        and at most, power and its limit, temperature and that of the thermal slowdown, what holds the clock down."""
        busy = self.read(pynvml.nvmlDeviceGetUtilizationRates)
        fan = self.read(pynvml.nvmlDeviceGetFanSpeed)
        clock = self.read(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM)
        max_clock = self.read(pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_SM)
        milliwatts = self.read(pynvml.nvmlDeviceGetPowerUsage)
        max_milliwatts = self.read(pynvml.nvmlDeviceGetEnforcedPowerLimit)
        celsius = self.read(pynvml.nvmlDeviceGetTemperatureV, pynvml.NVML_TEMPERATURE_GPU)
        slowdown = self.read(pynvml.nvmlDeviceGetTemperatureThreshold, pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN)
        reasons = self.read(pynvml.nvmlDeviceGetCurrentClocksEventReasons)
        return INDENT + " | ".join(
            [
                f"compute {shown(busy and float(busy.gpu), '.1f', '%')}",
                f"memory: {shown(busy and float(busy.memory), '.1f', '%')}",
                f"fan: {shown(fan, '2d', '%')}",
                f"{shown(clock, '4d', ' MHz')} / {shown(max_clock, '4d', ' MHz')}",
                f"{shown(watts(milliwatts), '3d', ' W')} / {shown(watts(max_milliwatts), '3d', ' W')}",
                f"{shown(celsius, 'd', '°C')} / {shown(slowdown, 'd', '°C')}",
                "n/a" if reasons is None else cap(reasons),
            ]
        )

    def read(self, query: Callable[..., Any], *arguments: int) -> Any:
        """What NVML answers, None if it does not: no fan, no permission, a lost GPU, a function the driver lacks."""
        try:
            return query(self.gpu, *arguments)
        except pynvml.NVMLError:
            return None


def watts(milliwatts: int | None) -> int | None:
    return None if milliwatts is None else milliwatts // 1000


def shown(value: float | None, form: str, unit: str) -> str:
    return "n/a" if value is None else f"{value:{form}}{unit}"


def cap(reasons: int) -> str:
    """In short, the reasons why the clocks are lower than they could be (NVML's nvmlClocksEventReasons bits)."""
    if reasons & POWER:
        return "power cap"
    if reasons & THERMAL:
        return "thermal cap"
    return "other cap" if reasons & ~IDLE else "no cap"
