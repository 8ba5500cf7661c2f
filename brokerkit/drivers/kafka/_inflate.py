"""Record batches that are compressed: taken out of that with a limit, which aiokafka's reader has not.

A megabyte can inflate to a gigabyte, and whoever may write to a topic would end each process that reads it, again and again.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any, Final

from ...errors import BrokerError, ConfigError, TooLarge

LARGEST: Final = 256 * 1024 * 1024
"""Bytes of one batch."""
_HEAD: Final = 61
"""Bytes of a batch before its records."""
_LENGTH: Final = struct.Struct(">i")
_LENGTH_AT: Final = 8
_BEFORE: Final = 12
_ATTRIBUTES: Final = struct.Struct(">h")
_ATTRIBUTES_AT: Final = 21
_CODEC: Final = 7
_XERIAL: Final = b"\x82SNAPPY\0"
"""What Java's streams of snappy begin with: blocks follow, each with its size."""
_XERIAL_HEAD: Final = 16


class _Full(Exception):
    """There is more than may come out."""


def inflated(batch: memoryview, what: str, *, most: int = LARGEST) -> memoryview:
    """Return *batch* without compression; *what* names it in texts.  The checksum of the result is not right.

    Raises:
        TooLarge: it is larger than *most* bytes then.
        ConfigError: cramjam is not installed, which compressions other than gzip need.
        BrokerError: it is damaged.
    """
    (attributes,) = _ATTRIBUTES.unpack_from(batch, _ATTRIBUTES_AT)
    codec = attributes & _CODEC
    if not codec:
        return batch
    name, inflate = _CODECS.get(codec, ("", None))
    if inflate is None:
        raise BrokerError(f"{what} is compressed in a way that nobody knows ({codec})")
    out = bytearray(_HEAD)
    out[:] = batch[:_HEAD]
    try:
        inflate(batch[_HEAD:], out, most)
    except _Full:
        raise TooLarge(f"{what} inflates to more than {most} bytes by {name}") from None
    except ModuleNotFoundError as error:
        raise ConfigError(f"{what} is compressed by {name}: pip install 'brokerkit[kafka]'") from error
    except Exception as error:
        raise BrokerError(f"{what} cannot be inflated by {name}: {type(error).__name__}: {error}") from error
    _LENGTH.pack_into(out, _LENGTH_AT, len(out) - _BEFORE)
    _ATTRIBUTES.pack_into(out, _ATTRIBUTES_AT, attributes & ~_CODEC)
    return memoryview(out)


def _gzip(data: memoryview, out: bytearray, most: int) -> None:
    rest: Any = data
    while rest:
        stream = zlib.decompressobj(31)
        out += stream.decompress(rest, most - len(out) + 1)
        if len(out) > most:
            raise _Full
        if not stream.eof:
            raise ValueError("it is cut off")
        rest = stream.unused_data


def _snappy(data: memoryview, out: bytearray, most: int) -> None:
    from cramjam import snappy  # pyright: ignore[reportMissingModuleSource]

    if bytes(data[: len(_XERIAL)]) != _XERIAL:
        _snappy_block(snappy, data, out, most)
        return
    at = _XERIAL_HEAD
    while at < len(data):
        (size,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if not 0 < size <= len(data) - at:
            raise ValueError("a block's size makes no sense")
        _snappy_block(snappy, data[at : at + size], out, most)
        at += size


def _snappy_block(snappy: Any, data: memoryview, out: bytearray, most: int) -> None:
    block = bytes(data)
    size: int = snappy.decompress_raw_len(block)
    if size > most - len(out):
        raise _Full
    out += bytes(snappy.decompress_raw(block))


def _lz4(data: memoryview, out: bytearray, most: int) -> None:
    from cramjam import lz4  # pyright: ignore[reportMissingModuleSource]

    _by_trying(lz4, data, out, most)


def _zstd(data: memoryview, out: bytearray, most: int) -> None:
    from cramjam import zstd  # pyright: ignore[reportMissingModuleSource]

    _by_trying(zstd, data, out, most)


def _by_trying(codec: Any, data: memoryview, out: bytearray, most: int) -> None:
    """Inflate into more and more room: neither of these formats has to say how much it needs."""
    packed = bytes(data)
    room = min(most - len(out), max(65536, 8 * len(packed)))
    while True:
        place = bytearray(room)
        try:
            size: int = codec.decompress_into(packed, place)
        except Exception as error:
            if "whole buffer" not in str(error):
                raise
            if room >= most - len(out):
                raise _Full from None
            room = min(most - len(out), 8 * room)
        else:
            out += memoryview(place)[:size]
            return


_CODECS: Final[dict[int, tuple[str, Callable[[memoryview, bytearray, int], None]]]] = {
    1: ("gzip", _gzip),
    2: ("snappy", _snappy),
    3: ("lz4", _lz4),
    4: ("zstd", _zstd),
}
