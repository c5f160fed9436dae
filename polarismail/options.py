# SPDX-License-Identifier: MIT
"""What `twistd polarismail` takes on its command line. A bad configuration ends the start here, its faults named."""

from __future__ import annotations

from twisted.python import usage

from polarismail.config import DEFAULT_PATH, Config, parse, read
from polarismail.values.errors import ConfigError


class Options(usage.Options):
    """`--config FILE`. After parsing, `text` is what it holds and `configuration` the Config that it means."""

    synopsis = "[options]"
    longdesc = (
        "polarismail, the mail server. `polarismail check --config FILE` validates a configuration without starting."
    )
    optParameters = [
        ["config", "c", DEFAULT_PATH, "The configuration file."],
        ["clock-offset", None, 0.0, "Shift the wall clock by so many seconds (tests).", float],
    ]

    configuration: Config
    text: str

    def postOptions(self) -> None:
        """Read the file. Raises UsageError with every fault of it."""
        try:
            self.text = read(self["config"])
            self.configuration = parse(self["config"], self.text)
        except ConfigError as problem:
            raise usage.UsageError(str(problem)) from problem

    def getUsage(self, width: int | None = None) -> str:
        """As ever, without the option that only tests use."""
        everything = self.longOpt
        self.longOpt = [name for name in everything if not name.startswith("clock-offset")]
        try:
            return super().getUsage(width)
        finally:
            self.longOpt = everything
