"""Who makes what is private: this machine and process, in the name of everything that is not finished."""

from __future__ import annotations

import os
import socket


def machine() -> str:
    """This machine's name; containers that share a host's name but not its process numbers count as other machines."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return socket.gethostname()
    # 4026531836 (0xEFFFFFFC) is the number of every Linux machine's own process space
    return socket.gethostname() if space == 4026531836 else f"{socket.gethostname()}.{space}"


def owner() -> str:
    """This process as `machine-pid`; part of the name of everything private, so that orphans can be told."""
    return f"{machine()}-{os.getpid()}"
