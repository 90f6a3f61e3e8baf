"""JSON schemas drawn at random, for `bench structured`: whatever is generated under one ends before long."""

import random
from typing import Any


def draw_schemas(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """So many, all different; those of one seed begin alike."""
    rng, drawn = random.Random(seed), []
    while len(drawn) < number:
        schema = _object(rng, depth=2)
        if schema not in drawn:
            drawn.append(schema)
    return drawn


def endless() -> dict[str, Any]:
    """What is generated under it is cut off: for time a token."""
    item = {"type": "object", "properties": {"id": {"type": "integer"}, "name": {"type": "string", "maxLength": 20}}}
    return {"type": "array", "minItems": 10_000, "items": item | {"required": ["id", "name"], "additionalProperties": False}}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(["id", "name", "kind", "tags", "price", "when", "ok", "owner", "items", "note"], rng.randint(1, 5))
    required = [name for name in names if rng.random() < 0.7]
    properties = {name: _value(rng, depth) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(-50, 50)
    simple = [
        lambda: {"type": "string", "maxLength": rng.randint(1, 12)},
        lambda: {"type": "string", "pattern": rng.choice(["^[a-z]{1,8}$", "^[A-Z]{2}-[0-9]{4}$", "^(red|green|blue)+$", "^#[0-9a-f]{6}$"])},
        lambda: {"type": "string", "format": rng.choice(["date", "time", "uuid"])},
        lambda: {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 1000)},
        lambda: {"type": "boolean"},
        lambda: {"enum": rng.sample(["a", "b c", 1, -2.5, None, True, "ü", '"'], rng.randint(1, 4))},
        lambda: {"const": rng.choice(["fixed", 7, None])},
    ]
    nested = [
        lambda: _object(rng, depth - 1),
        lambda: {"type": "array", "items": _value(rng, depth - 1), "minItems": rng.randint(0, 2), "maxItems": rng.randint(2, 4)},
        lambda: {"anyOf": [_value(rng, depth - 1), {"type": "null"}]},
    ]
    return rng.choice(simple + nested if depth else simple)()
