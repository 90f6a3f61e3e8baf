"""What parsers find, and what they have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class Thought:
    text: str


@dataclass(frozen=True)
class Call:
    """A call of a tool begins; its arguments follow."""

    index: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """More of a call's arguments, which are JSON."""

    index: int
    text: str


Event = Content | Thought | Call | Arguments


class Parser(Protocol):
    """Takes a text piece by piece. However it is cut, the events come to the same."""

    def feed(self, text: str) -> list[Event]:
        """What is certain now."""
        ...

    def finish(self) -> list[Event]:
        """What was held back. Nothing comes after it."""
        ...


class Tag:
    """Looks for a tag in a text that comes in pieces."""

    def __init__(self, tag: str):
        self.tag, self.held = tag, ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """What is before the tag, and what after it: None if it has not come. What may be its beginning is held."""
        text = self.held + text
        before, found, after = text.partition(self.tag)
        if found:
            self.held = ""
            return before, after
        keep = next((n for n in range(min(len(self.tag) - 1, len(text)), 0, -1) if text.endswith(self.tag[:n])), 0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def finish(self) -> str:
        held, self.held = self.held, ""
        return held


def joined(events: list[Event]) -> list[Event]:
    """Neighbours of one kind as one; without empty ones."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, Call):
            result.append(event)
        elif not event.text:
            continue
        elif type(last) is type(event) and getattr(last, "index", None) == getattr(event, "index", None):
            kind = (event.index,) if isinstance(event, Arguments) else ()
            result[-1] = type(event)(*kind, last.text + event.text)
        else:
            result.append(event)
    return result
