"""Dense against slim UNets on a GPU, with random weights: of quality nothing is said.

`python -m benchmarks.gpu [--model sd15,sdxl] [--dtype fp16,bf16] [--batch 1,2,4,8] [--runtime
eager,graph,compile,tensorrt] [--out gpu.json] [--minutes 9]`, from the repository's root, measures one cell after the
other, writes the JSON after each, leaves out what is in it already, stops before the minutes are up, and prints a
Markdown table of all that there is. It needs torch, diffusers and slimdiff's own dependencies, neither an installed
slimdiff nor ONNX; TensorRT and ONNX for the runtime `tensorrt` alone.

Three UNets are timed in turn, ABC CBA, so that a clock that moves moves for all:

- `dense`: the public configuration;
- `parameters`: the same share goes from every layer, until the budget is out (100M of SD 1.5, 25 % of SDXL);
- `latency`: cut until the whole call should be so much faster (`--speedup`), by a table of every layer's time at some
  ranks on this very device. What a cut costs in quality is unknown here: its stand-in is the share cut, squared, times
  the layer's parameters.

`--part pictures` times all calls of a guided picture of `--steps`: each UNet by the full schedule and by another
(`--guidance-interval`, `--deep-every`), in the first dtype; the dense one in the others, too. Nothing beside the UNet
is in it. `--batch` is then images.

`--part attention` asks another question: which attention kernel runs, and how fast, where queries and keys have another
width than values, or one that is no multiple of 8.
"""
