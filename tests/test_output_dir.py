"""The output directory: made, checked, and made ready for a new or a resumed run."""

import pytest

from llmc.config import TrainConfig
from llmc.errors import RunError
from llmc.lock import Lock
from llmc.output_dir import check_output_dir, open_output_dir, remove_leftovers
from llmc.ranks import Ranks


def test_created_with_its_parents_and_the_settings(tmp_path, capsys):
    directory = tmp_path / "some" / "where"
    check_output_dir(str(directory))
    assert not directory.exists()
    assert open_output_dir(TrainConfig(output_dir=str(directory), batch_size=3), Ranks(), Lock("")) == directory
    assert capsys.readouterr().out == f"created directory: {directory}\n"
    assert "batch-size = 3\n" in (directory / "config.toml").read_text()
    open_output_dir(TrainConfig(output_dir=str(directory)), Ranks(), Lock(""))
    assert capsys.readouterr().out == ""


def test_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_output_dir("")
    assert open_output_dir(TrainConfig(output_dir=""), Ranks(), Lock("")) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resume", [False, True])
def test_checkpoints_of_another_run(tmp_path, capsys, resume):
    old = {
        "model_00000002.bin": "m",
        "state_00000002_00000.bin": "s",
        "DONE_00000002": "",
        "main.log": "s:0 tel:1.0000\n",
        "config.toml": "batch-size = 9\n",
    }
    for name, text in {**old, "notes.txt": "mine", ".model_00000003.bin.77.tmp": "half"}.items():
        (tmp_path / name).write_text(text)
    open_output_dir(TrainConfig(output_dir=str(tmp_path), resume=resume), Ranks(), Lock(""))
    left = {path.name for path in tmp_path.iterdir()}
    if resume:
        assert left == {*old, "notes.txt"}
        assert capsys.readouterr().out == ""
    else:
        assert left == {"previous_1", "config.toml", "notes.txt"}
        assert {path.name: path.read_text() for path in (tmp_path / "previous_1").iterdir()} == old
        assert f"moved the checkpoints and the log in {tmp_path} to {tmp_path}/previous_1" in capsys.readouterr().out
    assert "batch-size = 4\n" in (tmp_path / "config.toml").read_text()


def test_a_config_file_of_the_users_own_is_not_replaced(tmp_path):
    (tmp_path / "config.toml").write_text("# mine\nbatch-size = 9\n")
    with pytest.raises(RunError, match=r"config\.toml is not a run's and would be replaced; choose another output"):
        check_output_dir(str(tmp_path))
    (tmp_path / "config.toml").unlink()
    open_output_dir(TrainConfig(output_dir=str(tmp_path)), Ranks(), Lock(""))
    check_output_dir(str(tmp_path))


@pytest.mark.parametrize("below", ["", "below"])
def test_a_file_in_its_place(tmp_path, below):
    (tmp_path / "file").write_text("")
    directory = tmp_path / "file" / below
    with pytest.raises(RunError, match=f"-o {directory}: {tmp_path}/file is not a directory; choose another"):
        check_output_dir(str(directory))
    with pytest.raises(RunError, match=f"cannot create the output directory {directory}: .*; choose another with -o"):
        open_output_dir(TrainConfig(output_dir=str(directory)), Ranks(), Lock(""))


def test_leftovers_of_killed_writes(tmp_path):
    keep = {".hidden", ".model.tmp", "model_00000010.bin.7.tmp", "config.toml", ".main.log.7.tmp", ".model_1.bin.7.tmp"}
    leftovers = {".model_00000020.bin.12.tmp", ".state_00000020_00000.bin.123.tmp", ".config.toml.7605.tmp"}
    for name in keep | leftovers:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == keep
