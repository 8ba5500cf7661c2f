"""Live broadcast: every running copy of a service hears every message.  Start this twice, then run `broadcast_sender.py`.

    python examples/broadcast_replica.py [URL]

A copy hears what is published while it runs, and leaves nothing behind on the broker.  With `start=Start.EARLIEST` it would
first hear all that the topic still has.  Ctrl-C or SIGTERM ends it.
"""

import logging
import os
import sys
from dataclasses import dataclass

import brokerkit
from brokerkit import EVERY_REPLICA, Message, Service, Topic


@dataclass
class Switch:
    name: str
    on: bool


SWITCHES = Topic("switches", Switch)  # the sender imports it from here
service = Service("shop")
turned_on: set[str] = set()


@service.subscribe(SWITCHES, group=EVERY_REPLICA)
async def turn(message: Message[Switch]) -> None:
    switch = message.value
    if switch.on:
        turned_on.add(switch.name)
    else:
        turned_on.discard(switch.name)
    print(f"replica {os.getpid()}: on are {', '.join(sorted(turned_on)) or 'none'}", flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)  # tells of start and stop
    url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("BROKERKIT_URL", "redis://localhost:6379/0")
    brokerkit.run(service, url)
