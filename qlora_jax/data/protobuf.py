"""Protobuf's wire format, as much of it as a SentencePiece model takes to write.

A message is its fields one after another, each a tag (number and kind) and a value. So it is
extended by appending: of a repeated field that is one more entry, of any other a later value that
wins over an earlier one.
"""

import struct


def varint(value: int) -> bytes:
    """An integer: seven bits to a byte, the lowest first; the last has no high bit."""
    value &= 2**64 - 1
    encoded = b""
    while value > 127:
        encoded += bytes([value & 127 | 128])
        value >>= 7
    return encoded + bytes([value])


def integer(field: int, value: int) -> bytes:
    """A field that holds an integer, an enumeration's value or a truth value."""
    return varint(field << 3) + varint(value)


def delimited(field: int, content: bytes) -> bytes:
    """A field that holds a text, bytes or a message."""
    return varint(field << 3 | 2) + varint(len(content)) + content


def float32(field: int, value: float) -> bytes:
    """A field that holds a float."""
    return varint(field << 3 | 5) + struct.pack("<f", value)
