"""The demo: a shop's orders, from a file with broken lines, through topics, queues and requests, to sums that must add up.

    orders (topic) ─┬─ billing ──→ invoices (topic) ── mailing ──→ emails (queue) ── mail
                    └─ warehouse
    shipping (queue with a reply) ── quote

`make demo` runs it on memory://; `make demo URL=...` runs it on another broker, in two processes, of which one is killed.
The topics and their two groups are in `orders_topics.py`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from orders_ledger import Ledger, Report, Station
from orders_stage import Demo, Run, perform
from orders_topics import FILE, INVOICES, STATIONS, Invoice, feed, lines
from orders_topics import service as topics

from brokerkit import Broker, Message, Queue, Reject, RemoteError, RetryPolicy, Service

REMINDER = 1.0  # seconds; a week in real life


@dataclass
class Email:
    to: str
    subject: str


@dataclass
class Parcel:
    order: str
    country: str
    pieces: int


@dataclass
class Quote:
    carrier: str
    price: Decimal


EMAILS = Queue("emails", Email, lease=5)
SHIPPING = Queue("shipping", Parcel, reply=Quote, lease=5)


class MailServer:
    """Stands in for a mail server: some hosts are slow to accept, one is gone."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    async def send(self, message: Message[Email]) -> None:
        await asyncio.sleep(0.002)  # the network
        host = message.value.to.partition("@")[2]
        if host == "gone.example" or (host == "slow.example" and message.attempt == 1):
            raise TimeoutError(f"{host} did not answer")
        self.ledger.note("sent", id=message.id, published=message.timestamp.timestamp())


@asynccontextmanager
async def mail_server() -> AsyncIterator[MailServer]:
    yield MailServer(Run.here().ledger)


mailing = Service("mailing", lifespan=mail_server)


@mailing.subscribe(INVOICES, concurrency=4)
async def write(message: Message[Invoice], server: MailServer) -> None:
    """Write to the customer now, and once more later."""
    invoice = message.value
    receipt = Email(invoice.email, f"Thank you, {invoice.name}: {invoice.total} EUR for {invoice.order}")
    await message.publish(EMAILS, receipt, id=f"receipt-{invoice.order}")
    if invoice.reminder:
        reminder = Email(invoice.email, f"How do you like {invoice.order}?")
        await message.publish(EMAILS, reminder, id=f"reminder-{invoice.order}", delay=REMINDER)


@mailing.subscribe(EMAILS, concurrency=8, retry=RetryPolicy(attempts=3, wait_initial=0.2))
async def mail(message: Message[Email], server: MailServer) -> None:
    """Send an e-mail: a bad address is rejected at once, a silent host is tried again."""
    if "@" not in message.value.to:
        raise Reject(f"not an e-mail address: {message.value.to!r}")
    await server.send(message)


@mailing.subscribe(SHIPPING, concurrency=4)
def quote(message: Message[Parcel], server: MailServer) -> Quote:
    """Answer a request; a plain function runs in a thread."""
    if message.value.country == "AQ":
        raise Reject("no carrier goes there")
    return Quote("ACME", Decimal("4.90") + Decimal("1.10") * message.value.pieces)


def readable() -> dict[str, dict[str, Any]]:
    """Return the orders of the export that are JSON at least, by line, to tell what must come out."""
    orders: dict[str, dict[str, Any]] = {}
    for id, line in lines().items():
        with suppress(ValueError):
            order = json.loads(line)
            if isinstance(order, dict):
                orders[id] = order
    return orders


def parcels() -> list[Parcel]:
    """Return what the express orders would be sent as."""
    found: list[Parcel] = []
    for order in readable().values():
        with suppress(KeyError, TypeError):
            if order["express"]:
                found.append(Parcel(order["id"], order["country"], sum(item["quantity"] for item in order["items"])))
    return found


async def ask(broker: Broker, ledger: Ledger, parcel: Parcel) -> None:
    try:
        answer = await broker.request(SHIPPING, parcel, timeout=60)
        ledger.note("quoted", order=parcel.order, price=str(answer.price))
    except RemoteError as error:
        ledger.note("refused", order=parcel.order, country=parcel.country, reason=str(error))


async def shop(run: Run) -> None:
    """Play the shop: publish the export as it is, and ask what the express orders would cost to send."""
    async with run.connect() as broker:
        await asyncio.gather(feed(broker), *(ask(broker, run.ledger, parcel) for parcel in parcels()))


def invoices(ledger: Ledger) -> dict[str, str]:
    """Return the customer of each invoice that billing has written."""
    billed = {entry["id"] for entry in STATIONS[0].entries(ledger, "Handled")}
    return {f"invoice-{order['id']}": order["customer"] for id, order in readable().items() if id in billed}


def emails(ledger: Ledger) -> set[str]:
    """Return the e-mails that mailing has written."""
    written = {entry["id"] for entry in MAILING.entries(ledger, "Handled")}
    orders = [order for order in readable().values() if f"invoice-{order['id']}" in written]
    return {f"receipt-{order['id']}" for order in orders} | {
        f"reminder-{order['id']}" for order in orders if order["reminder"]
    }


MAILING = Station("mailing", INVOICES, "mailing", expected=lambda ledger: set(invoices(ledger)), keys=invoices)
MAIL = Station("emails", EMAILS, None, expected=emails)


def more(report: Report) -> None:
    """Print and check delays and requests."""
    ledger = report.ledger
    reminders = {id for id in emails(ledger) if id.startswith("reminder-")}
    came = [entry for entry in ledger.read("sent") if entry["id"] in reminders]
    sent = {entry["id"] for entry in came}
    died = {entry["id"] for entry in MAIL.entries(ledger, "DeadLettered")} & reminders
    earliest = min((entry["at"] - entry["published"] for entry in came), default=0)
    report.check(earliest >= REMINDER, f"a reminder was early: after {earliest:.3f} s")
    report.check(sent | died == reminders, f"{len(reminders)} reminders, {len(sent)} sent + {len(died)} dead")
    sums = f"{len(reminders):>4} ={len(sent):>4} sent    +{len(died):>3} dead letters"
    print(f"  {'  of which delayed by 1 s':<31}{sums}, none before {earliest:.3f} s")
    asked = len(parcels())
    quoted, refused = ledger.read("quoted"), ledger.read("refused")
    report.check(asked > 0, "nothing was asked")
    report.check(len(quoted) + len(refused) == asked, f"{asked} requests, {len(quoted)} + {len(refused)} replies")
    report.check({entry["country"] for entry in refused} == {"AQ"}, "a request was refused that has a carrier")
    why = ", ".join(sorted({entry["reason"].rpartition(": ")[2] for entry in refused}))
    print(f"  {'requests to queue shipping':<31}{asked:>4} ={len(quoted):>4} quoted  +{len(refused):>3} refused: {why}")


service = Service("orders")
service.include(topics)
service.include(mailing)

if __name__ == "__main__":
    title = f"A shop exports {len(lines())} orders to {FILE.name}, some of them broken; the service works on them."
    sys.exit(perform(Demo(title, service, shop, [*STATIONS, MAILING, MAIL], lines(), more, also=[SHIPPING])))
