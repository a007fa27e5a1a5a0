"""How redis-py's blocking connections of ours write commands: by hiredis, with numbers made text before it.

hiredis-py (3.5) ends the process with SIGSEGV where a signal's handler raises while it writes a number, as Ctrl-C does:
`pack_command` does not look whether `str()` of it has failed. Text takes another way there.
"""

from __future__ import annotations

from typing import Any

from redis.connection import HiredisRespSerializer

__all__ = ["Packer"]


class Packer(HiredisRespSerializer):
    """For `command_packer` of `redis.Redis`."""

    def pack(self, *args: Any) -> list[bytes]:
        words: list[Any] = [str(each) if type(each) in (int, float) else each for each in args]
        return super().pack(*words)  # type: ignore[no-any-return]  # redis-py names no type
