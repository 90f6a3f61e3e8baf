"""Parsers of calls and thoughts: the same events however a text is cut, and nothing of a text is lost."""

import json
import random

import pytest

from jaxllm.server.tools import PARSERS, Arguments, Call, Content, Reasoning, Required, Thought, guess_parser
from jaxllm.server.tools.events import joined

CITY = '{"city": "Z\\u00fcrich \\"{x}\\"", "days": [1, {"a": 2}]}'
WEATHER = f'{{"name": "weather", "arguments": {CITY}}}'
ONE = (("weather", CITY),)
TWO = (("weather", CITY), ("now", "{}"))
CASES = {
    "hermes": [
        ("Just text, 1 < 2 <tool.", "Just text, 1 < 2 <tool.", ()),
        (f'Let me see.\n<tool_call>\n{{"name": "weather", "arguments": {CITY}}}\n</tool_call>', "Let me see.", ONE),
        (f"<tool_call>{WEATHER}</tool_call>\n<tool_call>{{\"arguments\": {{}}, \"name\": \"now\"}}</tool_call>", "", TWO),
        (f'<tool_call>{{"name": "weather", "arguments": {json.dumps(CITY)}}}</tool_call>', "", ONE),
        ("a <tool_call> not json </tool_call>", "a", ()),
    ],
    "llama3_json": [
        ("I cannot {say}.", "I cannot {say}.", ()),
        (f'{{"name": "weather", "parameters": {CITY}}}', "", ONE),
        (f'<|python_tag|>{{"name": "weather", "parameters": {CITY}}}; {{"name": "now", "parameters": {{}}}}', "", TWO),
        ('{"type": "function", "name": "now", "parameters": {}}', "", (("now", "{}"),)),
        ('{"answer": 42}', '{"answer": 42}', ()),
        ("<|pyth", "<|pyth", ()),
    ],
    "mistral": [
        ("No [TOOL] here", "No [TOOL] here", ()),
        (f'[TOOL_CALLS][{{"name": "weather", "arguments": {CITY}}}, {{"name": "now", "arguments": {{}}}}]', "", TWO),
        (f"[TOOL_CALLS]weather{CITY}[TOOL_CALLS]now{{}}", "", TWO),
        (f"[TOOL_CALLS]weather[ARGS]{CITY}", "", ONE),
    ],
    "pythonic": [
        ("Hello [not] a call", "Hello [not] a call", ()),
        ("[1, 2]", "[1, 2]", ()),
        ("[now(), weather(city='x', n=-1.5, deep={'a': [True, None]})]", "",
         (("now", "{}"), ("weather", '{"city": "x", "n": -1.5, "deep": {"a": [true, null]}}'))),
        ("```tool_code\n[a.b(x=1)]\n```", "", (("a.b", '{"x": 1}'),)),
        ("[__import__('os').system('x')]", "[__import__('os').system('x')]", ()),
        ("[f(x=1", "[f(x=1", ()),
    ],
}  # fmt: skip
FLAT = [(name, *case) for name, cases in CASES.items() for case in cases]


def pieces(text, rng):
    while text:
        size = rng.randint(1, 7)
        yield text[:size]
        text = text[size:]


def events(parser, parts):
    found = []
    for part in parts:
        found += parser.feed(part)
    return joined(found + parser.finish())


def read(found):
    """Content, and (name, arguments) of the calls in their order."""
    content = "".join(event.text for event in found if isinstance(event, Content))
    names = {event.index: event.name for event in found if isinstance(event, Call)}
    texts = {i: "".join(event.text for event in found if isinstance(event, Arguments) and event.index == i) for i in names}
    assert list(names) == list(range(len(names)))
    assert all(
        isinstance(e, Content | Call) or any(isinstance(b, Call) and b.index == e.index for b in found[:i]) for i, e in enumerate(found)
    )
    return content, tuple((names[i], texts[i]) for i in names)


@pytest.mark.parametrize("name, text, content, calls", FLAT, ids=range(len(FLAT)))
def test_calls_however_they_are_cut(name, text, content, calls):
    rng = random.Random(0)
    cuts = [[text], list(text), *(list(pieces(text, rng)) for _ in range(20))]
    for cut in cuts:
        found = read(events(PARSERS[name](), cut))
        assert found == (content, calls), cut
    [json.loads(arguments) for _, arguments in calls]


def test_arguments_are_told_before_the_call_is_complete():
    for name, begin in (("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1'), ("mistral", '[TOOL_CALLS]f{"a": 1')):
        found = joined(PARSERS[name]().feed(begin))
        assert found == [Call(0, "f"), Arguments(0, '{"a": 1')]


def test_required_and_named():
    text = f'[{{"name": "weather", "parameters": {CITY}}}, {{"name": "now", "parameters": {{}}}}]'
    for cut in ([text], list(text)):
        assert read(events(Required(), cut)) == ("", TWO)
        assert read(events(Required("weather"), list(CITY))) == ("", ONE)


@pytest.mark.parametrize(
    "text, inside, thought, content",
    [
        ("<think>\nWhy not.\n\n</think>\n\nBecause.\n", False, "Why not.", "Because.\n"),
        ("Why not.\n</think>Because.", True, "Why not.", "Because."),
        ("  <think>a</think> b", False, "a", " b"),
        ("No thoughts <think>x</think>", False, "", "No thoughts <think>x</think>"),
        (" \n<thin air", False, "", " \n<thin air"),
        ("<think>cut off </thi", False, "cut off </thi", ""),
        ("<think></think>\nx", False, "", "x"),
        ("  ", False, "", "  "),
    ],
)
def test_thoughts(text, inside, thought, content):
    rng = random.Random(1)
    for cut in [[text], list(text), *(list(pieces(text, rng)) for _ in range(20))]:
        found = events(Reasoning(inside=inside), cut)
        assert "".join(e.text for e in found if isinstance(e, Thought)) == thought, cut
        assert "".join(e.text for e in found if isinstance(e, Content)) == content, cut


def test_templates_tell_their_parser():
    assert guess_parser("... <tool_call> ...") == "hermes" and guess_parser("[TOOL_CALLS]") == "mistral"
    assert guess_parser("nothing") is None and guess_parser(None) is None
