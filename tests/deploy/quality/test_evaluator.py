"""What the embedded model's evaluator says of two sets of images, with intervals."""

from __future__ import annotations

import pytest
from PIL import Image

from deploy.build.steps.compare import quality
from slimdiff.embedded import evaluator, scenes

SEED = 9


def test_the_evaluators_figures_have_intervals():
    """Equal images have no difference at all; of images of other captions, the lost accuracy is beyond doubt."""
    captioned = scenes.sample_scenes(40, SEED, held_out=True)
    drawn = ((scenes.render(captioned, 3).permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
    dense = [Image.fromarray(pixels) for pixels in drawn]
    for metric in quality(dense, dense, SEED).values():
        assert (metric["difference"], metric["low"], metric["high"]) == (0, 0, 0)

    found = quality(dense, dense[:20] + dense[:19:-1], SEED)
    for metric in found.values():
        assert metric["difference"] == pytest.approx(metric["slim"] - metric["dense"])
        assert metric["low"] <= metric["difference"] <= metric["high"]
        assert all(low <= metric[side] <= high for side, (low, high) in metric["intervals"].items())
    assert found["caption_accuracy"]["high"] < -0.1
    reader, pictures = evaluator.load(), evaluator.to_tensor(dense)
    accuracy = evaluator.caption_accuracy(evaluator.attribute_hits(reader, pictures, captioned))["all"]
    assert found["caption_accuracy"]["dense"] == accuracy
    distance = evaluator.frechet_distance(reader, pictures, scenes.render(captioned, SEED))
    assert found["frechet_distance"]["dense"] == pytest.approx(distance)
