"""The same work here, one job after the other, or on Ray, wherever the cluster has room."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from slimdiff.errors import InputError, SlimdiffError, require
from slimdiff.progress import bar

J = TypeVar("J")
R = TypeVar("R")
CONNECT_SECONDS = 5.0


def run_here(function: Callable[[J], R], jobs: Sequence[J]) -> Iterator[R | SlimdiffError]:
    """A function's result for every job, or the error that it raised, in the order of the jobs."""
    for job in jobs:
        try:
            yield function(job)
        except SlimdiffError as error:
            yield error


def run_on_ray(function: Callable[[J], R], jobs: Sequence[J], address: str) -> list[R | SlimdiffError]:
    """The same, each job as a task of Ray that takes one of the cluster's cores; returns when all are done.

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

    def result(task: Any) -> R | SlimdiffError:
        try:
            return ray.get(task)
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, SlimdiffError):
                raise
            return error.cause

    try:
        tasks = [ray.remote(max_retries=0)(function).remote(job) for job in jobs]
        return [result(task) for task in bar(tasks, name="cells", unit="cell")]
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
