# SPDX-License-Identifier: MIT
"""What settings of several rooms must be: validators of attrs fields, whose words name the key and say what was expected."""

from __future__ import annotations

from typing import Any

from polarismail.values.network import parse_network


def check_positive(_: object, attribute: Any, value: int) -> None:
    """1 or more."""
    if value < 1:
        raise ValueError(f"{attribute.name}: expected 1 or more, found {value}")


def check_networks(_: object, attribute: Any, networks: tuple[str, ...]) -> None:
    """Networks of clients, as text."""
    for network in networks:
        try:
            parse_network(network)
        except ValueError as problem:
            raise ValueError(f"{attribute.name}: {problem}") from problem
