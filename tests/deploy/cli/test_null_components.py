"""Components that `model_index.json` says are none: a command does without them, or says in one line that it cannot."""

from __future__ import annotations

import pytest
from every_pipeline.members import make_member

from deploy.cli.app import main

STEPS = ("--steps", "2", "--height", "16", "--width", "16")
COMMANDS = {
    "inspect": ("inspect", "model"),
    "generate": ("generate", "model", "--prompt", "a circle", *STEPS, "--out", "image.png"),
    "compress": ("compress", "model", "--reduce", "5%", "--samples", "2", *STEPS, "--out", "slim"),
    "compare": ("compare", "model", "model", "--images", "1", "--trajectories", "1", "--steps", "2"),
    "export": ("export", "model", "--out", "onnx"),
    "bundle": ("bundle", "model", "--target", "edge", "--out", "bundle"),
}


@pytest.mark.parametrize(
    ("name", "absent", "refused"),
    [
        ("StableDiffusion3Pipeline", ("text_encoder_3", "tokenizer_3"), {}),
        (
            "StableDiffusionPipeline",
            ("text_encoder", "tokenizer"),
            dict.fromkeys(
                ("generate", "compress", "compare", "export", "bundle"), "it has no text_encoder and no tokenizer"
            ),
        ),
    ],
)
def test_a_component_that_is_none_is_done_without_or_missed_in_one_line(
    name, absent, refused, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    member = make_member(name)
    member.register_modules(**dict.fromkeys(absent))
    member.save_pretrained("model")
    for command, argv in COMMANDS.items():
        capsys.readouterr()
        code, said = main([*argv, "-q"]), capsys.readouterr().err
        assert code == (2 if command in refused else 0), said
        lines = [line for line in said.splitlines() if line.startswith("slimdiff: error")]
        assert len(lines) == (command in refused) and "Traceback" not in said
        assert refused.get(command, "") in "".join(lines)
