"""The command table: every entry exists, faults are one line with exit code 2, help needs nothing."""

import importlib

import pytest

from rorqual.cli import COMMANDS, main
from rorqual.errors import ConfigError


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists_and_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = COMMANDS[name]
    assert callable(getattr(importlib.import_module(command.module), command.function))
    code: object = 0
    try:
        code = main([name, "--help"])
    except SystemExit as e:  # how the option parser ends after printing its help
        code = e.code
    assert code in (0, None)
    assert len(capsys.readouterr().out) > 40


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "'trian' is not a command" in capsys.readouterr().err


def test_faults_become_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: list[str]) -> int:
        raise ConfigError("steps=0:\n  must be 1 or more")

    monkeypatch.setattr("rorqual.checkpoint.command.cost", fail)
    assert main(["cost", "x"]) == 2
    assert capsys.readouterr().err == "error: steps=0: must be 1 or more\n"


def test_ctrl_c_leaves_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("rorqual.checkpoint.command.cost", stop)
    assert main(["cost", "x"]) == 130
