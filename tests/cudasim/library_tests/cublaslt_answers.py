"""What a cuBLASLt library answers to right and wrong calls that need no GPU.

python cublaslt_answers.py LIBRARY prints JSON; tests/test_cudasim_cublaslt.py compares the simulator with the real one.
"""

import ctypes
import json
import sys
from collections.abc import Callable
from typing import Any

SIZES = (0, 1, 2, 4, 8, 16)
UNDOCUMENTED = {16}  # attribute of the matmul descriptor


def attributes(lib: Any, kind: str, create: Callable[[], ctypes.c_void_p], numbers: range) -> dict[str, Any]:
    """Statuses of setting and getting with every size, and the default values."""
    set_value, get_value = getattr(lib, f"cublasLt{kind}SetAttribute"), getattr(lib, f"cublasLt{kind}GetAttribute")
    value = ctypes.create_string_buffer(16)
    answers: dict[str, Any] = {}
    for number in numbers:
        if kind == "MatmulDesc" and number in UNDOCUMENTED:
            continue
        for size in SIZES:
            answers[f"{kind} set {number} with {size} bytes"] = set_value(
                create(), number, value, ctypes.c_size_t(size)
            )
            got, written = ctypes.create_string_buffer(b"\x55" * 16, 16), ctypes.c_size_t()
            status = get_value(create(), number, got, ctypes.c_size_t(size), ctypes.byref(written))
            answers[f"{kind} get {number} with {size} bytes"] = status, written.value, got.raw.hex()
    answers[f"{kind} set, null value"] = set_value(create(), 1, None, ctypes.c_size_t(4))
    answers[f"{kind} set, null object"] = set_value(None, 1, value, ctypes.c_size_t(4))
    return answers


def main() -> None:
    lib: Any = ctypes.CDLL(sys.argv[1])
    lib.cublasLtGetStatusName.restype = lib.cublasLtGetStatusString.restype = ctypes.c_char_p
    u64 = ctypes.c_uint64

    def descriptor(compute_type: int = 68, scale_type: int = 0) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        assert lib.cublasLtMatmulDescCreate(ctypes.byref(made), compute_type, scale_type) == 0
        return made

    def layout(kind: int = 14, rows: int = 8, cols: int = 4, ld: int = 8) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        assert lib.cublasLtMatrixLayoutCreate(ctypes.byref(made), kind, u64(rows), u64(cols), ctypes.c_int64(ld)) == 0
        return made

    def preference() -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        assert lib.cublasLtMatmulPreferenceCreate(ctypes.byref(made)) == 0
        return made

    answers: dict[str, Any] = {}
    answers |= attributes(lib, "MatmulDesc", descriptor, range(-1, 42))
    answers |= attributes(lib, "MatrixLayout", layout, range(-1, 12))
    answers |= attributes(lib, "MatmulPreference", preference, range(-1, 15))
    for epilogue in (0, 1, 4, 3, 12345):  # values are not looked at before they are used
        value = ctypes.c_uint32(epilogue)
        status = lib.cublasLtMatmulDescSetAttribute(descriptor(), 7, ctypes.byref(value), ctypes.c_size_t(4))
        answers[f"epilogue {epilogue}"] = status
    for shape in ((14, 8, 8, 4), (14, 0, 8, 8), (99, 8, 8, 8), (0, 8, 8, -1)):
        layout(*shape)
    descriptor(999, 99)
    answers["create a descriptor nowhere"] = lib.cublasLtMatmulDescCreate(None, 68, 0)
    answers["create a layout nowhere"] = lib.cublasLtMatrixLayoutCreate(None, 0, u64(1), u64(1), u64(1))
    answers["create a preference nowhere"] = lib.cublasLtMatmulPreferenceCreate(None)
    answers["create a handle nowhere"] = lib.cublasLtCreate(None)
    for name in ("MatmulDesc", "MatrixLayout", "MatmulPreference", ""):
        answers[f"destroy no {name or 'handle'}"] = getattr(lib, f"cublasLt{name}Destroy")(None)
    query = (descriptor(), layout(), layout(), layout(), layout(), preference(), 1, ctypes.create_string_buffer(1024))
    returned = ctypes.c_int(7)
    answers["query without a handle"] = lib.cublasLtMatmulAlgoGetHeuristic(None, *query, ctypes.byref(returned))
    one, x = ctypes.byref(ctypes.c_float(1)), ctypes.create_string_buffer(64)
    product = (descriptor(), one, x, layout(), x, layout(), one, x, layout(), x, layout(), None, None, u64(0), None)
    answers["product without a handle"] = lib.cublasLtMatmul(None, *product)
    for status in (0, 1, 3, 7, 8, 11, 13, 14, 15, 16, 2, 99):
        answers[f"name of {status}"] = lib.cublasLtGetStatusName(status).decode()
        answers[f"text of {status}"] = lib.cublasLtGetStatusString(status).decode()
    print(json.dumps(answers))


main()
