"""What is printed and what main.log holds, byte by byte."""

import io
import math
import os
import resource

import pytest

from llmc.errors import RunError
from llmc.logger import Logger, Progress, StepReport, Throughput, clock, step_line, table


def report(**changes):
    values = {
        "step": 0,
        "num_steps": 50,
        "loss": 10.9876543,
        "loss_z": math.nan,
        "grad_norm": 15.3123456,
        "grad_norm_z": math.nan,
        "learning_rate": 3e-4,
        "seconds": 0.2345678,
        "mfu": None,
        "tokens_per_second": 17462.5,
        "seconds_left": 59.6,
    }
    return StepReport(**{**values, **changes})


def test_table():
    long = "x" * 60
    text = table(
        [[("train data pattern", "dev/*.bin"), ("max_steps", -1)], ["Zero Optimization is disabled", ("L", long)]]
    )
    assert text == (
        "+-----------------------+----------------------------------------------------+\n"
        "| Parameter             | Value                                              |\n"
        "+-----------------------+----------------------------------------------------+\n"
        "| train data pattern    | dev/*.bin                                          |\n"
        "| max_steps             | -1                                                 |\n"
        "+-----------------------+----------------------------------------------------+\n"
        "| Zero Optimization is disabled                                              |\n"
        f"| L                     | {long} |\n"
        "+-----------------------+----------------------------------------------------+"
    )


def test_step_line():
    assert step_line(report()) == (
        "step    1/50 | loss 10.987654 (+nanz)| norm 15.3123 (+nanz)| lr 3.00e-04 | 234.57 ms | n/a bf16 MFU"
        " | 17462 tok/s | 2.0% done | 0:01:00 left"
    )
    line = step_line(
        report(
            step=19559,
            num_steps=19560,
            loss=3.25,
            loss_z=-0.4567,
            grad_norm=0.25,
            grad_norm_z=11.2,
            learning_rate=0.0,
            mfu=0.4567,
            seconds_left=0.0,
        )
    )
    assert line == (
        "step 19560/19560 | loss 3.250000 (-0.46z)| norm 0.2500 (+11.20z)| lr 0.00e+00 | 234.57 ms | 45.7% bf16 MFU"
        " | 17462 tok/s | 100.0% done | 0:00:00 left"
    )
    # Where llm.c's own check reads the loss.
    assert step_line(report())[20:28].strip() == "10.98765"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00:00"), (59.5, "0:01:00"), (3599.4, "0:59:59"), (3600, "1:00:00"), (100 * 3600, "100:00:00")],
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_console_and_main_log(tmp_path, capsys):
    directory = tmp_path / "some" / "where"
    directory.mkdir(parents=True)
    logger = Logger(directory)
    log = directory / "main.log"
    assert log.read_bytes() == b""
    logger.validation(0, 11.00007)
    assert log.read_bytes() == b"s:0 tel:11.0001\n"  # complete after every line
    logger.training(report())
    logger.training(report(step=12, loss=4.0, grad_norm=1.005, learning_rate=6e-7))
    logger.validation(20, 3.5)
    assert log.read_bytes() == (
        b"s:0 tel:11.0001\n"
        b"s:0 trl:10.9877 lr:0.000300 norm:15.31\n"
        b"s:12 trl:4.0000 lr:0.000001 norm:1.00\n"
        b"s:20 tel:3.5000\n"
    )
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "val loss 11.000070"
    assert out[1] == step_line(report())
    assert out[3] == "val loss 3.500000"
    assert len(out) == 4


def test_a_new_run_empties_the_log_and_keeps_other_files(tmp_path, capsys):
    (tmp_path / "main.log").write_text("s:0 tel:1.0000\n")
    (tmp_path / "notes.txt").write_text("mine")
    Logger(tmp_path)
    assert (tmp_path / "main.log").read_bytes() == b""
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert capsys.readouterr().out == ""


def test_a_resumed_run_appends(tmp_path):
    for _ in range(2):  # the log may be there or not
        Logger(tmp_path, append=True).validation(3, 1.0)
    assert (tmp_path / "main.log").read_bytes() == b"s:3 tel:1.0000\ns:3 tel:1.0000\n"


def test_a_resumed_run_takes_half_a_line_off(tmp_path):
    """Nothing could be appended to it."""
    for left, kept in [("s:0 tel:1.0000\ns:1 tr", "s:0 tel:1.0000\n"), ("s:0 t", ""), ("", "")]:
        (tmp_path / "main.log").write_text(left)
        Logger(tmp_path, append=True).validation(3, 1.0)
        assert (tmp_path / "main.log").read_text() == kept + "s:3 tel:1.0000\n"


def test_without_a_directory_it_only_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = Logger(None)
    logger.validation(0, 1.0)
    logger.training(report())
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert list(tmp_path.iterdir()) == []


def test_unusable_log(tmp_path):
    (tmp_path / "main.log").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*main\.log: Is a directory"):
        Logger(tmp_path)


def test_a_full_disk(tmp_path, capsys):
    """Of a limit on the size of files, which cuts a line in the middle: no line is lost, or there in part."""
    logger = Logger(tmp_path)
    logger.validation(0, 1.0)
    capsys.readouterr()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, old[1]))
    try:
        for step in (1, 2):
            logger.validation(step, 1.0)
            assert (tmp_path / "main.log").read_text() == "s:0 tel:1.0000\n"
        with pytest.raises(
            RunError, match=r"cannot write .*main\.log: File too large; choose another directory with -o"
        ):
            logger.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    out = capsys.readouterr().out
    assert out.count("WARNING: cannot write") == 1 and f"{tmp_path}/main.log: File too large; its lines wait\n" in out
    logger.validation(3, 1.0)
    assert (tmp_path / "main.log").read_text() == "".join(f"s:{step} tel:1.0000\n" for step in range(4))
    assert capsys.readouterr().out.endswith(f"{tmp_path}/main.log can be written again\n")
    logger.close()


def test_a_vanished_directory(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    logger = Logger(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    logger.validation(0, 1.0)
    assert "main.log: No such file or directory; its lines wait\n" in capsys.readouterr().out
    (tmp_path / "elsewhere").rename(tmp_path / "out")
    logger.close()
    assert (tmp_path / "out" / "main.log").read_text() == "s:0 tel:1.0000\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_directory(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="Permission denied"):
        Logger(tmp_path)


def test_throughput():
    throughput = Throughput(tokens=1000, flops_per_token=6e6, peak_flops=None)
    assert throughput.update(4.0) == 250  # alone
    assert throughput.average_ms() == 4000  # there is no other
    assert throughput.update(2.0) == pytest.approx(500)  # the slow first step is forgotten
    assert throughput.update(1.0) == pytest.approx((0.95 * 0.05 * 500 + 0.05 * 1000) / (1 - 0.95**2))
    assert throughput.average_ms() == 1500
    for _ in range(400):
        last = throughput.update(0.5)
    assert last == pytest.approx(2000, rel=1e-6)  # 0.95**400 = 1e-9 of the past is left
    assert throughput.mfu(1.0) is None


def test_mfu():
    # 1000 tokens of 6 MFLOP in half a second are 12 GFLOP/s.
    assert Throughput(1000, 6e6, peak_flops=48e9).mfu(0.5) == pytest.approx(0.25)


def test_seconds_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("llmc.logger.time.perf_counter", lambda: now[0])
    throughput = Throughput(1000, 6e6, None)
    throughput.update(1.0)
    throughput.update(1.0)
    now[0] = 106.0  # two steps and a validation took 6 s
    assert throughput.seconds_left(10) == 30


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def now(monkeypatch):
    """What the clock says, in seconds."""
    now = [100.0]
    monkeypatch.setattr("llmc.logger.time.perf_counter", lambda: now[0])
    return now


def test_progress(now, monkeypatch):
    """Seen after a second, and at once where the activity has taken one before."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    progress = Progress()
    with progress.during("step") as show:
        for part in (1, 2, 3):
            show(f"part {part}/3")
            now[0] += 0.5
    assert terminal.getvalue() == "\r\x1b[Kpart 3/3\r\x1b[K"
    for activity, first in (("validation", ""), ("step", "\r\x1b[Kat once\r\x1b[K"), ("step", "")):
        terminal.truncate(0), terminal.seek(0)
        with progress.during(activity) as show:
            show("at once")
            now[0] += 0.999
        assert terminal.getvalue() == first


def test_progress_ends_with_a_failure_and_before_other_lines(now, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    progress = Progress()
    progress.erase()
    assert terminal.getvalue() == ""
    with pytest.raises(RunError), progress.during("step") as show:
        now[0] += 1
        show("a")
        progress.erase()
        print("line")
        show("b")
        raise RunError
    assert terminal.getvalue() == "\r\x1b[Ka\r\x1b[Kline\n\r\x1b[Kb\r\x1b[K"


def test_progress_fits_into_one_line(now, monkeypatch):
    """A longer one would not be erased."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", "20")
    with Progress().during("step") as show:
        now[0] += 1
        show("x" * 30)
    assert terminal.getvalue() == "\r\x1b[K" + 19 * "x" + "\r\x1b[K"


def test_no_progress_in_pipes_and_files(now, capsys):
    with Progress().during("step") as show:
        now[0] += 10
        show("a")
    assert capsys.readouterr().out == ""
