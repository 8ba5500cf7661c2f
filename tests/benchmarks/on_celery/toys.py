"""Programs that misbehave, for the tests of the harness."""

from __future__ import annotations

from collections.abc import Iterator

from .rows import OurKafka, OurRedis, Program, StockKafka, StockRedis


class _Loses(Program):
    """Never publishes number 7."""

    def numbers(self) -> Iterator[int]:
        return (number for number in super().numbers() if number != 7)


class _Doubles(Program):
    """Publishes number 7 twice."""

    def numbers(self) -> Iterator[int]:
        for number in super().numbers():
            yield number
            if number == 7:
                yield number


class _Keeps(Program):
    """Publishes number 8 in place of number 7: the count alone is right."""

    def numbers(self) -> Iterator[int]:
        return (8 if number == 7 else number for number in super().numbers())


class _Leaves(Program):
    """Publishes one more when its worker is gone."""

    async def execute(self) -> None:
        await super().execute()
        self.task().delay(0)


class StockRedisKeeps(_Keeps, StockRedis): ...


class StockRedisLeaves(_Leaves, StockRedis): ...


class StockKafkaDoubles(_Doubles, StockKafka): ...


class OurRedisLoses(_Loses, OurRedis): ...


class OurRedisDoubles(_Doubles, OurRedis): ...


class OurRedisLeaves(_Leaves, OurRedis): ...


class OurKafkaKeeps(_Keeps, OurKafka): ...
