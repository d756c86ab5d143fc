"""`schedule`: by hand and chosen, into a model's directory; `generate` and `compare` make their images by it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from command_line import call, refused
from conftest import PROMPTS
from PIL import Image, ImageChops

from slimdiff import Schedule
from slimdiff.schedule import make_schedule
from slimdiff.storage import manifest

QUICK = ["--align", 4, "--samples", 1, "--batch", 1, "--steps", 2]
FEW = ["--images", 2, "--trajectories", 1, "--steps", 6, "--batch", 1]


@pytest.fixture
def model(pipeline, tmp_path) -> Path:
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def image(model: Path, out: Path, capsys, *more: str) -> Image.Image:
    found = call(["generate", model, "--prompt", PROMPTS[0], "--steps", 6, "--out", out, *more], capsys)
    assert (found["schedule"] is None) == ("none" in more or not (model / "schedule.json").exists())
    return Image.open(out).convert("RGB")


def differ(one: Image.Image, other: Image.Image) -> bool:
    return ImageChops.difference(one, other).getbbox() is not None


def test_a_schedule_by_hand_lies_beside_the_model_and_is_followed(model, tmp_path, capsys):
    manifest.write_manifest(model, "slim-model", {})
    plain = image(model, tmp_path / "plain.png", capsys)
    asked = ["--guidance-interval", "0.0:0.5", "--deep-every", 3, "--depth", "up_blocks.1", "--steps", 6]
    found = call(["schedule", model, *asked], capsys)
    schedule = Schedule.load(model)
    assert (schedule.guided, schedule.whole, schedule.depth) == ([0, 1, 2], [0, 3], "up_blocks.1")
    assert found["cost"] == pytest.approx(schedule.cost(found["shallow"])) and 0 < found["shallow"] < 1
    assert "schedule.json" in manifest.verify_manifest(model)["files"] and not [*manifest.strangers(model)]
    assert differ(image(model, tmp_path / "scheduled.png", capsys), plain)
    assert not differ(image(model, tmp_path / "none.png", capsys, "--schedule", "none"), plain)
    call(["schedule", model, "--deep-every", 2, "--steps", 6], capsys)  # again, in its place
    assert Schedule.load(model).whole == [0, 2, 4]
    manifest.verify_manifest(model)
    assert call(["inspect", model / "schedule.json"], capsys)["whole"] == [0, 2, 4]


def test_compare_holds_a_scheduled_model_against_the_dense_one_at_full_schedule(model, tmp_path, capsys):
    file = tmp_path / "schedule.json"
    found = call(["schedule", model, "--deep-every", 3, "--steps", 6, "--out", file], capsys)
    assert not (model / "schedule.json").exists()
    compared = call(["compare", model, model, *FEW, "--schedule", file], capsys)
    assert compared["noise_error"]["relative_mse"] == 0 and 10 < compared["images"]["psnr_db"] < 200
    macs = compared["macs_per_image"]
    assert macs["saved"] == pytest.approx(1 - found["cost"]) and macs["slim"] == pytest.approx(
        macs["dense"] * found["cost"], rel=1e-6
    )


def test_what_was_carried_over_is_said_with_what_was_measured(model, capsys):
    """In the result, not in a warning alone; a sampler's calls are what counts, not its steps."""
    schedule = make_schedule(3, 6, guidance_interval=(0.0, 0.5), deep_every=3)
    schedule.model_copy(update={"made_by": {"latent_error": 0.01}}).save(model / "schedule.json")
    for steps, calls, more in ((6, 6, []), (4, 4, []), (3, 5, ["--scheduler", "heun"])):
        found = call(["compare", model, model, *FEW, "--steps", steps, *more], capsys)
        own = found["schedule"]
        assert (own["steps"], own.get("carried_from")) == (calls, None if calls == 6 else 6)
        assert own["made_by"] == {"latent_error": 0.01} and own["whole"] == schedule.at(calls).whole
        assert ("carried over from 6 steps" in own["says"]) == (calls != 6)
        shares = [1 - schedule.at(calls).cost(shallow) for shallow in (1.0, 0.0)]
        assert shares[0] < found["macs_per_image"]["saved"] < shares[1]
    assert call(["inspect", model / "schedule.json"], capsys)["levels"] == 3


def test_a_chosen_schedule_is_as_fast_as_asked_and_says_what_it_changes(model, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    measured = ["--prompts", tmp_path / "prompts.txt", "--samples", 2, "--steps", 3, "--depth", "up_blocks.2"]
    found = call(["schedule", model, "--speedup", 1.4, *measured], capsys)
    assert found["speedup"] >= 1.4 - 1e-6
    said = Schedule.load(model).made_by
    assert said["latent_error"] > 0 and said["images"] == 2 and said["cost"] == pytest.approx(found["cost"])
    bound = said["latent_error"] * 1.01
    call(["schedule", model, "--max-error", bound, *measured], capsys)
    cheapest = Schedule.load(model).made_by
    assert cheapest["latent_error"] <= bound


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_schedule_travels_into_graphs_and_bundles(model, tmp_path, monkeypatch, capsys):
    """The images are those of the model by its schedule, in ONNX Runtime, from a bundle and from its archive."""
    for module in ("onnxscript", "onnxruntime", "zstandard"):
        pytest.importorskip(module, reason="needs the extras onnx and bundle")
    monkeypatch.chdir(tmp_path)
    plain = image(model, tmp_path / "plain.png", capsys)
    call(["schedule", model, "--guidance-interval", "0.0:0.5", "--deep-every", 3, "--steps", 6], capsys)
    expected = image(model, tmp_path / "torch.png", capsys)
    found = call(["export", model, "--out", "onnx"], capsys)
    assert found["dynamic"] == "batch" and "unet/shallow.onnx" in found["graphs"]
    assert manifest.read_manifest(Path("onnx"))["made_from"]["schedule"]["whole"] == [0, 3]
    call(["validate", model, "onnx"], capsys)
    call(["bundle", model, "--target", "edge", "--runtime", "onnxruntime", "--out", "from-model"], capsys)
    call(["bundle", "onnx", "--target", "server", "--out", "from-onnx", "--archive", "tar.zst"], capsys)
    archive = next(path for path in Path().glob("from-onnx*") if path.is_file())
    for artifact in ("onnx", "from-model", "from-onnx", archive):
        asked = ["--prompt", PROMPTS[0], "--steps", 6, "--runtime", "onnxruntime"]
        found = call(["generate", artifact, *asked, "--out", "a.png"], capsys)
        assert found["schedule"]["whole"] == [0, 3]
        own = Image.open("a.png").convert("RGB")
        assert max(high for _, high in ImageChops.difference(own, expected).getextrema()) <= 2
        found = call(["generate", artifact, *asked, "--out", "b.png", "--schedule", "none"], capsys)
        unscheduled = Image.open("b.png").convert("RGB")
        assert found["schedule"] is None
        assert max(high for _, high in ImageChops.difference(unscheduled, plain).getextrema()) <= 2
    assert differ(plain, expected)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("schedule demo --deep-every 3", "demo is no directory of yours that a schedule could go into: say --out FILE"),
        ("schedule MODEL --deep-every 2 --threads 1", "give --runtime with it"),
        ("schedule MODEL --steps 6", "say a schedule (--guidance-interval, --deep-every) or what to choose"),
        ("schedule MODEL --deep-every 2 --speedup 2", "say a schedule by hand: leave out --speedup and --max-error"),
        (
            "schedule MODEL --guidance-interval 0.5:2",
            "--guidance-interval: must be two numbers from 0 to 1 with a colon between, such as 0.0:0.5, not '0.5:2'",
        ),
        ("schedule MODEL --deep-every 2 --depth mid_block", "--depth: must be an up block but the first, such as"),
        ("schedule MODEL --deep-every 2 --variant fp-16", "--variant: must be letters, digits and underscores, such"),
        ("schedule MODEL --guidance-interval 0.8:0.2", "an interval of guidance is like 0.0:0.5"),
        ("schedule MODEL --deep-every 2 --depth up_blocks.7", "a UNet of 3 levels has up_blocks.1 or up_blocks.2"),
        ("schedule MODEL --speedup 2 --depth up_blocks.7", "has no up_blocks.7 to reuse"),
        ("schedule MODEL --deep-every 2 --out schedule.txt", "name a file that ends in .json"),
        ("schedule MODEL --deep-every 2 --out photo.json", "is there and no schedule: name another file"),
        ("generate MODEL --prompt a --out a.png --schedule four.json", "for a UNet of 4 levels, and this one has 3"),
        ("generate MODEL --prompt a --out a.png --schedule broken.json", "broken.json: whole: "),
        ("generate MODEL --prompt a --out a.png --schedule absent.json", "no schedule can be read there"),
        ("compress MODEL --out slim --macs 6% --of image", "--of image says what --speedup is of"),
        ("compress MODEL --out slim --speedup 2 --of image --schedule none", "leave out --schedule, or --of image"),
        ("compress MODEL --out slim --speedup 2 --schedule-images 2", "with the ranks: give --of image"),
    ],
)
def test_what_no_schedule_can_be_is_one_line(argv, said, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    four = {"levels": 4, "steps": 4, "depth": "up_blocks.3", "guided": [0, 1, 2, 3], "whole": [0, 2]}
    Path("four.json").write_text(json.dumps(four))
    Path("broken.json").write_text(json.dumps({**four, "whole": "all"}))
    Path("photo.json").write_bytes(b"\x89PNG")
    assert said in refused([str(model) if word == "MODEL" else word for word in argv.split()], capsys)
    assert not (model / "schedule.json").exists() and not Path("a.png").exists()


def test_a_file_of_the_users_own_is_not_taken_for_a_schedule(model, capsys):
    (model / "schedule.json").write_text('{"monday": "swimming"}')
    assert "schedule.json: " in refused(["schedule", model, "--deep-every", 2], capsys)
    assert "swimming" in (model / "schedule.json").read_text()
    shutil.rmtree(model)


def test_the_schedule_of_a_slim_model_is_edited_in_its_place(model, tmp_path, capsys):
    """Its manifest lists it; nothing else of the model may differ."""
    file = model / "schedule.json"
    make_schedule(3, 6, deep_every=3).save(file)
    manifest.write_manifest(model, "slim-model", {})
    for text, said in ((None, ""), ('"whole": [1, 3]', "whole must have step 0"), ('"whole": [0, 4]', "")):
        if text is not None:
            file.write_text(re.sub(r'"whole": \[.*\]', text, file.read_text()))
        asked = ["generate", model, "--prompt", PROMPTS[0], "--steps", 6, "--out", tmp_path / "edited.png"]
        if said:
            assert f"{file}: {said}" in refused(asked, capsys)
        else:
            assert call(asked, capsys)["schedule"]["whole"] == ([0, 3] if text is None else [0, 4])
    file.unlink()
    image(model, tmp_path / "without.png", capsys)
    call(["schedule", model, "--deep-every", 2, "--steps", 6], capsys)
    manifest.verify_manifest(model)
    (model / "scheduler" / "scheduler_config.json").write_text("{}")
    assert "it was changed" in refused(["generate", model, "--prompt", "a", "--out", tmp_path / "a.png"], capsys)


def test_a_unet_in_parts_follows_a_schedule(model, tmp_path, capsys):
    call(["schedule", model, "--guidance-interval", "0.0:0.5", "--deep-every", 3, "--steps", 6], capsys)
    call(["export", model, "--split", "--out", tmp_path / "parts"], capsys)
    ours, theirs = (image(m, tmp_path / f"{m.name}.png", capsys) for m in (model, tmp_path / "parts"))
    low_high = ImageChops.difference(ours, theirs).getextrema()
    assert max(high for _, high in low_high) <= 1


def test_a_slim_model_is_planned_for_the_schedule_and_carries_it(model, tmp_path, capsys):
    """The model's own; what was measured of the dense model says so."""
    schedule = make_schedule(3, 6, guidance_interval=(0.0, 0.5), deep_every=3)
    schedule.model_copy(update={"made_by": {"latent_error": 0.01}}).save(model / "schedule.json")
    found = call(["compress", model, "--out", tmp_path / "own", "--macs", "6%", *QUICK], capsys)
    image_macs = found["predicted"]["macs_per_image"]
    assert image_macs["slim"] <= image_macs["budget"] and found["schedule"]["whole"] == [0, 3]
    own = Schedule.load(tmp_path / "own")
    assert own.whole == [0, 3] and own.made_by["measured_on"] == "the dense model"
    manifest.verify_manifest(tmp_path / "own")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_slim_model_gets_the_schedule_that_is_named_or_none(model, tmp_path, capsys):
    call(["schedule", model, "--deep-every", 3, "--steps", 6], capsys)
    make_schedule(3, 6, guidance_interval=(0.0, 0.5)).save(tmp_path / "named.json")
    for asked, guided in (("none", None), (tmp_path / "named.json", [0, 1, 2])):
        out = tmp_path / f"slim-{Path(asked).stem}"
        found = call(["compress", model, "--out", out, "--reduce", "4%", "--schedule", asked, *QUICK], capsys)
        assert (found["schedule"] or {}).get("guided") == guided
        assert (Schedule.load(out).guided if guided else (out / "schedule.json").exists()) == (guided or False)
        image(out, tmp_path / "slim.png", capsys)


def test_speed_is_of_the_whole_image_where_a_runtime_is_named(model, tmp_path, monkeypatch, capsys):
    """In torch, which nothing is exported for."""
    monkeypatch.setenv("SLIMDIFF_CACHE", str(tmp_path / "cache"))
    measured = ["--runtime", "torch", "--threads", 1, "--steps", 6]
    found = call(["schedule", model, "--guidance-interval", "0.0:0.5", "--deep-every", 3, *measured], capsys)
    times = found["image_ms"]
    assert 0 < times["beside_steps"] < times["scheduled"] < times["full"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_schedule_is_chosen_by_the_time_that_an_image_takes(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLIMDIFF_CACHE", str(tmp_path / "cache"))
    measured = ["--runtime", "torch", "--threads", 1, "--steps", 6]
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    asked = ["--speedup", 1.05, "--prompts", tmp_path / "prompts.txt", "--samples", 1, "--depth", "up_blocks.1"]
    found = call(["schedule", model, *asked, *measured], capsys)
    assert found["made_by"]["cost"] <= 1 / 1.05 + 1e-6
    own = found["image_ms"]
    assert own["scheduled"] / own["full"] == pytest.approx(found["made_by"]["cost"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_speedup_is_of_the_whole_image_by_the_schedule(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLIMDIFF_CACHE", str(tmp_path / "cache"))
    call(["schedule", model, "--guidance-interval", "0.0:0.5", "--deep-every", 3, "--steps", 6], capsys)
    asked = ["--runtime", "torch", "--threads", 1]
    found = call(["compress", model, "--out", tmp_path / "slim", "--speedup", 1.01, *asked, *QUICK], capsys)
    image_ms = found["predicted"]["latency_ms_per_image"]
    assert image_ms["slim"] <= image_ms["budget"] * (1 + 1e-6) and image_ms["dense"] / image_ms["slim"] >= 1.01 - 1e-6


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ranks_and_a_schedule_are_chosen_together_for_a_speedup_of_the_image(model, tmp_path, monkeypatch, capsys):
    """A model's own schedule does not count, and another is written; predicted and measured are both said."""
    monkeypatch.setenv("SLIMDIFF_CACHE", str(tmp_path / "cache"))
    call(["schedule", model, "--guidance-interval", "0.0:0.5", "--steps", 6], capsys)
    asked = ["--speedup", 1.2, "--of", "image", "--schedule-images", 1, "--runtime", "torch", "--threads", 1]
    quick = ["--align", 4, "--samples", 1, "--batch", 1, "--steps", 6]
    found = call(["compress", model, "--out", tmp_path / "slim", *asked, *quick], capsys)
    of_image, own = found["image"], Schedule.load(tmp_path / "slim")
    assert of_image["slim_ms"] <= of_image["full_ms"] / 1.2 * 1.0001
    assert of_image["measured"] == min(pair["measured"] for pair in of_image["among"] if pair["measured"] is not None)
    assert found["schedule"]["whole"] == own.whole and of_image["schedule"] == str(own)
    assert manifest.verify_manifest(tmp_path / "slim")["made_from"]["image"]["speedup"] == 1.2
    image(tmp_path / "slim", tmp_path / "slim.png", capsys)
