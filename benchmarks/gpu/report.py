"""What a file of measurements says, in Markdown."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.cells import VARIANTS
from benchmarks.gpu.pictures import table_of_pictures
from benchmarks.gpu.unets import DTYPES

COLUMNS = ("model", "runtime", "dtype", "batch", "UNet", "parameters", "ms", "speedup (95 %)", "TFLOP/s", "of roofline")


def table_of(result: dict[str, Any]) -> str:
    """Everything measured so far."""
    here, peaks = result["machine"], result["peaks"]
    where = here.get("gpu") or here.get("cpu")
    lines = [f"{where}; " + ", ".join(f"{k} {v}" for k, v in here.items() if k not in ("gpu", "cpu", "memory"))]
    known = {name: f"{peaks[name] / 1e12:.3g} TFLOP/s {name}" for name in DTYPES if name in peaks}
    lines.append(f"Measured peaks: {', '.join(known.values())}; {peaks['bytes'] / 1e9:.3g} GB/s.\n")
    if result["cells"]:
        lines += [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    missing = {}
    for key, cell in result["cells"].items():
        runtime = key.split("/")[1]
        if "skipped" in cell:
            missing[runtime] = cell["skipped"]
        else:
            lines += [row_of(key, variant, cell[variant], result) for variant in VARIANTS]
    lines += [f"\nNot measured: {runtime} ({why})." for runtime, why in missing.items()]
    if result["pictures"]:
        lines.append("\n" + table_of_pictures(result["pictures"]))
    for dtype, rows in result.get("attention", {}).items():
        lines += [f"\n| {dtype}: query and key, value | kernels | ms | padded, ms | difference |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        lines += [
            f"| {r['query_key']}, {r['value']} | {', '.join(r['kernels']) or 'none but math'} | {r['plain_ms']:.3g} | "
            f"{r['padded_ms']:.3g} | {r['difference']:.1e} |"
            for r in rows
        ]
    return "\n".join(lines)


def row_of(key: str, variant: str, row: dict[str, Any], result: dict[str, Any]) -> str:
    """One UNet of a cell."""
    model, runtime, dtype, batch = key.split("/")
    plan, peaks = result["plans"][model][variant], result["peaks"]
    seconds, flops = row["median_ms"] / 1e3, plan["flops"] * int(batch)
    weights = plan["parameters"] * DTYPES[dtype].itemsize
    # The least time that the products, or reading every weight once, can take.
    least = max(flops / peaks[dtype], weights / peaks["bytes"])
    speedup = "1" if variant == "dense" else "{median:.3f} ({low:.3f} to {high:.3f})".format(**row["speedup"])
    return (
        f"| {model} | {runtime} | {dtype} | {batch} | {variant} | {plan['parameters'] / 1e6:.1f}M | "
        f"{row['median_ms']:.3g} | {speedup} | {flops / seconds / 1e12:.3g} | {least / seconds:.0%} |"
    ) + ("" if row["finite"] else " not finite")
