"""The BLS model `text_to_image`: one request, one prompt, one image. A Triton server imports this, nothing else can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from .text_to_image import Cancelled, TextToImage


class TritonPythonModel:
    """Triton's interface for models in Python."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"] / "pipeline"
        max_steps = int(config["parameters"]["max_steps"]["string_value"])
        self.text_to_image = TextToImage(folder, _infer, max_steps)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        given = {tensor.name(): tensor.as_numpy().reshape(-1)[0] for tensor in request.inputs()}
        try:
            given |= {name: given[name].decode("utf-8") for name in ("prompt", "negative_prompt") if name in given}
            given |= {name: given[name].item() for name in ("seed", "steps", "guidance") if name in given}
            image = self.text_to_image(**given, is_cancelled=request.is_cancelled)
        except Cancelled as stopped:
            return _refusal(stopped, pb_utils.TritonError.CANCELLED)
        except ValueError as error:
            return _refusal(error, pb_utils.TritonError.INVALID_ARG)
        return pb_utils.InferenceResponse([pb_utils.Tensor("image", image)])


def _refusal(error: Exception, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))


def _infer(model: str, inputs: dict[str, np.ndarray], outputs: list[str]) -> dict[str, np.ndarray]:
    request = pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=outputs,
        inputs=[pb_utils.Tensor(name, array) for name, array in inputs.items()],
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
    )
    response = request.exec()
    if response.has_error():
        raise pb_utils.TritonModelException(f"{model}: {response.error().message()}")
    return {name: pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in outputs}
