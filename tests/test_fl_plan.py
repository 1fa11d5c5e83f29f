"""A plan: one place for every setting, and what derives from it."""

import argparse
from dataclasses import asdict, fields

import pytest

from tensorwire.cli.settings import add_settings, options_of, plan_of
from tensorwire.errors import SchemaError
from tensorwire.fl.plan import Answer, Order, Plan

BASE = "ab" * 32
OTHER = Plan(
    sample=2,
    seed=7,
    age=0.5,
    name="other",
    rounds=3,
    clients=2,
    quorum=1,
    deadline=1.5,
    down="raw",
    up="bf16",
    kind="weights",
    stochastic=True,
    max_weight=10.0,
    max_norm=0.25,
    on_norm="clip",
)


def parsed(arguments):
    parser = argparse.ArgumentParser()
    add_settings(parser)
    return plan_of(parser.parse_args(arguments))


@pytest.mark.parametrize("plan", [Plan(), OTHER, Plan(feedback=True)])
def test_a_plan_survives_the_command_line(plan):
    assert parsed(options_of(plan)) == plan


def test_every_setting_is_an_option_with_its_default_in_the_help():
    parser = argparse.ArgumentParser()
    add_settings(parser)
    text = " ".join(parser.format_help().split())
    for each in fields(Plan):
        assert f"--{each.name.replace('_', '-')}" in text
        if each.default not in (None, False):
            shown = f"{each.default:g}" if type(each.default) is float else each.default
            assert f"({shown})" in text
    assert parsed([]) == Plan()
    with pytest.raises(SystemExit):
        parser.parse_args(["--kind", "sum"])


@pytest.mark.parametrize(
    "settings",
    [
        {"rounds": 0},
        {"clients": -1},
        {"quorum": 0},
        {"quorum": 5},
        {"quorum": 3, "sample": 2},
        {"sample": 0},
        {"sample": 2, "fraction": 0.5},
        {"fraction": 1.5},
        {"age": 0.0},
        {"age": 2.0},
        {"clients": True},
        {"clients": 2.0},
        {"deadline": float("nan")},
        {"max_norm": "much"},
        {"up": "nf5"},
        {"down": "nf5"},
        {"kind": "sum"},
        {"on_norm": "shrink"},
        {"feedback": 1},
        {"feedback": True, "kind": "weights"},
    ],
    ids=str,
)
def test_invalid_settings_are_refused(settings):
    with pytest.raises(ValueError, match="|".join(settings) + "|nf5"):
        Plan(**settings)


@pytest.mark.parametrize("plan", [Plan(), OTHER])
def test_an_order_carries_the_answer_settings_of_the_plan(plan):
    order = Order.of(plan, 7, BASE)
    assert Order.parse(order.message()) == order
    assert (order.run, order.round, order.base) == (plan.name, 7, BASE)
    assert {each.name: getattr(order, each.name) for each in fields(Answer)}.items() <= asdict(plan).items()


def test_an_invalid_order_is_refused_with_the_reason():
    message = Order.of(Plan(), 7, BASE).message()
    for name in message:
        with pytest.raises(SchemaError, match=f"lacks {name}"):
            Order.parse({key: value for key, value in message.items() if key != name})
    with pytest.raises(SchemaError, match="does not know"):
        Order.parse({**message, "more": 1})
    for name, value in {"round": "7", "base": "ab", "up": "nf5", "kind": "sum", "feedback": 1, "run": None}.items():
        with pytest.raises(SchemaError, match="cannot be followed"):
            Order.parse({**message, name: value})
