"""The benchmark of models larger than memory, on its smallest one."""

from __future__ import annotations

import re

from benchmarks.large import measure, on_paper


def test_every_step_is_measured_and_told(tmp_path):
    text = measure(tmp_path, "tiny", 2, 1e-4, "100KB")
    rows = re.findall(r"^\| (.+?) \| \d+ \| [\d.]+ GiB \|$", text, re.MULTILINE)
    assert [row.split(",")[0] for row in rows][:2] == ["write a random model", "hash the weights"]
    calls = re.search(r"calibrate, (\d+) calls", text)
    assert calls is not None and int(calls[1]) > 1
    assert any(re.fullmatch(r"factorise, 2 of \d of feed_forward.*", row.replace(" sites", "")) for row in rows)
    assert rows[-1] == "open the slim model"
    assert len(list((tmp_path / "slim").glob("*.safetensors"))) > 1


def test_published_models_are_computed_without_weights():
    rows = on_paper(40.0, 3.0).splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["Flux.1", "Qwen-Image"]
    assert "11.9 B" in rows[2] and "20.4 B" in rows[3]
