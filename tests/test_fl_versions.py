"""What the server of the loop hands out: which streams lead to a version, whatever happened to its folder."""

import os
from dataclasses import replace

import numpy as np
import pytest

import tensorwire.fl.versions as module
from tensorwire.fl.plan import Plan
from tensorwire.fl.versions import Versions, stream
from tensorwire.transfer import Recorded
from tensorwire.updates import receive, views

PLAN = Plan(down="nf4", down_kind="difference")


def model_of(number):
    draw = np.random.default_rng(number)
    return {"w": draw.standard_normal((100, 200)).astype(np.float32), "count": np.array([number])}


class Holder:
    """A client: what it holds, and under which name."""

    def __init__(self):
        self.state = {"w": np.zeros((100, 200), np.float32), "count": np.zeros(1, np.int64)}
        self.held = ""

    def follow(self, versions, folder):
        """Go where the ways lead; returns how many there were."""
        ways = versions.way(self.held)
        for way in ways:
            with open(way.path, "rb", buffering=0) as file:
                terms, _ = receive(file, self.state, held=self.held)
            mine = folder / "mine.tw"
            mine.write_bytes(b"".join(stream(views(self.state), terms.run, terms.round)))
            self.held = Recorded(mine).digest
        assert self.held == versions.base
        return len(ways)


def names(folder):
    return {name for name in os.listdir(folder) if name != "mine.tw"}


def test_one_difference_a_round_and_as_many_as_are_worth_it(tmp_path):
    versions, steady, first = Versions(tmp_path, PLAN), Holder(), None
    for number in range(12):
        versions.begin(number, model_of(number))
        assert steady.follow(versions, tmp_path) == 1
        late = Holder()
        assert late.follow(versions, tmp_path) == 1 and late.state["w"].tobytes() == steady.state["w"].tobytes()
        if number == 4:
            first = late
    kept = len(versions._ways)
    assert names(tmp_path) == {"broadcast-11.tw", *(f"difference-{11 - n}.tw" for n in range(kept))}
    sizes = [os.path.getsize(tmp_path / name) for name in names(tmp_path)]
    assert 5 <= kept <= 7 and sum(sizes) <= 2 * max(sizes)
    again = Versions(tmp_path, PLAN)  # a server that is started again knows as much
    again.begin(11, model_of(11))
    assert again.way(first.held) == versions.way(first.held) and again.base == versions.base
    assert first.follow(again, tmp_path) == (7 if kept == 7 else 1)


def test_whole_models_leave_nothing_behind_and_are_what_their_codec_makes_of_them(tmp_path):
    versions = Versions(tmp_path, replace(PLAN, down_kind="weights"))
    for number in range(3):
        versions.begin(number, model_of(number))
        assert names(tmp_path) == {f"broadcast-{number}.tw"}
    assert versions.way(versions.base) == versions.way("") and versions.way("")[0].size < 20_000


@pytest.mark.parametrize("kinds", [("weights", "difference"), ("difference", "weights")])
def test_a_run_may_change_its_mind_when_it_is_started_again(tmp_path, kinds):
    holder, bases = Holder(), []
    for number, kind in enumerate((kinds[0], kinds[0], kinds[1], kinds[1])):
        versions = Versions(tmp_path, replace(PLAN, down_kind=kind))
        versions.begin(number, model_of(number))
        [way, *more] = versions.way(holder.held)
        assert not more and way.kind == ("difference" if kind == "difference" and number else "model")
        with open(way.path, "rb", buffering=0) as file:
            receive(file, holder.state, held=holder.held)
        holder.held = versions.base
        bases.append(versions.base)
    assert len({*bases}) == 4


class Killed(BaseException):
    pass


def test_a_server_killed_between_any_two_steps_goes_on_to_the_same_version(tmp_path, monkeypatch):
    (tmp_path / "calm").mkdir()
    calm = Versions(tmp_path / "calm", PLAN)
    for number in range(4):
        calm.begin(number, model_of(number))
    left = [0]

    def counted(function):
        def act(*arguments):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return function(*arguments)

        return act

    write, unlink = counted(module.write_file), counted(os.unlink)
    steps = 0
    for before in range(1, 12):
        folder = tmp_path / str(before)
        folder.mkdir()
        holder, versions = Holder(), Versions(folder, PLAN)
        for number in range(3):
            versions.begin(number, model_of(number))
        holder.follow(versions, folder)
        with monkeypatch.context() as patch:
            patch.setattr(module, "write_file", write)
            patch.setattr(module.os, "unlink", unlink)
            left[0] = before
            try:
                versions.begin(3, model_of(3))
                break
            except Killed:
                steps += 1
        versions = Versions(folder, PLAN)
        versions.begin(3, model_of(3))
        assert versions.base == calm.base and holder.follow(versions, folder) == 1
        assert names(folder) == names(tmp_path / "calm")
    assert steps >= 3  # the difference, the version, and what is removed
