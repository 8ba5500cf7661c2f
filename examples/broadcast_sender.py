"""Turns switches on and off for every `broadcast_replica.py` that runs, and listens itself without being a service.

    python examples/broadcast_sender.py [URL]

Prints:

    dark-mode is on
    new-cart is on
    dark-mode is off
"""

import asyncio
import os
import sys

from broadcast_replica import SWITCHES, Switch

from brokerkit import connect


async def main(url: str) -> None:
    async with connect(url) as broker, broker.subscribe(SWITCHES) as messages:  # no group: from now on, for us alone
        for switch in (Switch("dark-mode", on=True), Switch("new-cart", on=True), Switch("dark-mode", on=False)):
            await broker.publish(SWITCHES, switch, key=switch.name)  # in order for each key
            [message] = await messages.receive(timeout=10)
            print(message.value.name, "is", "on" if message.value.on else "off")


if __name__ == "__main__":
    url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("BROKERKIT_URL", "redis://localhost:6379/0")
    asyncio.run(main(url))
