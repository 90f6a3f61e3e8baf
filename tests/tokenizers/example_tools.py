"""Functions given to chat templates as tools. Both the tests and the script that makes the goldens import this file."""

from enum import Enum
from typing import Any, Literal


class Unit(Enum):
    CELSIUS = "celsius"
    FAHRENHEIT = "fahrenheit"


def get_weather(city: str, unit: Unit, days: int = 1) -> str:
    """Get the weather forecast of a city.

    Args:
        city: The city, with its country:
            for example "Paris, France".
        unit: The unit of temperature
        days: How many days ahead
    """
    return f"{city} {unit} {days}"


def search(query: str, sites: list[str] | None = None, limits: dict[str, int | float] = {}, mode: Literal["fast", 2] = "fast") -> dict:  # noqa: B006
    """
    Search the web, or "nothing" at all: both work.

    More words about it.

    Args:
        query: What to look for (choices: ["tea", "coffee"])
        sites: Where to look
        limits: Numbers by name
        mode: How to look

    Returns:
        A dictionary of results
        by title.

    Raises:
        ValueError: never
    """
    return {"query": query, "sites": sites, "limits": limits, "mode": mode}


def move(point: tuple[float, float], by: int | str | list[int], anything: Any, *, silent: bool = False):
    """Move a point.

    Args:
        point: The point
        by: How far, écrit 漢字
        anything: Whatever
        silent: Say nothing
    """


TOOLS = [get_weather, search, move]
