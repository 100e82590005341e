"""One contender in one scenario, in a process of its own; started by bench.py.

It subscribes, prints ``ready``, then for each line ``n`` on standard input handles n messages
(or makes n requests) and prints the CPU seconds of this process and the seconds they took.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import time
from typing import Any

from benchmarks.contenders import handled


async def main(broker: str, name: str, scenario: str, address: str, url: str) -> None:
    """Run one contender of the module ``benchmarks.<broker>``."""
    contender = importlib.import_module(f"benchmarks.{broker}").CONTENDERS[name]

    def say(value: Any) -> None:
        print(json.dumps(value), flush=True)

    async with contender(url, scenario, address) as work:
        say("ready")
        while line := await asyncio.to_thread(sys.stdin.readline):
            n = int(line)
            handled.expect(n)
            say("go")
            cpu, wall = time.process_time(), time.perf_counter()
            if work is not None:
                await work(n)
            else:
                await handled.done.wait()
            say({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall})


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
