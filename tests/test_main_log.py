"""Logs written by hand, and what is read from them."""

import math

import pytest

from llmc.errors import RunError
from llmc.main_log import read_json_log, read_main_log

MAIN_LOG = """\
s:0 tel:11.0001
s:0 trl:10.9877 lr:0.000300 norm:15.31
s:1 trl:nan lr:0.000600 norm:inf
s:2 tel:9.5000
s:2 eval:0.2510
s:2 trl:-nan lr:1.000000 norm:2.00
s:3 trl:8.0000 lr:0.000001 norm:1.00
s:2 tel:9.2500
s:2 eval:0.2600
s:2 trl:9.1250 lr:0.000500 norm:3.00
"""


def test_main_log(tmp_path):
    """Steps 2 and 3 were lost in a crash; the resumed run has reached 2 again, whose later lines count."""
    path = tmp_path / "main.log"
    path.write_text(MAIN_LOG)
    log = read_main_log(path)
    assert math.isnan(log.series["loss"].pop(1))
    assert log.series == {
        "val_loss": {0: 11.0001, 2: 9.25},
        "hellaswag": {2: 0.26},
        "loss": {0: 10.9877, 2: 9.125, 3: 8.0},
        "lr": {0: 3e-4, 1: 6e-4, 2: 5e-4, 3: 1e-6},
        "norm": {0: 15.31, 1: math.inf, 2: 3.0, 3: 1.0},
    }
    assert log.notes == [] and log.tokens_per_step is None


def test_steps_are_in_order_after_a_resume(tmp_path):
    path = tmp_path / "main.log"
    path.write_text("s:5 tel:3.0\ns:9 tel:2.0\ns:0 tel:4.0\n")
    assert list(read_main_log(path).series["val_loss"].items()) == [(0, 4.0), (5, 3.0), (9, 2.0)]


def test_log_of_the_pytorch_reference(tmp_path):
    path = tmp_path / "main.log"
    path.write_text("s:0 tel:10.989563\ns:0 trl:10.971442\n")
    assert read_main_log(path).series == {"val_loss": {0: 10.989563}, "loss": {0: 10.971442}}


@pytest.mark.parametrize("rest", ["s:3 trl:7.50", "s:3 trl:7.5000 lr:0.000300 norm:1.00", "s", "\0\0\0"])
def test_a_last_line_that_was_cut_off(tmp_path, rest):
    """Even one that looks whole may lack digits."""
    path = tmp_path / "main.log"
    path.write_text("s:0 tel:11.0001\n" + rest)
    log = read_main_log(path)
    assert log.series == {"val_loss": {0: 11.0001}}
    assert log.notes == [f"{path} line 2 was cut off in the middle and is passed over"]


DAMAGED = [
    *("s:1", "s:1 trl:", "s:1 trl:7.50s:1 trl:7.5000 lr:0.000300 norm:1.00", "s:1 tel:1.0 ", " s:1 tel:1.0", ""),
    *(
        "s:-1 tel:1.0",
        "s:1 tst:1.0",
        "s:1 trl:1.0 lr:0.1",
        "s:1 tel:1,0",
        "s:1 tel:0x10",
        "step 1 tel:1.0",
        "s:٣ tel:1.0",
        f"s:{'9' * 5000} tel:1.0",  # more digits than Python turns into a number
    ),
]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line(tmp_path, line):
    path = tmp_path / "main.log"
    path.write_text(f"s:0 tel:11.0001\n{line}\ns:2 tel:9.0\n")
    with pytest.raises(RunError) as caught:
        read_main_log(path)
    assert str(caught.value).startswith(f"{path} line 2 is damaged: {line[:60]!r}"[:-1])
    assert str(caught.value).endswith("; correct or delete it") and "\n" not in str(caught.value)


def test_another_file_in_its_place(tmp_path):
    path = tmp_path / "main.log"
    path.write_bytes(bytes(range(256)) * 40)
    with pytest.raises(RunError, match="line 1 is damaged: ") as caught:
        read_main_log(path)
    assert str(caught.value).isprintable()
    with pytest.raises(RunError, match=r"cannot read the log .*no\.log: No such file or directory"):
        read_main_log(tmp_path / "no.log")


JSON_LOG = """\
{"step": 0, "tokens": 0, "val_loss": 11.00007}
{"step": 0, "tokens": 0, "loss": 10.98765, "norm": 15.3, "lr": 0.0003, "ms": 234, "tokens_per_s": 17462.5, "mfu": null}
{"step": 1, "tokens": 512, "loss": 9.5, "norm": 1, "lr": 0.0003, "ms": 200, "tokens_per_s": 18000, "mfu": 0.25}
{"step": 1, "tokens": 512, "hellaswag": 0.25}
{"step": 1, "tokens": 512, "hellaswag": 0.5}
"""


def test_json_log(tmp_path):
    path = tmp_path / "main.jsonl"
    path.write_text(JSON_LOG + '{"step": 2, "tok')
    log = read_json_log(path)
    assert log.series == {
        "val_loss": {0: 11.00007},
        "loss": {0: 10.98765, 1: 9.5},
        "norm": {0: 15.3, 1: 1},
        "lr": {0: 0.0003, 1: 0.0003},
        "ms": {0: 234, 1: 200},
        "tokens_per_s": {0: 17462.5, 1: 18000},
        "mfu": {1: 0.25},
        "hellaswag": {1: 0.5},
    }
    assert log.tokens_per_step == 512
    assert log.notes == [f"{path} line 6 was cut off in the middle and is passed over"]


DAMAGED_JSON = [
    *("", "{", "[1]", "1", '{"loss": 1.0}', '{"step": 1.5}', '{"step": -1}', '{"step": true}', '{"step": "1"}'),
    *('{"step": 1, "loss": "2.0"}', '{"step": 1, "loss": [2.0]}', '{"step": null}', "s:0 tel:1.0", "[" * 100_000),
    *(f'{{"step": {2**63}}}', f'{{"step": 1, "tokens": {10**400}}}', f'{{"step": 1, "loss": {"9" * 5000}}}'),
]


@pytest.mark.parametrize("line", DAMAGED_JSON, ids=lambda line: line[:30])
def test_a_damaged_line_of_a_json_log(tmp_path, line):
    path = tmp_path / "main.jsonl"
    path.write_text('{"step": 0, "loss": 3.0}\n' + line + "\n")
    with pytest.raises(
        RunError, match=r"main\.jsonl line 2 is damaged: .* is no line of a JSON log, such as"
    ) as caught:
        read_json_log(path)
    assert len(str(caught.value)) < 400
