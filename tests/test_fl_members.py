"""Whom a round waits for, and when it is over: every way in which members may come, answer, and go."""

import pytest

from tensorwire.errors import SchemaError
from tensorwire.fl.members import Members
from tensorwire.fl.plan import Plan
from tensorwire.updates import Terms, Update


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def members(clients=3, deadline=10.0, **plan):
    clock = Clock()
    return Members(Plan(clients=clients, deadline=deadline, **plan), clock=clock), clock


def update(name):
    return Update(Terms("run", 0, client=name), b"", 1.0, b"")


def test_a_round_is_over_when_everybody_has_answered():
    run, _ = members()
    for name in "abc":
        run.heard(name)
        assert run.wanted(name)
        assert not run.ended()
        run.accept(update(name))
        assert not run.wanted(name)
    assert run.ended() == "everybody has answered"
    assert run.close() == {} and sorted(run.accepted()) == ["a", "b", "c"]


@pytest.mark.parametrize("last", ["refused: it is NaN", "nothing to add", "left"])
def test_an_answer_need_not_be_an_update(last):
    run, _ = members(2)
    run.heard("a")
    run.heard("b")
    run.accept(update("a"))
    run.nothing_from("b", last, gone=last == "left")
    assert run.ended() and run.close() == {"b": last}
    run.begin(1, None)
    assert run.wanted("a") and run.wanted("b")
    run.accept(update("a"))
    assert bool(run.ended()) == (last == "left")  # who has left is not waited for, who was refused is


def test_a_client_that_returns_may_still_deliver():
    run, _ = members(2)
    run.heard("a")
    run.heard("b")
    run.nothing_from("b", "killed", gone=True)
    assert not run.ended()  # a is still to come
    run.heard("b")
    assert run.wanted("b")
    run.accept(update("a"))
    assert not run.ended()
    run.nothing_from("b", "refused: it is NaN")
    run.nothing_from("b", "left", gone=True)
    run.heard("b")
    assert not run.wanted("b") and run.ended()


def test_absent_clients_are_waited_for_only_until_a_deadline():
    run, clock = members(3)
    clock.now = 1000.0  # before anybody is there no time runs
    assert not run.ended() and run.left() is None
    run.heard("a")
    assert run.left() == 10.0
    run.accept(update("a"))
    assert not run.ended()
    clock.now += 10
    assert run.ended() == "the deadline" and run.left() is None
    run.close()
    run.begin(1, None)
    run.heard("a")
    run.accept(update("a"))
    assert run.ended() == "everybody has answered"
    run.heard("b")  # comes after all
    assert not run.ended() and run.wanted("b")


def test_a_client_that_misses_a_deadline_costs_only_one():
    run, clock = members(2)
    run.heard("a")
    run.heard("b")
    run.accept(update("a"))
    clock.now += 10
    assert run.ended() == "the deadline"
    assert run.close() == {"b": "nothing came by the deadline"}
    run.begin(1, None)
    run.heard("a")
    run.accept(update("a"))
    assert run.ended() == "nobody else is there"
    run.heard("b")
    assert not run.ended()


def test_no_round_passes_without_clients():
    run, clock = members(2)
    for name in "ab":
        run.heard(name)
        run.nothing_from(name, "left", gone=True)
    assert run.ended()
    run.close()
    run.begin(1, None)
    clock.now += 1e6
    assert not run.ended()


def test_names_and_numbers_of_members_are_bounded():
    run, _ = members(2)
    for name in ("", "../a", "a b", "a" * 65, "ä"):
        with pytest.raises(SchemaError, match="must be named"):
            run.heard(name)
    run.heard("a")
    run.heard("b")
    with pytest.raises(SchemaError, match="has its 2 clients"):
        run.heard("c")
    run.heard("a")


def test_a_sample_is_drawn_once_all_are_present():
    drawn = []
    for names in ("abcdefghij", "jihgfedcba"):
        run, _ = members(10, fraction=0.3, seed=5)
        for name in names:
            assert not run.to_draw() and not run.ended()
            run.heard(name)
            assert not run.wanted(name)
        assert run.to_draw()
        drawn.append(run.draw())
        assert not run.to_draw() and [name for name in "abcdefghij" if run.wanted(name)] == drawn[-1]
        for name in drawn[-1]:
            run.accept(update(name))
        assert run.ended() and not run.close()
        run.begin(1, None)
        assert run.to_draw() and run.draw() != drawn[-1]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 3


def test_a_draw_waits_until_a_deadline_and_skips_absent_clients():
    run, clock = members(3, sample=2)
    run.heard("a")
    assert not run.to_draw()
    clock.now += 10
    assert run.to_draw() and run.draw() == ["a"]
    assert run.left() is None  # the time of those who were drawn begins when they are heard of
    run.accept(update("a"))
    run.close()
    run.begin(1, None)
    run.heard("b")
    run.nothing_from("b", "left", gone=True)
    assert run.draw() == ["a"]


def test_a_draw_survives_a_restart():
    run, _ = members(3, sample=1)
    run.begin(4, ["b"])
    run.heard("a")
    assert run.wanted("b") and not run.wanted("a") and not run.to_draw()
    run.accept(update("b"))
    assert run.ended()


def test_waiting_clients_ask_at_most_a_hundred_times_a_second():
    run, _ = members(1000)
    assert run.pause() == 0.1
    for number in range(1000):
        run.heard(f"c{number}")
    assert run.pause() == pytest.approx(10)


def test_draws_are_fair_and_depend_on_seed_and_round_alone():
    plan = Plan(clients=20, fraction=0.25, seed=1)
    names = [f"c{number}" for number in range(20)]
    assert plan.draw(3, names) == plan.draw(3, names) != plan.draw(4, names)
    counts = dict.fromkeys(names, 0)
    for number in range(400):
        for name in plan.draw(number, names):
            counts[name] += 1
    assert min(counts.values()) > 60 and max(counts.values()) < 140  # 100 expected
