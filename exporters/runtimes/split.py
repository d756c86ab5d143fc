"""A denoiser in parts as one session: what the prompt and the time decide is computed once. Loads no torch."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from exporters.graphs.reading import check_parts
from exporters.layout import GRAPH, PROMPT, STEP, TIME, parts_of
from exporters.registry import Runtime
from exporters.runtimes.session import Session, Shape
from slimdiff.errors import InputError

HELD = {PROMPT: 2, TIME: 128}
"""Answers that are kept: of prompts, what a pipeline alternates between; of times, the steps of a long schedule."""


def open_parts(row: Runtime, path: Path, threads: int | None = None) -> Session:
    """Open what a runtime takes, or the parts of a denoiser in its folder, unchecked; see `open_session`."""
    load, parts = row.load(), parts_of(path)
    if not parts:
        return load(path, threads, **row.options)
    places = {part: folder / GRAPH if row.takes == "graph" else folder for part, folder in parts.items()}
    return SplitSession({part: load(at, threads, **row.options) for part, at in places.items()}, str(path))


class SplitSession:
    """A `Session` that takes what the whole graph takes.

    The step's graph runs at every call, the others when their inputs have other values than in the last calls. Values
    are compared, byte by byte: they are small beside what is computed from them, and nothing else tells that a tensor
    was changed in place.

    Args:
        parts: sessions by part, as `exporters.graphs.split` cuts them.
        source: their folder.

    Raises:
        InputError: if they do not go together.
    """

    def __init__(self, parts: Mapping[str, Session], source: str):
        check_parts({part: (session.inputs, session.outputs) for part, session in parts.items()}, source)
        self._held: dict[str, OrderedDict[object, dict[str, np.ndarray]]] = {
            part: OrderedDict() for part in parts if part != STEP
        }
        self._take(parts, source)

    def with_step(self, step: Session) -> SplitSession:
        """Another session on the same parts of prompt and time, which run once for both: of a step's graph that takes
        some of what they give.

        Raises:
            InputError: if it takes what they do not give.
        """
        given = {name for part, session in self.parts.items() if part != STEP for name in session.outputs}
        if odd := sorted(name for name in step.inputs if "." in name and name not in given):
            raise InputError(f"nothing in {self.source} gives {odd[0]} to {step.source}: export the model again")
        other = copy.copy(self)
        other._take({**self.parts, STEP: step}, step.source)
        return other

    def _take(self, parts: Mapping[str, Session], source: str) -> None:
        self.parts, self.source = dict(parts), source
        step = self.parts[STEP]
        self.runtime, self.outputs = step.runtime, step.outputs
        self.precision = next((s.precision for s in self.parts.values() if s.precision != "fp32"), "fp32")
        self._others = {part: session for part, session in self.parts.items() if part != STEP}
        given = {name for session in self._others.values() for name in session.outputs}
        takes: dict[str, Shape] = {}
        self.dtypes = {name: step.dtypes[name] for name in step.outputs}
        for session in (step, *reversed(self._others.values())):  # the time before the prompt, as in the whole graph
            takes |= {name: shape for name, shape in session.inputs.items() if name not in given}
            self.dtypes |= {name: dtype for name, dtype in session.dtypes.items() if name in takes}
        self.inputs: dict[str, Shape] = takes | {"timestep": ()}

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Session`."""
        values = dict(feed)
        for part in self._others:
            values |= self.answer(part, feed)
        return self.parts[STEP].run(self.inputs_of(STEP, values))

    def inputs_of(self, part: str, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What a part takes of the inputs of a call, and of what the other parts gave: a time for each sample."""
        own = {name: values[name] for name in self.parts[part].inputs}
        return own | {name: np.full(len(values["sample"]), time) for name, time in own.items() if name == "timestep"}

    def answer(self, part: str, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the part of the prompt, or of the time, gives for a call's inputs: computed, or kept from before."""
        session, held = self.parts[part], self._held[part]
        own = self.inputs_of(part, feed)
        key = tuple((name, array.shape, array.dtype.str, array.tobytes()) for name, array in own.items())
        if key not in held:
            while len(held) >= HELD[part]:
                held.popitem(last=False)
            held[key] = session.run(own)
        held.move_to_end(key)
        return held[key]
