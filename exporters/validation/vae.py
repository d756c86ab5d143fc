"""Whether a VAE's graphs compute what it does, on the latents and images of a real trajectory; and what overflows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

from exporters.graphs.vae import HALVES
from exporters.runtimes.module import RuntimeModule, answer
from exporters.runtimes.tiles import smaller
from exporters.runtimes.vae import VAE
from exporters.validation.fragments import OnnxFragments
from exporters.validation.graph import check_graph
from exporters.validation.parity import Precision, check_calls
from slimdiff.denoising.trajectory import Call, predict

_TAKES = {"vae_decoder": "latent_sample", "vae_encoder": "sample"}


@contextmanager
def watch_vae(vae: Any) -> Iterator[dict[str, Call]]:
    """Note what a pipeline's VAE in torch is first given to decode, and to encode: one sample of each, by half.

    Nothing is noted of a VAE in a runtime, or where there is none.
    """
    seen: dict[str, Call] = {}

    def watched(name: str, method: Any) -> Any:
        @wraps(method)
        def noting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.setdefault(name, Call(0, 0, {_TAKES[name]: tensor[:1].detach().float().cpu()}))
            return method(tensor, *args, **kwargs)

        return noting

    with ExitStack() as patched:
        if isinstance(vae, nn.Module) and not isinstance(vae, RuntimeModule):
            for name, method in (("vae_decoder", "decode"), ("vae_encoder", "encode")):
                patched.enter_context(patch.object(vae, method, watched(name, getattr(vae, method))))
        yield seen


def check_vae(
    result: Mapping[str, Any],
    vae: nn.Module,
    candidate: VAE,
    seen: Mapping[str, Call],
    *,
    precision: Precision | None = None,
    every_module: bool = False,
) -> dict[str, Any]:
    """Hold the halves of a VAE in a runtime against the VAE in torch.

    Args:
        result: `check_parity`'s of the denoisers.
        vae: float32.
        seen: from `watch_vae`. Where nothing was encoded, the encoder gets the image that is decoded; and a graph of
            tiles gets the first.
        precision: chooses the bounds; that of each half if not given.
        every_module: see `check_parity`.

    Returns:
        the result with more checks, of `vae_decoder` and `vae_encoder` as far as they are there, in `check_parity`'s
        form. What fails is the first only if nothing before it did.
    """
    calls = dict(seen)
    if "vae_decoder" in calls and "vae_encoder" not in calls:
        image = predict(HALVES["vae_decoder"](vae), calls["vae_decoder"])
        calls["vae_encoder"] = Call(0, 0, {_TAKES["vae_encoder"]: image.clamp(-1, 1)})
    found = dict(result)
    for name, half in HALVES.items():
        if name in calls and (session := candidate.session_of(name)):
            own = _check_half(name, half(vae), session, calls[name], precision, every_module)
            found |= {
                "passed": found["passed"] and own["passed"],
                "checks": [*found["checks"], *own["checks"]],
                "first_diverging": found["first_diverging"] or own["first_diverging"],
                "divergence": found["divergence"] or own["divergence"],
            }
    return found


def _check_half(
    name: str, half: nn.Module, session: Any, call: Call, precision: Precision | None, every_module: bool
) -> dict[str, Any]:
    tensor, takes = call.arguments[_TAKES[name]], session.inputs[_TAKES[name]]
    if smaller(takes, tensor):
        call = Call(0, 0, {_TAKES[name]: tensor[:, :, : takes[2], : takes[3]]})

    def candidate(call: Call) -> Tensor:
        return next(iter(answer(session, call.arguments).values())).float()

    precision = precision or session.precision
    if session.runtime.startswith("ONNX Runtime"):
        fragments = OnnxFragments(session.source, "vae.")
        return check_graph(fragments, half, candidate, [call], precision, every_module=every_module, part=name)
    return check_calls([call], partial(predict, half), candidate, precision, output=name)
