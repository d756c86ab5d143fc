"""What images are made from: prompts, and pictures that are found, looked at before the long work, and opened late."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slimdiff.errors import InputError
from slimdiff.progress import bar

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Material:
    """What images are made from, image by image. Of a shorter list, the front follows its end."""

    prompts: Sequence[str] = ()
    """None for a pipeline that takes no prompt."""
    images: Sequence[Path] = ()
    masks: Sequence[Path] = ()
    """One of each image, in their order; `pair_masks` finds them."""
    classes: Sequence[int] = ()
    count: int | None = None
    """How many images to make; if not given, as many as the longest list has."""
    default_prompts: bool = False
    """Whether nobody chose the prompts: a pipeline that takes none then does without."""
    controls: Sequence[Path] = ()
    """Pictures that steer: one for each image or, where several ControlNets steer, one for each of these."""
    first: int = 0
    """Which of `controls` goes with the first image, where each image has one of its own."""
    ip_adapter_image: Path | None = None
    """A picture that an IP-Adapter takes as a prompt, of all images."""


def find_pictures(folder: Path | str, what: str = "images", least: int = 1) -> list[Path]:
    """The pictures of a folder (or one file), sorted by name; hidden files and those of other kinds aside.

    Args:
        what: what an error calls them.
        least: how many are needed.

    Raises:
        InputError: if there is no such folder, it holds fewer, or one of them cannot be read.
    """
    from PIL import Image

    folder = Path(folder)
    if not folder.exists():
        raise InputError(f"{folder}: there is no such file or folder of {what}")
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    inside = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    files = [f for f in inside if f.is_file() and f.suffix.lower() in endings and not f.name.startswith(".")]
    if len(files) < least:
        have = f"holds {len(files)} {what}" if files else f"holds no {what} (such as .png or .jpg)"
        raise InputError(f"{folder} {have}, and {least} are asked for: add some, or ask for fewer")
    for file in bar(files, f"look at {what}", "picture"):
        with opened(file):
            pass
    return files


def pair_masks(images: Sequence[Path], masks: Sequence[Path]) -> list[Path]:
    """Each image's mask: the one of its name (whatever its ending) if all images have one, by their order if none has.

    Raises:
        InputError: if some images have a mask of their name and others have none, two masks have one name, or there are
            fewer masks than images.
    """
    named = {mask.stem: mask for mask in masks}
    own = [image for image in images if image.stem in named]
    if own and len(own) < len(images):
        other = next(image for image in images if image not in own)
        raise InputError(f"{own[0].name} has a mask of its name and {other.name} has none: name all masks so, or none")
    if own:
        if len(named) < len(masks):
            twice = next(mask for mask in masks if named[mask.stem] != mask)
            raise InputError(f"{twice.name} and {named[twice.stem].name} are masks of one name: take one out")
        return [named[image.stem] for image in images]
    if len(masks) < len(images):
        lacking = next(image.name for image in images if image.stem not in named)
        raise InputError(f"there are {len(masks)} masks for {len(images)} images: {lacking}, for one, has none")
    return list(masks[: len(images)])


def open_picture(file: Path, size: tuple[int, int] | None = None, mode: str = "RGB") -> Image:
    """A picture, upright as its camera says.

    Args:
        size: width and height in pixels: it is cut to that shape, at its centre, and resized; its own if not given.
        mode: `RGB`, or `L` for a mask (white is what is painted).

    Raises:
        InputError: if it cannot be read.
    """
    from PIL import ImageOps

    with opened(file) as whole:
        picture = ImageOps.exif_transpose(whole).convert(mode)
    return picture if size in (None, picture.size) else ImageOps.fit(picture, size)


@contextmanager
def opened(file: Path) -> Iterator[Image]:
    """A picture whose pixels are all there, and are what they seem when they become red, green and blue.

    Raises:
        InputError: if it cannot be read, has more than 8 bits a channel, or is transparent anywhere.
    """
    from PIL import Image

    try:
        with Image.open(file) as picture:
            picture.load()
            deep = picture.mode.startswith(("I", "F"))
            clear = (
                picture.has_transparency_data
                and picture.convert("RGBA").getchannel("A").histogram()[255] < picture.width * picture.height
            )
            if not deep and not clear:
                yield picture
                return
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{file} cannot be read as a picture ({reason}): save it again, or take it out") from error
    what = f"has more than 8 bits a channel ({picture.mode})" if deep else "is transparent in places"
    raise InputError(f"{file} {what}, and nobody said what that stands for: save it as 8-bit RGB")
