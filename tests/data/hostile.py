"""What happens in a reading process when a decoder goes wrong: a file of its own, to be imported there."""

from __future__ import annotations

import ctypes
import time

from counterpoise.data.media import read_row


def hostile(raw_uri, media, limits):
    """In a reading process: what `read_row` becomes when a decoder goes wrong."""
    path = media["sound"].path
    if path == "train1.wav":
        ctypes.string_at(0)  # a segmentation fault
    if path == "train3.wav":
        time.sleep(60)
    if path == "train5.wav":
        raise AttributeError("a bug in a decoder")
    if path == "train7.wav":
        bytearray(8 * 2**30)
    return read_row(raw_uri, media, limits)
