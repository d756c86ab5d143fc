"""Jobs on Ray, wherever the cluster has room."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from slimdiff.errors import InputError, require
from slimdiff.progress import bar

J = TypeVar("J")
R = TypeVar("R")
CONNECT_SECONDS = 5.0


def run_on_ray(function: Callable[[J], R], jobs: Sequence[J], address: str) -> list[R]:
    """A function's result for every job, each a task of Ray that takes one of the cluster's cores.

    Args:
        function: at the top level of a module that the cluster's machines have, too.
        jobs: picklable; files that they name must be where the machines see them.
        address: of a cluster, as `ray.init` takes it, or `local` to start one on this machine.

    Raises:
        MissingPackageError: if ray is not installed.
        InputError: if there is no cluster at the address.
    """
    ray: Any = require("ray", "ray")
    check_reachable(address)
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"--ray {address}: {' '.join(str(error).split())}") from error
    try:
        tasks = [ray.remote(max_retries=0)(function).remote(job) for job in jobs]
        return [ray.get(task) for task in bar(tasks, name="cells", unit="cell")]
    finally:
        ray.shutdown()


def check_reachable(address: str) -> None:
    """Refuse an address where nothing listens: Ray would wait for it for minutes.

    Args:
        address: `HOST:PORT` or `ray://HOST:PORT`; others, which Ray looks up itself, pass.

    Raises:
        InputError: if there is no answer within `CONNECT_SECONDS`.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS):
            pass
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--ray {address}: nothing answers there ({error}): name a cluster, or leave out the address"
        ) from None
