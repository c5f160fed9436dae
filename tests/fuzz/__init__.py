# SPDX-License-Identifier: MIT
"""What must hold for any octets at all: targets, and two ways to aim at them (Hypothesis in the suite, atheris by the hour).

A target is a function of octets that raises where a promise is broken; see `targets.TARGETS`.
"""
