"""The members of a run, what each has done in the round, and whether any can still deliver. Without I/O.

A round waits for the members that it asked and that have not answered. An answer is an accepted update, a refusal
after which no other update is accepted, "nothing this round", or leaving. A round does not wait for a member that
missed a deadline or left until it is heard from again, so a dead client costs one deadline, not one in every round.
"""

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from tensorwire.errors import SchemaError, counted
from tensorwire.fl.plan import Plan
from tensorwire.updates import Update

NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")  # becomes part of a file name
_WHY: Final = 200  # characters that are kept of a client's reason
_PER_MEMBER: Final = 0.01  # seconds; all waiting members together ask at most a hundred times a second
_PAUSES: Final = (0.1, 60.0)  # seconds between two requests of one member: the shortest, the longest


@dataclass(slots=True)
class Member:
    """One client. `why`: the reason why it delivers nothing in this round. `gone`: the reason not to wait for it."""

    name: str
    asked: bool = False
    update: Update | None = None
    why: str = ""
    gone: str = ""
    seen: float = 0.0  # seconds since 1970
    seconds: float = 0.0  # from the beginning of its last round to its update
    up: int = 0  # bytes, over all rounds
    down: int = 0
    refused: int = 0
    corrupt: int = 0  # broken uploads in this round
    working: bool = False  # its update is verified or checked, during which no bytes come

    @property
    def answered(self) -> bool:
        """Whether it has answered in this round."""
        return bool(self.update or self.why)

    @property
    def state(self) -> str:
        """Its state, in a word or two."""
        if self.update is not None:
            return "delivered"
        return self.gone or self.why or ("training" if self.asked else "not asked")


class Members:
    """The members of a run, at most `plan.clients`, and its round."""

    def __init__(self, plan: Plan, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan = plan
        self._clock = clock
        self._members: dict[str, Member] = {}
        self._strangers = True  # whether to wait for clients that were never heard from
        self.told: set[str] = set()  # have heard that the run is over
        self.begin(0, None)

    def begin(self, number: int, asked: Iterable[str] | None) -> None:
        """Begin a round. `asked`: the clients that it asks, if they are already decided; None: not yet."""
        self.number = number
        self.due: float | None = None
        self._began = self._clock()
        self._drawn = asked is not None or not self._plan.samples
        for member in self._members.values():
            member.asked, member.update, member.why, member.corrupt = not self._plan.samples, None, "", 0
        for name in asked or ():
            self.add(name).asked = True

    def add(self, name: str) -> Member:
        """The member of this name, created if needed. Raises SchemaError if the run has all of its members."""
        if not NAME.fullmatch(name):
            raise SchemaError("a client must be named in 1 to 64 characters of A-Z, a-z, 0-9, '_' and '-'")
        if name not in self._members:
            if len(self._members) >= self._plan.clients:
                raise SchemaError(f"the run already has its {counted(self._plan.clients, 'client')}")
            self._members[name] = Member(name, asked=not self._plan.samples)
        return self._members[name]

    def heard(self, name: str) -> Member:
        """Note contact with a client: it becomes a present member, and the deadline may start. Raises as `add`."""
        member = self.add(name)
        if member.gone and member.why == member.gone:  # it left and is back, so it may still deliver in this round
            member.why = ""
        member.seen, member.gone = time.time(), ""
        if self.due is None:
            self.due = self._clock() + self._plan.deadline
        return member

    def everyone(self) -> list[Member]:
        """All members, by name."""
        return [self._members[name] for name in sorted(self._members)]

    def accepted(self) -> dict[str, Update]:
        """The accepted updates."""
        return {member.name: member.update for member in self.everyone() if member.update is not None}

    def accept(self, update: Update) -> None:
        """Accept an update."""
        member = self.add(update.client)
        member.update, member.why, member.seconds = update, "", self._clock() - self._began

    def nothing_from(self, name: str, why: str, *, gone: bool = False) -> None:
        """Note that a member delivers nothing in this round. `gone`: it has left, until it is heard from again."""
        member = self.add(name)
        if member.update is None and not (gone and member.why):  # the reason for a refusal stays
            member.why = why[:_WHY]
        if gone:
            member.gone = why[:_WHY]

    def wanted(self, name: str) -> bool:
        """Whether a member is to train."""
        member = self._members[name]
        return self._drawn and member.asked and not member.answered

    def pause(self) -> float:
        """Seconds after which a waiting client may ask again."""
        return min(max(len(self._members) * _PER_MEMBER, _PAUSES[0]), _PAUSES[1])

    def to_draw(self) -> bool:
        """Whether the round's clients can be drawn: all are present, or the deadline for the others has passed."""
        return not self._drawn and bool(self._present()) and (not self._missing_strangers() or self._late())

    def draw(self) -> list[str]:
        """Draw the clients that the round asks from those present; returns their names."""
        chosen = self._plan.draw(self.number, self._present())
        for member in chosen:
            member.asked = True
        self._strangers = self._strangers and not self._late()
        self.due, self._drawn = None, True
        return [member.name for member in chosen]

    def ended(self) -> str:
        """Why the round is over; "" while it is not."""
        if not self._drawn:
            return ""
        asked = [member for member in self._members.values() if member.asked]
        waiting = [member for member in asked if not member.answered and not member.gone]
        answers = any(member.answered for member in asked)
        if answers and not waiting and not (self._missing_strangers() and not self._plan.samples):
            return "everybody has answered" if all(member.answered for member in asked) else "nobody else is there"
        return "the deadline" if self._late() and (answers or waiting) else ""

    def close(self) -> dict[str, str]:
        """Close the round; returns, for each client that was asked and did not deliver, the reason."""
        missing = {}
        for member in self.everyone():
            if member.asked and member.update is None:
                if not member.why:
                    member.gone = member.gone or "nothing came by the deadline"
                missing[member.name] = member.why or member.gone
        self._strangers = self._strangers and not self._late()
        return missing

    def left(self) -> float | None:
        """Seconds until the deadline; None where there is none, or it has passed."""
        return None if self.due is None or self._late() else self.due - self._clock()

    def all_told(self) -> bool:
        """Whether every client present has been told that the run is over."""
        return all(member.name in self.told for member in self._present() if member.seen)

    def status(self) -> list[dict[str, Any]]:
        """The status of each member, for display."""
        return [
            {name: getattr(member, name) for name in ("name", "state", "seen", "seconds", "up", "down", "refused")}
            for member in self.everyone()
        ]

    def _present(self) -> list[Member]:
        return [member for member in self.everyone() if not member.gone]

    def _missing_strangers(self) -> bool:
        return self._strangers and len(self._members) < self._plan.clients

    def _late(self) -> bool:
        return self.due is not None and self._clock() >= self.due
