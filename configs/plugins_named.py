"""`--allow-plugin my.module` or `./mine.py`, wherever it stands in a command: other code that it may import.

In: the arguments of a command. Out: the same without these, their modules allowed; what an earlier command in this
process allowed is forgotten. Knows no verb: every one of them takes the option.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from mhim.configs import trust

FLAG = "--allow-plugin"


def taken_out(args: Sequence[str]) -> list[str]:
    """The arguments without `--allow-plugin NAME` and `--allow-plugin=NAME`, whose names are allowed from here on.

    Raises ConfigError for a name that no plug-in can have."""
    trust.adopt(trust.Trust())
    kept: list[str] = []
    waiting = iter(args)
    for arg in waiting:
        if arg == FLAG or arg.startswith(f"{FLAG}="):
            allow(arg.partition("=")[2] if "=" in arg else next(waiting, ""))
        else:
            kept.append(arg)
        if arg == "--":
            return [*kept, *waiting]
    return kept


def allow(name: str) -> None:
    """Allow one module, by its name or its file. Raises ConfigError, or LookupFailed for a file that cannot be one."""
    from mhim.configs import named  # with it comes the schema, which `pipeline --help` does without
    from mhim.configs.load import ConfigError

    name = named.typed(name)
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
        raise ConfigError(f"{FLAG} {name!r}: give a module or its file, for example {FLAG} my_module, {FLAG} ./mine.py")
    if name.partition(".")[0] in sys.stdlib_module_names:
        raise ConfigError(f"{FLAG} {name}: that is part of Python itself and no plug-in")
    trust.allow(name)


def flags() -> list[str]:
    """The options that allow in another process what is allowed in this one."""
    current = trust.current()
    remote = ["--set", f"extract.encoder_params.{trust.REMOTE_CODE}=true"] if current.remote_code else []
    files = dict(current.files)
    named_by_file = [files[name] for name in sorted(files)]
    others = sorted(current.names - files.keys())
    return [*(part for name in (*named_by_file, *others) for part in (FLAG, name)), *remote]
