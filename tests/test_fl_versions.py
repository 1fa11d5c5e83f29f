"""What the server of the loop hands out: which streams lead to a version, whatever happened to its folder."""

import os
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

import tensorwire
import tensorwire.fl.versions as module
from tensorwire.fl.plan import Plan
from tensorwire.fl.versions import STEPS, Versions, stream
from tensorwire.transfer import Recorded
from tensorwire.updates import receive, receive_patch, views

PLAN = Plan(down="nf4", down_kind="difference")
PATCHES = replace(PLAN, down_kind="patch")


def model_of(number):
    draw = np.random.default_rng(number)
    return {"w": draw.standard_normal((100, 200)).astype(np.float32), "count": np.array([number])}


def frozen_but_for(number):
    """A model of which a row changes in each round."""
    model = model_of(0)
    for row in range(number):
        model["w"][row] = model_of(row + 1)["w"][row]
    return {**model, "count": np.array([number])}


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
                terms = follow(way.kind, file, self.state, self.held)
            mine = folder / "mine.tw"
            mine.write_bytes(b"".join(stream(views(self.state), terms.run, terms.round)))
            self.held = Recorded(mine).digest
        assert self.held == versions.base
        return len(ways)


def follow(kind, source, state, held):
    """What a client does with a stream of this kind."""
    return receive_patch(source, state, held=held) if kind == "patch" else receive(source, state, held=held)[0]


def names(folder):
    return {name for name in os.listdir(folder) if name != "mine.tw"}


def test_differences_are_chained_while_they_are_smaller(tmp_path):
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


@pytest.mark.parametrize("down", ["raw", "bf16", "nf4"])
def test_holders_get_patches_and_new_clients_the_codec(tmp_path, down):
    plan, steady = replace(PATCHES, down=down), Holder()
    versions = Versions(tmp_path, plan)
    for number in range(4):
        versions.begin(number, frozen_but_for(number))
        [way] = versions.way(steady.held)
        [whole] = versions.way("")
        assert way.kind == ("patch" if number else whole.kind) and steady.follow(versions, tmp_path) == 1
        assert number == 0 or way.size < whole.size / 5
        assert (whole.kind, down == "raw") in (("model", True), ("encoded", False))
        sent = b"".join(tensorwire.encode(frozen_but_for(number), codec={"w": down}))
        assert whole.size < len(sent) + 500 and same(steady.state, tensorwire.loads(sent))
        late = Holder()
        late.follow(versions, tmp_path)
        assert late.held == steady.held and same(late.state, steady.state)
    again = Versions(tmp_path, plan)  # a server that is started again knows as much
    again.begin(3, frozen_but_for(3))
    assert again.way(steady.held) == versions.way(steady.held) and again.way("") == versions.way("")


def same(left, right):
    return left.keys() == right.keys() and all(left[name].tobytes() == right[name].tobytes() for name in left)


def test_a_patch_longer_than_the_whole_is_dropped_and_reported(tmp_path):
    notes: list[str] = []
    versions, holder = Versions(tmp_path, PATCHES, notes.append), Holder()
    for number in range(3):
        versions.begin(number, model_of(number))
        assert len(notes) == number and all("is sent whole, and not as a patch" in note for note in notes)
        [way] = versions.way(holder.held)
        assert way.kind == "encoded" and names(tmp_path) == {f"broadcast-{number}.tw", f"whole-{number}.tw"}
        holder.follow(versions, tmp_path)


@pytest.mark.parametrize("how", ["gone", "cut"])
def test_a_version_without_its_encoded_form_is_sent_raw(tmp_path, how):
    versions = Versions(tmp_path, PATCHES)
    versions.begin(0, model_of(0))
    base, path = versions.base, tmp_path / "whole-0.tw"
    path.unlink() if how == "gone" else path.write_bytes(path.read_bytes()[:1000])
    notes = []
    versions = Versions(tmp_path, PATCHES, notes.append)
    versions.begin(0, model_of(0))
    assert versions.way("")[0].kind == "model" and versions.base == base and len(notes) == (how == "cut")
    assert Holder().follow(versions, tmp_path) == 1


def test_an_empty_name_holds_no_version(tmp_path):
    """A step that says not what it is from is nobody's, least of all theirs who hold nothing."""
    for kind in STEPS:
        versions = Versions(tmp_path, replace(PLAN, down_kind=kind))
        versions.begin(0, frozen_but_for(0))
        for number in (1, 2):
            versions.begin(number, frozen_but_for(number))
            (tmp_path / f"{kind}-{number}.tw").write_bytes(
                b"".join(stream(views(frozen_but_for(number)), "run", number))
            )
        again = Versions(tmp_path, replace(PLAN, down_kind=kind))
        again.begin(2, frozen_but_for(2))
        assert [again.way(held) for held in ("", None, "0" * 64)] == [[again._whole]] * 3
        assert again._whole.held == "" and again._ways == {}


def test_only_holders_of_its_base_can_follow_a_patch(tmp_path):
    versions, holder = Versions(tmp_path, PATCHES), Holder()
    for number in range(2):
        versions.begin(number, frozen_but_for(number))
        if number == 0:
            holder.follow(versions, tmp_path)
    [way] = versions.way(holder.held)
    before = {name: array.copy() for name, array in holder.state.items()}
    for held in ("", "0" * 64):
        with pytest.raises(tensorwire.SchemaError, match="another version"), open(way.path, "rb", buffering=0) as file:
            follow(way.kind, file, holder.state, held)
    holder.state["w"][1, 7] += 1
    before["w"][1, 7] += 1
    with pytest.raises(tensorwire.SchemaError, match="Nothing was written"), open(way.path, "rb", buffering=0) as file:
        follow(way.kind, file, holder.state, holder.held)
    assert same(holder.state, before)


def test_whole_models_are_their_decoded_codec_and_leave_no_files(tmp_path):
    versions = Versions(tmp_path, replace(PLAN, down_kind="weights"))
    for number in range(3):
        versions.begin(number, model_of(number))
        assert names(tmp_path) == {f"broadcast-{number}.tw"}
    assert versions.way(versions.base) == versions.way("") and versions.way("")[0].size < 20_000


@pytest.mark.parametrize("kinds", [*permutations(("weights", *STEPS), 2)])
def test_a_restarted_run_may_change_its_settings(tmp_path, kinds):
    holder, bases = Holder(), []
    for number, kind in enumerate((kinds[0], kinds[0], kinds[1], kinds[1])):
        versions = Versions(tmp_path, replace(PLAN, down_kind=kind))
        versions.begin(number, frozen_but_for(number))
        [way, *more] = versions.way(holder.held)
        apart = kinds == ("difference", "patch") and number == 2  # what they hold is not what the codec makes of it
        step = kind in STEPS and number > 0 and not apart
        assert not more and way.kind == (kind if step else "encoded" if kind == "patch" else "model")
        with open(way.path, "rb", buffering=0) as file:
            follow(way.kind, file, holder.state, holder.held)
        holder.held = versions.base
        bases.append(versions.base)
    assert len({*bases}) == 4


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("plan", "least"), [(PLAN, 3), (PATCHES, 4), (replace(PATCHES, down="raw"), 3)])
def test_a_server_killed_at_any_step_makes_the_same_version(tmp_path, monkeypatch, plan, least):
    model_of = frozen_but_for if plan.down_kind == "patch" else globals()["model_of"]
    (tmp_path / "calm").mkdir()
    calm = Versions(tmp_path / "calm", plan)
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
        holder, versions = Holder(), Versions(folder, plan)
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
        versions = Versions(folder, plan)
        versions.begin(3, model_of(3))
        assert versions.base == calm.base and holder.follow(versions, folder) == 1
        assert names(folder) == names(tmp_path / "calm")
    assert steps >= least  # the step, the version and its encoded form, and what is removed
