"""Very many streaming clients at once, a third of which leave whenever they like."""

import asyncio
import json
import random
from urllib.parse import urlsplit

import pytest
from servers import serving, settled

from jaxllm import SamplingParams


def request(i: int) -> dict:
    return {"prompt": f"Story {i % 7}: {'once ' * (i % 5)}", "seed": i, "temperature": 1.0, "max_tokens": 4 + i % 29}


async def follow(where: str, i: int, leave_after: int | None) -> dict | None:
    """What client i reads to the end; None if it leaves after so many pieces."""
    url = urlsplit(where)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    try:
        body = json.dumps(request(i) | {"model": "tiny", "stream": True, "stream_options": {"include_usage": True}}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
        text, reasons, usage, pieces, done = "", [], None, 0, 0
        assert b" 200 " in await reader.readline()
        if leave_after == 0:
            return None
        async for line in reader:
            if not line.startswith(b"data:"):
                continue
            if line[5:].strip() == b"[DONE]":
                done += 1
                continue
            event = json.loads(line[5:])
            assert "error" not in event and not done, event
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                text += choice["text"]
                reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
            pieces += 1
            if pieces == leave_after:
                return None
        assert done == 1
        return {"text": text, "reasons": reasons, "tokens": usage["completion_tokens"]}
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("clients", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_nothing_is_lost_doubled_or_leaked(llm, clients):
    rng = random.Random(clients)
    leave = {i: rng.randint(0, 12) for i in rng.sample(range(clients), clients // 3)}

    async def alone(i):
        asked = request(i)
        outputs = [o async for o in llm.generate(asked.pop("prompt"), SamplingParams(**asked))]
        last = outputs[-1].outputs[0]
        return {"text": last.text, "reasons": [last.finish_reason], "tokens": len(last.token_ids)}

    async def all_of(each):
        return await asyncio.gather(*(each(i) for i in range(clients)))

    expected = asyncio.run(all_of(alone))
    with serving(llm, max_pending=clients) as (where, _):
        read = asyncio.run(all_of(lambda i: follow(where, i, leave.get(i))))
        settled(llm)
        assert asyncio.run(follow(where, 1, None)) == expected[1]  # and it still serves
    left = [i for i in range(clients) if read[i] is None]
    assert set(left) <= set(leave) and len(left) > clients // 6  # some had ended before they could leave
    assert [read[i] for i in range(clients) if i not in left] == [expected[i] for i in range(clients) if i not in left]
