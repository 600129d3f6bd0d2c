"""The settings of machines. Part of the schema, see `schema.py`."""

from __future__ import annotations

from typing import Any

from mhim.configs.base import Settings, speed


class ClusterConfig(Settings):
    """Where items run. Nothing here changes a result."""

    backend: str = speed(
        "local",
        "local, slurm or dask: a file name in pipeline/backends/, or your own: my_module, ./mine.py or ./mine.py:object",
    )
    workers: int = speed(0, "parallel processes; 0 is one per core", ge=0)
    backend_params: dict[str, Any] = speed(
        {}, "settings of the back end itself (partition, account, walltime, container ...)"
    )
    lease_s: float = speed(300.0, "a claim without heartbeat for so long is taken over, s", gt=0)
