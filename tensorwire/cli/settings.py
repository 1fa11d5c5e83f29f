"""The settings of a run as options, and back: one for each field of `tensorwire.fl.plan.Plan`."""

import argparse
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from tensorwire.fl.plan import Plan


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Give a command an option for every setting of a plan."""
    for each in fields(Plan):
        kind, text, *metavar = get_args(each.type)
        default = f"{each.default:g}" if kind is float else each.default
        shown = "" if default is None or kind is bool else f" ({default})"
        options: dict[str, Any] = {"default": each.default, "help": text + shown}
        if kind is bool:
            options["action"] = "store_true"
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        else:
            made = get_args(kind)[0] if isinstance(kind, UnionType) else kind  # the other member of a union with None
            options |= {"type": made, "metavar": metavar[0] if metavar else None}
        parser.add_argument(_flag(each.name), **options)


def plan_of(arguments: argparse.Namespace) -> Plan:
    """The plan that the options describe. Raises ValueError."""
    return Plan(**{each.name: getattr(arguments, each.name) for each in fields(Plan)})


def options_of(plan: Plan) -> list[str]:
    """The options that describe a plan."""
    given = [(each.name, getattr(plan, each.name)) for each in fields(Plan)]
    values = [f"{_flag(name)}={value}" for name, value in given if value is not None and type(value) is not bool]
    return values + [_flag(name) for name, value in given if value is True]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
