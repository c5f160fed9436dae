# SPDX-License-Identifier: MIT
"""`twistd polarismail`: a good configuration is read before anything starts, a bad one ends the start with its faults."""

from __future__ import annotations

from pathlib import Path

import pytest
from twisted.python import usage

from polarismail.options import Options


def parse(*words: str) -> Options:
    options = Options()
    options.parseOptions(list(words))
    return options


def test_configuration_is_read(tmp_path: Path) -> None:
    path = tmp_path / "polarismail.toml"
    path.write_text('hostname = "mail.here.test"\n')
    for words in (("--config", str(path)), ("-c", str(path)), (f"--config={path}", "--clock-offset", "-3600.5")):
        options = parse(*words)
        assert options.configuration.hostname == "mail.here.test" and options["config"] == str(path)
    assert options["clock-offset"] == -3600.5


def test_faults_end_the_start(tmp_path: Path) -> None:
    path = tmp_path / "polarismail.toml"
    path.write_text("hostnam = 1\n[log]\nformat = 2\n")
    with pytest.raises(usage.UsageError) as caught:
        parse("-c", str(path))
    assert len(str(caught.value).splitlines()) == 2 and 'did you mean "hostname"?' in str(caught.value)
    with pytest.raises(usage.UsageError, match="cannot be read"):
        parse("-c", str(tmp_path / "nothing.toml"))
    with pytest.raises(usage.UsageError, match="could not convert"):
        parse("-c", str(path), "--clock-offset", "soon")


def test_the_option_of_tests_is_not_shown() -> None:
    shown = Options().getUsage()
    assert "--config" in shown and "clock-offset" not in shown
    assert any(name.startswith("clock-offset") for name in Options().longOpt)
