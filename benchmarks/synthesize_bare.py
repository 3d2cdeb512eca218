"""What the machine allows in benchmarks.synthesize: aiohttp's client in a loop, which keeps nothing and limits nothing.

    python -m benchmarks.synthesize_bare URL PROMPTS IN_FLIGHT

It is started by benchmarks.synthesize.
"""

import asyncio
import json
import sys
from collections.abc import Iterator

import aiohttp
import uvloop


async def ask_all(url: str, prompts: int, in_flight: int) -> None:
    """Ask every prompt once, so many at a time."""
    left = iter(range(prompts))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(_ask(session, url, left) for _ in range(in_flight)))


async def _ask(session: aiohttp.ClientSession, url: str, left: Iterator[int]) -> None:
    for number in left:
        body = {"model": "gpt-4", "messages": [{"role": "user", "content": f"祝人{number}"}]}
        async with session.post(f"{url}/chat/completions", json=body) as answer:
            json.loads(await answer.read())


if __name__ == "__main__":
    uvloop.run(ask_all(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
