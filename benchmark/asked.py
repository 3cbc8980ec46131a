"""What the words of a command line ask for: methods, seeds, hyperparameters. A typo dies here, before the slow imports."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import yaml

from benchmark import catalog
from benchmark import protocol as protocols
from benchmark.errors import UserError, unknown


def chosen_methods(protocol: protocols.Protocol, asked: Sequence[str]) -> list[str]:
    """Names, with "all" spelled out."""
    names = [name for item in asked for name in item.split(",")]
    if "all" in names:
        two_sided = catalog.load("task", protocol.task).sides
        rivals = [name for name in catalog.entries("method") if name not in catalog.PARTS]
        return ["Independent", *catalog.entries("two-sided method")] if two_sided else rivals
    known = catalog.names("method") + catalog.names("two-sided method")
    for name in names:
        if "." not in name and name.lower() not in [one.lower() for one in known]:
            raise unknown("method", name, known)
    return names


def chosen_seeds(protocol: protocols.Protocol, asked: Sequence[str]) -> list[int]:
    if asked == ["first"]:
        return [protocol.seeds[0]]
    if asked == ["all"]:
        return list(protocol.seeds)
    try:
        seeds = [int(seed) for item in asked for seed in item.split(",")]
    except ValueError:
        raise UserError(f"--seed takes numbers or 'all', not '{' '.join(asked)}'") from None
    for seed in seeds:
        if seed not in protocol.seeds:
            raise UserError(f"seed {seed} is not one of {protocol.id}'s: {', '.join(map(str, protocol.seeds))}")
    return seeds


def settings(pairs: Sequence[str]) -> dict[str, Any]:
    values = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator:
            raise UserError(f"--set takes NAME=VALUE, not '{pair}'")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set {key} takes a number, true, false, null, a word or a list, not '{value}'") from None
        if isinstance(values[key], str):
            with contextlib.suppress(ValueError):
                values[key] = float(value)  # YAML 1.1 takes 1e-3 for a word
    return values
