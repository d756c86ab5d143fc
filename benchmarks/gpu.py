"""Dense against slim UNets on a GPU, in one file that needs torch and diffusers alone: carry it there and run it.

`python gpu.py [--model sd15,sdxl] [--dtype fp16,bf16] [--batch 1,2,4,8] [--runtime eager,graph,compile,tensorrt]
[--out gpu.json] [--minutes 9]` measures one cell after the other, writes the JSON after each, leaves out what is in it
already, stops before the minutes are up, and prints a Markdown table of all that there is. Random weights: of quality
nothing is said. Three UNets are timed in turn, ABC CBA, so that a clock that moves moves for all:

- `dense`: the public configuration;
- `parameters`: all layers cut by one share until the budget is out (100M of SD 1.5, 25 % of SDXL);
- `latency`: cut until the whole call should be so much faster (`--speedup`), by a table of every layer's time at some
  ranks on this very device. What a cut costs in quality is unknown here: its stand-in is the share cut, squared.

`--part attention` asks another question: which attention kernel runs, and how fast, where queries and keys have another
width than values, or one that is no multiple of 8.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Run = Callable[[], Any]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RUNTIMES = ("eager", "graph", "compile", "compile-graph", "tensorrt")
VARIANTS = ("dense", "parameters", "latency")
ALIGN = 8
"""Ranks are multiples of this: what the kernels of tensor cores are tiled by."""
TABLE_DTYPE, TABLE_BATCH = "fp16", 2
"""What the table of layers' latencies is measured in, on a GPU; in fp32 on a CPU."""


@dataclass(frozen=True)
class Model:
    """A public configuration, what its calls look like, and what share of its parameters is to go."""

    config: dict[str, Any]
    latents: int
    tokens: int
    reduce: float
    added: dict[str, int] = field(default_factory=dict)


MODELS = {
    "sd15": Model({"cross_attention_dim": 768, "attention_head_dim": 8}, 64, 77, 100e6 / 859_520_964),
    "sdxl": Model(
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        128,
        77,
        0.25,
        {"text_embeds": 1280, "time_ids": 6},
    ),
    "tiny": Model(
        {
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 1,
            "cross_attention_dim": 32,
            "norm_num_groups": 8,
        },
        8,
        7,
        0.05,
    ),
}


# The slim UNet: slimdiff's shapes.


@dataclass(frozen=True)
class Layer:
    """An attention layer (query_key and value_output, of one rank per head) or a feed-forward.

    Attributes:
        dense: rank of the dense model: dimensions per head, or channels.
        heads: 1 for a feed-forward.
        cost: parameters that one unit of rank costs.
    """

    path: str
    dense: int
    heads: int
    cost: int

    def nearest(self, rank: float) -> int:
        """The largest rank up to this that there is: a quarter of the dense one at least, and no narrower than 16 per
        head, for narrower heads do not fuse."""
        least = max(self.dense // 4, 16 if self.heads > 1 else ALIGN)
        return min(self.dense, max(int(rank) // ALIGN, -(-least // ALIGN)) * ALIGN)

    def candidates(self, count: int = 6) -> list[int]:
        """So many ranks, spread from the least to the dense one, among them about half."""
        least = self.nearest(0)
        spread = (least + (self.dense - least) * i / (count - 1) for i in range(count - 1))
        return sorted({*map(self.nearest, spread), self.nearest(self.dense / 2), self.dense})


def find_layers(unet: nn.Module) -> list[Layer]:
    found = []
    for path, module in unet.named_modules():
        if isinstance(module, Attention):
            linears: list[Any] = [module.to_q, module.to_k, module.to_v]
            cost = sum(x.in_features + (x.bias is not None) for x in linears) + module.to_out[0].out_features
            found.append(Layer(path, module.inner_dim // module.heads, module.heads, module.heads * cost))
        elif isinstance(module, FeedForward):
            up, down = module.net[0].proj, module.net[2]
            rows = up.out_features // down.in_features  # 2 where the activation is gated
            cost = rows * (up.in_features + (up.bias is not None)) + down.out_features
            found.append(Layer(path, down.in_features, 1, cost))
    return found


def resize(unet: nn.Module, ranks: Mapping[str, int]) -> None:
    """Put layers of these ranks (by path) in the place of the dense ones; they are new, so their values are, too."""
    for path, rank in ranks.items():
        module: Any = unet.get_submodule(path)
        if isinstance(module, FeedForward):
            up, down = module.net[0].proj, module.net[2]
            module.net[0].proj = _linear(up, up.in_features, rank * (up.out_features // down.in_features))
            module.net[2] = _linear(down, rank, down.out_features)
            continue
        inner = rank * module.heads
        for name in ("to_q", "to_k", "to_v"):
            old = getattr(module, name)
            setattr(module, name, _linear(old, old.in_features, inner))
        module.to_out[0] = _linear(module.to_out[0], inner, module.to_out[0].out_features)
        module.inner_dim = module.inner_kv_dim = inner
        module.scale = rank**-0.5


def _linear(old: nn.Linear, inside: int, outside: int) -> nn.Linear:
    kind: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
    return nn.Linear(inside, outside, old.bias is not None, **kind)


def build(model: Model, ranks: Mapping[str, int], device: str, dtype: torch.dtype) -> UNet2DConditionModel:
    """A UNet of these ranks with random weights, made on the device."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**model.config)
        resize(unet, ranks)
    unet = unet.to(dtype).eval().requires_grad_(False)
    if device == "meta":
        return unet
    unet.to_empty(device=device)
    torch.manual_seed(0)
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.constant_(parameter, float(name.endswith("weight")))  # of norms
    return unet.to(memory_format=torch.channels_last) if device == "cuda" else unet


def inputs_of(model: Model, batch: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device=device, dtype=dtype)

    given: dict[str, Any] = {
        "sample": noise(4, model.latents, model.latents),
        "timestep": torch.tensor(501, device=device),
        "encoder_hidden_states": noise(model.tokens, model.config["cross_attention_dim"]),
    }
    if device == "cuda":
        given["sample"] = given["sample"].contiguous(memory_format=torch.channels_last)
    if model.added:
        given["added_cond_kwargs"] = {name: noise(width) for name, width in model.added.items()}
    return given


@torch.no_grad()
def count(model: Model, ranks: Mapping[str, int]) -> dict[str, int]:
    """Parameters, and floating-point operations of one call at batch 1 (a multiply-accumulate is two)."""
    unet = build(model, ranks, "meta", torch.float32)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # whichever kernel runs, the products are the same
        unet(**inputs_of(model, 1, "meta", torch.float32), return_dict=False)
    return {"parameters": sum(p.numel() for p in unet.parameters()), "flops": counter.get_total_flops()}


# Which ranks.


def by_parameters(layers: Sequence[Layer], total: int, reduce: float) -> dict[str, int]:
    """One share of every layer, the largest that takes `reduce` of the model's parameters out."""
    for percent in range(1000, 0, -1):
        ranks = {layer.path: layer.nearest(layer.dense * percent / 1000) for layer in layers}
        if sum((layer.dense - ranks[layer.path]) * layer.cost for layer in layers) >= reduce * total:
            return ranks
    raise SystemExit(f"these layers do not hold {reduce:.0%} of the parameters")


def by_latency(
    layers: Sequence[Layer], table: Mapping[str, Mapping[int, float]], saving: float
) -> tuple[dict[str, int], float]:
    """The ranks of least error whose layers save so many milliseconds, or all that can be saved.

    Every layer takes the rank with the least of error + price x time; the price is raised until enough is saved. That
    is the exact optimum for what it saves.

    Returns:
        rank by path, and what is saved.
    """

    def choose(price: float) -> dict[str, int]:
        def value(layer: Layer, rank: int) -> float:
            return (1 - rank / layer.dense) ** 2 + price * table[layer.path][rank]

        return {layer.path: min(table[layer.path], key=lambda r: value(layer, r)) for layer in layers}

    def saved(ranks: Mapping[str, int]) -> float:
        return sum(table[layer.path][layer.dense] - table[layer.path][ranks[layer.path]] for layer in layers)

    high = 1e-9
    while saved(choose(high)) < saving and high < 1e9:
        high *= 2
    low = high / 2
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if saved(choose(middle)) >= saving else (middle, high)
    ranks = choose(high)
    return ranks, saved(ranks)


@torch.no_grad()
def layer_table(
    model: Model, layers: Sequence[Layer], device: str, dtype: torch.dtype, batch: int, rounds: int
) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    """Milliseconds of each layer alone by rank, at a few ranks, and of the whole model dense and at half its ranks."""
    dense = build(model, {}, device, dtype)
    inputs = inputs_of(model, batch, device, dtype)
    shapes: dict[str, list[tuple[int, ...]]] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [*args, kwargs.get("hidden_states"), kwargs.get("encoder_hidden_states")]
            shapes[path] = [tuple(x.shape) for x in given if isinstance(x, Tensor)]

        return hook

    handles = [dense.get_submodule(x.path).register_forward_pre_hook(watch(x.path), with_kwargs=True) for x in layers]
    dense(**inputs, return_dict=False)
    for handle in handles:
        handle.remove()
    half = {layer.path: layer.nearest(layer.dense / 2) for layer in layers}
    halved = build(model, half, device, dtype)
    runs: dict[Any, Run] = {
        "dense": faster(lambda: dense(**inputs, return_dict=False), device),
        "half": faster(lambda: halved(**inputs, return_dict=False), device),
    }
    key_of = {layer.path: (layer.dense, layer.heads, *shapes[layer.path]) for layer in layers}
    ranks_of: dict[Any, list[int]] = {}
    for layer in layers:
        if key_of[layer.path] in ranks_of:
            continue
        ranks_of[key_of[layer.path]] = layer.candidates()
        for rank in layer.candidates():
            module = _alone(dense.get_submodule(layer.path), rank)
            given = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes[layer.path]]
            runs[key_of[layer.path], rank] = faster(lambda m=module, g=given: m(*g), device)  # type: ignore[misc]
    times = {key: median(seconds) * 1e3 for key, seconds in timed(runs, device, rounds).items()}
    table = {}
    for layer in layers:
        worst, curve = 0.0, {}
        for rank in ranks_of[key_of[layer.path]]:  # noise may say that a larger rank is faster
            worst = curve[rank] = max(worst, times[key_of[layer.path], rank])
        table[layer.path] = curve
    alone = sum(table[x.path][x.dense] - table[x.path][half[x.path]] for x in layers)
    whole = times["dense"] - times["half"]
    anchor = whole / alone if alone > 0 and 0.25 < whole / alone < 4 else 1.0
    table = {path: {rank: ms * anchor for rank, ms in curve.items()} for path, curve in table.items()}
    return table, {"dense_ms": times["dense"], "half_ms": times["half"], "anchor": anchor}


def _alone(module: nn.Module, rank: int) -> nn.Module:
    """A copy of a layer at another rank."""
    holder = nn.ModuleDict({"layer": copy.deepcopy(module)})
    resize(holder, {"layer": rank})
    return holder["layer"].requires_grad_(False)


# Running and timing.


def faster(run: Run, device: str) -> Run:
    """The run without what the CPU takes to start its kernels: a CUDA graph; on a CPU the run itself."""
    return graphed(run) if device == "cuda" else run


def graphed(run: Run) -> Run:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay(_inputs_of: Run = run) -> Any:  # the graph reads the run's tensors: they must live as long as it does
        graph.replay()
        return kept

    return replay


def runner(unet: nn.Module, inputs: dict[str, Any], runtime: str) -> Run:
    """One UNet call in a runtime, as a function that gives the output."""
    if runtime == "tensorrt":
        return tensorrt_run(unet, inputs)
    called: Any = torch.compile(unet, dynamic=False) if runtime.startswith("compile") else unet

    def run() -> Tensor:
        return called(**inputs, return_dict=False)[0]

    return graphed(run) if runtime.endswith("graph") else run


class _Flat(nn.Module):
    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, states: Tensor, *added: Tensor) -> Tensor:
        more = {"added_cond_kwargs": dict(zip(("text_embeds", "time_ids"), added, strict=True))} if added else {}
        return self.unet(sample, timestep, states, **more, return_dict=False)[0]


def tensorrt_run(unet: nn.Module, inputs: dict[str, Any]) -> Run:
    """Through ONNX into a TensorRT engine, its precision that of the weights."""
    import tensorrt as trt

    given = [*(v for v in inputs.values() if isinstance(v, Tensor)), *inputs.get("added_cond_kwargs", {}).values()]
    given = [tensor.contiguous() for tensor in given]
    names = [f"input_{i}" for i in range(len(given))]
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 knows nothing else
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "model.onnx")
        program = torch.onnx.export(
            _Flat(unet), tuple(given), dynamo=True, opset_version=22, input_names=names, output_names=["output"]
        )
        program.save(file, external_data=True)  # type: ignore[union-attr]
        if not parser.parse_from_file(file):
            raise RuntimeError(f"TensorRT does not parse the UNet: {parser.get_error(0)}")
        engine = builder.build_serialized_network(network, builder.create_builder_config())
    context = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(engine).create_execution_context()
    output = torch.empty_like(given[0])
    for name, tensor in zip([*names, "output"], [*given, output], strict=True):
        context.set_tensor_address(name, tensor.data_ptr())

    def run() -> Tensor:
        assert given and context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        return output

    return run


def timed(runs: Mapping[Any, Run], device: str, rounds: int, seconds: float = 1e9) -> dict[Any, list[float]]:
    """Seconds of every run, one after the other in turn, forwards and then backwards, so many rounds or seconds."""
    for run in runs.values():
        for _ in range(3):
            run()
    synchronize(device)
    order, found = list(runs), {key: [] for key in runs}  # type: ignore[var-annotated]
    started = time.perf_counter()
    for number in range(rounds):
        for key in order if number % 2 == 0 else reversed(order):
            found[key].append(_one(runs[key], device))
        if number >= 7 and number % 2 and time.perf_counter() - started > seconds:
            break
    return found


def _one(run: Run, device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    tensor = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(values), (4000, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = tensor[picks].quantile(0.5, dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)


def measure_peaks(device: str, dtypes: Sequence[str]) -> dict[str, float]:
    """FLOP/s of a large matrix product per dtype, and bytes/s of a large copy (read and written): this device's own."""
    size, megabytes = (8192, 2048) if device == "cuda" else (512, 64)
    found = {}
    for name in dtypes:
        a, b = (torch.randn(size, size, device=device).to(DTYPES[name]) for _ in range(2))
        best = min(timed({"": lambda a=a, b=b: a @ b}, device, 20)[""])  # type: ignore[misc]
        found[name] = 2 * size**3 / best
    source = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["bytes"] = 2 * source.numel() / min(timed({"": lambda: target.copy_(source)}, device, 20)[""])
    return found


@torch.no_grad()
def measure_cell(
    model: Model, plans: Mapping[str, Any], runtime: str, dtype: str, batch: int, device: str, args: Any
) -> dict[str, Any]:
    """All variants in one runtime, dtype and batch: milliseconds, and speedups over the dense one with intervals."""
    inputs = inputs_of(model, batch, device, DTYPES[dtype])
    runs = {}
    for variant in VARIANTS:
        unet = build(model, plans[variant]["ranks"], device, DTYPES[dtype])
        runs[variant] = runner(unet, inputs, runtime)
    found = timed(runs, device, args.rounds, args.seconds)
    cell: dict[str, Any] = {"rounds": len(found["dense"])}
    if device == "cuda":
        cell["peak_memory"] = torch.cuda.max_memory_allocated()
    for variant in VARIANTS:
        ratios = [d / s for d, s in zip(found["dense"], found[variant], strict=True)]
        low, high = interval(ratios) if variant != "dense" else (1.0, 1.0)
        cell[variant] = {
            "median_ms": median(found[variant]) * 1e3,
            "p90_ms": float(torch.tensor(found[variant], dtype=torch.float64).quantile(0.9)) * 1e3,
            "speedup": {"median": median(ratios), "low": low, "high": high},
            "finite": bool(torch.isfinite(runs[variant]()).all()),
        }
    return cell


# Attention by the widths of its heads.

WIDTHS = (
    (64, 64),
    (64, 48),
    (48, 64),
    (48, 48),
    (44, 44),
    (40, 40),
    (40, 24),
    (24, 24),
    (23, 23),
    (160, 160),
    (160, 96),
)


@torch.no_grad()
def measure_attention(device: str, dtype: torch.dtype, rounds: int, tokens: int) -> list[dict[str, Any]]:
    """Per pair of widths (query and key, value): the kernels that take it, its time, and that of padding it.

    Padded means: zeros up to one width, a multiple of 8, for both, and the scale said; the result is the same.
    """
    rows = []
    for wide, value_width in WIDTHS:
        q, k, v = (torch.randn(2, 8, tokens, w, device=device, dtype=dtype) for w in (wide, wide, value_width))
        common = -(-max(wide, value_width) // 8) * 8

        def plain(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

        def padded(q: Tensor = q, k: Tensor = k, v: Tensor = v, common: int = common) -> Tensor:
            scale = q.shape[-1] ** -0.5
            width = v.shape[-1]
            q, k, v = (F.pad(x, (0, common - x.shape[-1])) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :width]

        kernels = []
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            try:
                with sdpa_kernel(backend), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that say why not
                    plain()
                kernels.append(backend.name.removesuffix("_ATTENTION").lower())
            except RuntimeError:  # no kernel of that kind takes these
                continue
        times = timed({"plain": faster(plain, device), "padded": faster(padded, device)}, device, rounds)
        rows.append(
            {
                "query_key": wide,
                "value": value_width,
                "kernels": kernels,
                "plain_ms": median(times["plain"]) * 1e3,
                "padded_ms": median(times["padded"]) * 1e3,
                "difference": float((plain().float() - padded().float()).abs().max()),
            }
        )
    return rows


# The whole: cells, file, table.


def machine(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version()}
    found |= {name: version(name) for name in ("torch", "diffusers", "triton", "tensorrt") if _installed(name)}
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found |= {"gpu": gpu.name, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        found |= {"capability": f"sm{gpu.major}{gpu.minor}", "memory": gpu.total_memory}
    else:
        found["cpu"] = platform.processor() or platform.machine()
    return found


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def impossible(runtime: str, device: str) -> str | None:
    """Why a runtime is not measured here, if it is not."""
    if runtime in ("graph", "compile-graph", "tensorrt") and device != "cuda":
        return "needs a GPU"
    if runtime == "tensorrt" and not all(map(_installed, ("tensorrt", "onnx", "onnxscript"))):
        return "needs tensorrt, onnx and onnxscript, which are not all installed"
    return None


def make_plans(name: str, args: Any) -> dict[str, Any]:
    """Ranks of every variant, with what they cost, and the table that one of them is by."""
    model = MODELS[name]
    layers = find_layers(build(model, {}, "meta", torch.float32))
    total = count(model, {})["parameters"]
    dtype = DTYPES[TABLE_DTYPE if args.device == "cuda" else "fp32"]
    table, whole = layer_table(model, layers, args.device, dtype, TABLE_BATCH, args.rounds)
    saving = whole["dense_ms"] * (1 - 1 / args.speedup)
    quick, saved = by_latency(layers, table, saving)
    ranks: dict[str, dict[str, int]] = {
        "dense": {},
        "parameters": by_parameters(layers, total, model.reduce),
        "latency": quick,
    }
    plans: dict[str, Any] = {v: {"ranks": ranks[v], **count(model, ranks[v])} for v in VARIANTS}
    plans["latency"] |= {"asked": args.speedup, "expected": whole["dense_ms"] / (whole["dense_ms"] - saved)}
    return {**plans, "table": table, "whole": whole}


def cells(args: Any) -> Iterator[tuple[str, str, str, int]]:
    """What takes long to compile comes last."""
    for runtime in sorted(args.runtime, key=RUNTIMES.index):
        for model in args.model:
            for dtype in args.dtype:
                for batch in args.batch:
                    yield model, runtime, dtype, batch


def save(file: Path, result: dict[str, Any]) -> None:
    temporary = file.with_name(f".{file.name}.partial")
    temporary.write_text(json.dumps(result, indent=1))
    os.replace(temporary, file)


def table_of(result: dict[str, Any]) -> str:
    """Everything measured so far, in Markdown."""
    here, peaks = result["machine"], result["peaks"]
    where = here.get("gpu") or here.get("cpu")
    lines = [f"{where}; " + ", ".join(f"{k} {v}" for k, v in here.items() if k not in ("gpu", "cpu", "memory"))]
    known = {name: f"{peaks[name] / 1e12:.3g} TFLOP/s {name}" for name in DTYPES if name in peaks}
    lines.append(f"Measured peaks: {', '.join(known.values())}; {peaks['bytes'] / 1e9:.3g} GB/s.\n")
    lines.append(
        "| model | runtime | dtype | batch | UNet | parameters | ms | speedup (95 %) | TFLOP/s | of roofline |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    missing = {}
    for key, cell in result["cells"].items():
        model, runtime, dtype, batch = key.split("/")
        if "skipped" in cell:
            missing[runtime] = cell["skipped"]
            continue
        for variant in VARIANTS:
            plan, row = result["plans"][model][variant], cell[variant]
            seconds, flops = row["median_ms"] / 1e3, plan["flops"] * int(batch)
            weights = plan["parameters"] * DTYPES[dtype].itemsize
            # The least time that the products, or reading every weight once, can take.
            least = max(flops / peaks[dtype], weights / peaks["bytes"])
            s = row["speedup"]
            speedup = "1" if variant == "dense" else f"{s['median']:.3f} ({s['low']:.3f} to {s['high']:.3f})"
            lines.append(
                f"| {model} | {runtime} | {dtype} | {batch} | {variant} | {plan['parameters'] / 1e6:.1f}M | "
                f"{row['median_ms']:.3g} | {speedup} | {flops / seconds / 1e12:.3g} | {least / seconds:.0%} |"
                + ("" if row["finite"] else " not finite")
            )
    lines += [f"\nNot measured: {runtime} ({why})." for runtime, why in missing.items()]
    for dtype, rows in result.get("attention", {}).items():
        lines += [f"\n| {dtype}: query and key, value | kernels | ms | padded, ms | difference |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        lines += [
            f"| {r['query_key']}, {r['value']} | {', '.join(r['kernels']) or 'none but math'} | {r['plain_ms']:.3g} | "
            f"{r['padded_ms']:.3g} | {r['difference']:.1e} |"
            for r in rows
        ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    torch.manual_seed(0)
    started = time.monotonic()
    file = Path(args.out)
    result: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    here = machine(args.device)
    if result and result["machine"] != here:
        raise SystemExit(f"{file} was measured elsewhere ({result['machine']}): name another --out")
    result = {"machine": here, "peaks": {}, "plans": {}, "cells": {}, "attention": {}} | result

    def out_of_time() -> bool:
        return time.monotonic() - started > 60 * args.minutes

    needed = [dtype for dtype in args.dtype if dtype not in result["peaks"]]
    if needed or "bytes" not in result["peaks"]:
        result["peaks"] |= measure_peaks(args.device, needed)
        save(file, result)
    if "attention" in args.part:
        for dtype in args.dtype:
            if dtype not in result["attention"]:
                tokens = 4096 if args.device == "cuda" else 64
                result["attention"][dtype] = measure_attention(args.device, DTYPES[dtype], args.rounds, tokens)
                save(file, result)
    left = 0
    for model, runtime, dtype, batch in cells(args) if "unet" in args.part else ():
        key = f"{model}/{runtime}/{dtype}/{batch}"
        if key in result["cells"]:
            continue
        if why := impossible(runtime, args.device):
            result["cells"][key] = {"skipped": why}
            continue
        if out_of_time():
            left += 1
            continue
        if model not in result["plans"]:
            result["plans"][model] = make_plans(model, args)
            save(file, result)
        begun = time.monotonic()
        torch.compiler.reset()
        if args.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        result["cells"][key] = measure_cell(
            MODELS[model], result["plans"][model], runtime, dtype, batch, args.device, args
        )
        save(file, result)
        print(f"{key}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    save(file, result)
    print(table_of(result))
    if left:
        print(f"\n{left} cells are left: run it again with the same --out.")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()

    def several(known: Sequence[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            wrong = set(text.split(",")) - set(known)
            if wrong:
                raise argparse.ArgumentTypeError(f"{', '.join(sorted(wrong))}: there is {', '.join(known)}")
            return text.split(",")

        return parse

    parser.add_argument("--model", type=several(list(MODELS)), default=["sd15", "sdxl"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", type=several(list(DTYPES)), default=["fp16", "bf16"] if on_gpu else ["fp32"])
    parser.add_argument("--batch", type=lambda t: [int(n) for n in t.split(",")], default=[1, 2, 4, 8])
    parser.add_argument("--runtime", type=several(RUNTIMES), default=list(RUNTIMES))
    parser.add_argument("--part", type=several(("unet", "attention")), default=["unet"])
    parser.add_argument("--speedup", type=float, default=1.35, help="of the latency-budgeted UNet (default: 1.35)")
    parser.add_argument("--rounds", type=int, default=60, help="runs of each UNet in a cell, at most (default: 60)")
    parser.add_argument("--seconds", type=float, default=20, help="of timing in a cell, about, at most (default: 20)")
    parser.add_argument("--minutes", type=float, default=9, help="no cell is begun after these (default: 9)")
    parser.add_argument(
        "--out", default="gpu.json", help="kept up after every cell, and gone on with (default: gpu.json)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
