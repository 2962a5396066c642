"""GPU telemetry through NVIDIA's own binding, over a fake library: two GPUs, sensors that can be taken away."""

import ctypes
import subprocess
import sys

import pynvml
import pytest

from llmc.errors import RunError
from llmc.telemetry import Telemetry

BUS_IDS = ["0000:65:00.0", "0000:17:00.0"]  # in NVML's order; CUDA_VISIBLE_DEVICES=1 makes the second CUDA's device 0
NOT_SUPPORTED, NOT_FOUND, GPU_IS_LOST = 3, 6, 15  # nvmlReturn_t of nvml.h


class FakeNvml:
    """libnvidia-ml.so.1 as ctypes sees it: attributes are C functions, results go through pointers.

    A sensor whose value is an NvmlError returns that status; one that is absent does not exist in this library.
    """

    def __init__(self, *sensors):
        self.sensors = sensors  # of each GPU

    def __getattr__(self, name):
        found = [gpu[name] for gpu in self.sensors if name in gpu]
        if not found:
            raise AttributeError(name)
        return lambda handle, *arguments: self.answer(name, ctypes.cast(handle, ctypes.c_void_p).value, *arguments)

    def answer(self, name, handle, *arguments):
        value = self.sensors[handle - 1][name]
        if isinstance(value, NvmlError):
            return value.status
        *selectors, result = arguments
        for selector in selectors:  # an enum, such as which clock is meant
            value = value[selector.value if hasattr(selector, "value") else selector]
        write(result._obj, value)
        return 0

    def nvmlInitWithFlags(self, flags):
        return 0

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus_id, handle):
        for index, known in enumerate(BUS_IDS):
            if bus_id.value == known.encode():
                ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))[0] = index + 1
                return 0
        return NOT_FOUND


class NvmlError:
    def __init__(self, status):
        self.status = status


def write(target, value):
    """Stores a number into a C variable, or a dictionary into the fields of a C struct."""
    if isinstance(value, dict):
        for field, number in value.items():
            setattr(target, field, number)
    else:
        target.value = value


def sensors(**changes):
    """An RTX 4090 at work, with NVML's names and units; None takes a function away."""
    everything = {
        "nvmlDeviceGetUtilizationRates": {"gpu": 97, "memory": 41},
        "nvmlDeviceGetFanSpeed": 34,
        "nvmlDeviceGetClockInfo": {0: 2505, 1: 2520, 2: 10501, 3: 1965},  # graphics, SM, memory, video
        "nvmlDeviceGetMaxClockInfo": {0: 3105, 1: 3120, 2: 10501, 3: 2415},
        "nvmlDeviceGetPowerUsage": 431987,
        "nvmlDeviceGetEnforcedPowerLimit": 450000,
        "nvmlDeviceGetTemperatureV": {"temperature": 67},
        "nvmlDeviceGetTemperatureThreshold": {0: 92, 1: 89, 2: 0, 3: 83},  # shutdown, slowdown, memory, GPU
        "nvmlDeviceGetCurrentClocksEventReasons": 0,
    }
    everything.update({f"nvml{name}": value for name, value in changes.items()})
    return {name: value for name, value in everything.items() if value is not None}


@pytest.fixture
def nvml(monkeypatch):
    def use(*gpus):
        monkeypatch.setattr(pynvml, "nvmlLib", FakeNvml(*gpus))
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})

    return use


LINE = (
    "                  compute 97.0% | memory: 41.0% | fan: 34% | 2520 MHz / 3120 MHz | 431 W / 450 W "
    "| 67°C / 89°C | no cap"
)


def test_every_sensor(nvml):
    """llm.c's format, "compute %2.1f%% | memory: %2.1f%% | fan: %2d%% | %4d MHz / %4d MHz | %3d W / %3d W | %d°C / %d°C
    | %s" behind 18 spaces."""
    nvml(sensors())
    assert Telemetry(BUS_IDS[0]).line() == LINE


def test_small_numbers_keep_the_columns(nvml):
    nvml(
        sensors(
            DeviceGetUtilizationRates={"gpu": 0, "memory": 0},
            DeviceGetFanSpeed=0,
            DeviceGetClockInfo={1: 210},
            DeviceGetPowerUsage=8999,
            DeviceGetTemperatureV={"temperature": 5},
        )
    )
    assert Telemetry(BUS_IDS[0]).line() == (
        "                  compute 0.0% | memory: 0.0% | fan:  0% |  210 MHz / 3120 MHz |   8 W / 450 W "
        "| 5°C / 89°C | no cap"
    )


MISSING = {
    "DeviceGetUtilizationRates": ("compute 97.0% | memory: 41.0%", "compute n/a | memory: n/a"),
    "DeviceGetFanSpeed": ("fan: 34%", "fan: n/a"),  # cards of data centres
    "DeviceGetClockInfo": ("2520 MHz", "n/a"),
    "DeviceGetMaxClockInfo": ("3120 MHz", "n/a"),
    "DeviceGetPowerUsage": ("431 W", "n/a"),
    "DeviceGetEnforcedPowerLimit": ("450 W", "n/a"),
    "DeviceGetTemperatureV": ("67°C", "n/a"),
    "DeviceGetTemperatureThreshold": ("89°C", "n/a"),
    "DeviceGetCurrentClocksEventReasons": ("no cap", "n/a"),
}


@pytest.mark.parametrize("broken", [None, NvmlError(NOT_SUPPORTED), NvmlError(GPU_IS_LOST)])
@pytest.mark.parametrize("name", MISSING)
def test_a_missing_sensor_is_not_available_and_the_others_are(nvml, name, broken):
    """None: a driver whose library lacks the function."""
    nvml(sensors(**{name: broken}))
    assert Telemetry(BUS_IDS[0]).line() == LINE.replace(*MISSING[name])


def test_no_sensor_at_all(nvml):
    nvml(sensors(**dict.fromkeys(MISSING)))
    assert Telemetry(BUS_IDS[0]).line() == (
        "                  compute n/a | memory: n/a | fan: n/a | n/a / n/a | n/a / n/a | n/a / n/a | n/a"
    )


@pytest.mark.parametrize(
    ("bits", "expected"),
    [  # nvml.h, nvmlClocksEventReasons
        (0x001, "no cap"),  # idle
        (0x002, "other cap"),  # clocks set by the user
        (0x004, "power cap"),  # software
        (0x008, "other cap"),  # hardware slowdown for a reason it does not tell
        (0x020, "thermal cap"),  # software
        (0x048, "thermal cap"),  # hardware
        (0x088, "power cap"),  # hardware, power brake
        (0x024, "power cap"),
        (0x005, "power cap"),
        (0x101, "other cap"),  # display clocks
    ],
)
def test_what_holds_the_clock_down(nvml, bits, expected):
    nvml(sensors(DeviceGetCurrentClocksEventReasons=bits))
    assert Telemetry(BUS_IDS[0]).line() == LINE.replace("no cap", expected)


def test_the_gpu_is_the_one_that_cuda_uses(nvml, monkeypatch):
    """With this variable CUDA's only device, and its device 0, is NVML's second GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    nvml(sensors(), sensors(DeviceGetFanSpeed=99))
    assert Telemetry(BUS_IDS[1]).line() == LINE.replace("34%", "99%")
    assert Telemetry(BUS_IDS[0]).line() == LINE


def test_an_unknown_gpu(nvml):
    nvml(sensors(), sensors())
    with pytest.raises(RunError, match=r"^the sensors of GPU 0000:99:00.0 cannot .*\(Not Found\): run without -lg$"):
        Telemetry("0000:99:00.0")


def test_without_the_library(monkeypatch):
    def not_there(name):
        assert name == "libnvidia-ml.so.1"
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "CDLL", not_there)
    with pytest.raises(
        RunError, match=r"comes with NVIDIA's driver \(NVML Shared Library Not Found\): run without -lg$"
    ):
        Telemetry(BUS_IDS[0])


def test_importing_it_opens_no_library():
    code = "import llmc.telemetry; print('libnvidia-ml' in open('/proc/self/maps').read())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
