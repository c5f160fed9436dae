# SPDX-License-Identifier: MIT
"""`python -m tests.fuzz.harness TARGET [libFuzzer's options]`: one target under atheris, instrumented. `__main__` starts it."""

from __future__ import annotations

import sys

import atheris  # type: ignore[import-not-found]

with atheris.instrument_imports(include=["polarismail"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Until libFuzzer ends, which ends the process."""
    target = TARGETS[sys.argv[1]]
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
