"""The same work here, one job after the other, or on Ray, wherever the cluster has room."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from slimdiff.errors import InputError, SlimdiffError, require

J = TypeVar("J")
R = TypeVar("R")
LOCAL = "local"
CONNECT_SECONDS = 5.0


def run_here(function: Callable[[J], R], jobs: Sequence[J]) -> Iterator[R | SlimdiffError]:
    """Run a function on every job; what it gives, or the error that it raised, in the order of the jobs."""
    for job in jobs:
        try:
            yield function(job)
        except SlimdiffError as error:
            yield error


def run_on_ray(
    function: Callable[[J], R], jobs: Sequence[J], address: str, progress: str
) -> Iterator[R | SlimdiffError]:
    """Likewise, each job as a task of Ray that takes one of the cluster's cores.

    Args:
        function: at the top level of a module that the cluster's machines have, too.
        jobs: what can be pickled; files that they name must be where the machines see them.
        address: of a cluster, as `ray.init` takes it, or `local` to start one on this machine.
        progress: name of the progress bar on stderr.

    Raises:
        MissingPackageError: if ray is not here.
        InputError: if there is no cluster at the address.
    """
    ray: Any = require("ray", "ray")
    check_reachable(address)
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"--ray {address}: {' '.join(str(error).split())}") from error
    try:
        task = ray.remote(max_retries=0)(function)
        waiting = [task.remote(job) for job in jobs]
        with tqdm(total=len(waiting), desc=progress, unit="cell") as bar:
            left = list(waiting)
            while left:
                ready, left = ray.wait(left, num_returns=1)
                bar.update(len(ready))
        for reference in waiting:
            try:
                yield ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, SlimdiffError):
                    raise
                yield error.cause
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
