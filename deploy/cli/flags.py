"""Flags made of settings: a field's type, bounds, default and docstring are said there once and read from there.

A flag's value is checked as the field's would be, when the command line is parsed. `add` notes it as
`Sampling.steps`, and `read(args, Sampling)` takes together all that were given of a kind. What reads flags raises an
InputError that names the flag and says what would be right.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from deploy.artifacts.usage import usage_of, use
from deploy.recipe.material import calibration_material, parse_classes
from deploy.recipe.prompts import default_source
from deploy.recipe.recipe import check_groups, parse_budget
from exporters.settings import OneOf
from slimdiff.budget import BUDGETS, Budget, BudgetKind
from slimdiff.errors import InputError
from slimdiff.loading.naming import cached_snapshot, check_lora, choose_variants, find_model
from slimdiff.prompts.material import Material, find_pictures
from slimdiff.settings import (
    MOST,
    CalibrationSettings,
    Lora,
    LoraSettings,
    PlanSettings,
    Sampling,
    SteeringSettings,
    WeightSettings,
)

S = TypeVar("S", bound=BaseModel)
MODEL = "'demo', a diffusers pipeline directory, a safetensors file of a whole model, or a hub id"
"""What a model may be, in the help."""
PLANNING = ("groups", "align", "allocation", "precision", "int8_error", "replans")
"""The fields of `PlanSettings` that are flags."""
_ARTIFACTS = ("MODEL", "ARTIFACT", "BASE", "CANDIDATE", "DENSE", "SLIM", "DIR_OR_FILE")
"""What may be a hub id, to be looked up in the hub's local cache where the hub is not asked."""
_METAVARS: dict[Any, str] = {int: "N", float: "X"}


def add(parser: Any, kind: type[BaseModel], *names: str, flag: str = "", **changed: Any) -> None:
    """A flag for each field of these names.

    Args:
        flag: where it is not called as its field is.
        changed: arguments of argparse's `add_argument` in the place of those that the field gives.
    """
    for name in names:
        field = kind.model_fields[name]
        inner = field.annotation
        if get_origin(inner) in (Union, UnionType):
            inner = next(part for part in get_args(inner) if part is not type(None))
        how: dict[str, Any] = {}
        if get_origin(inner) is Literal:
            how["choices"] = get_args(inner)
        elif named := next((part for part in field.metadata if isinstance(part, OneOf)), None):
            how["choices"] = named.choices()
        elif inner is bool:
            how |= {"action": "store_const", "const": True}
        elif not changed.keys() & {"action", "nargs"}:  # the settings check a list's items that come one by one
            listed = get_origin(inner) is tuple
            how |= {"metavar": "LIST" if listed else _METAVARS.get(inner, "TEXT"), "type": _checked(field, listed)}
        default = changed.get("default", field.get_default(call_default_factory=True))
        how |= {"help": _help(field.description or "", default).replace("%", "%%"), **changed}
        parser.add_argument(flag or f"--{name.replace('_', '-')}", dest=f"{kind.__name__}.{name}", **how)


def read(args: argparse.Namespace, kind: type[S], **more: Any) -> S:
    """Settings from the flags that were given; the rest keeps its default."""
    flags = {name: getattr(args, f"{kind.__name__}.{name}", None) for name in kind.model_fields}
    try:
        return kind(**{name: value for name, value in flags.items() if value is not None} | more)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # of several together
            raise InputError(_reason(error)) from error
        flag = str(first["loc"][0]).replace("_", "-")
        raise InputError(f"--{flag}: {_reason(error)}, not {first['input']!r}") from error


def text(parser: Any, name: str, metavar: str | None, what: str, **more: Any) -> None:
    """An argument that is no setting; a flag if its name has dashes. `what` is its help."""
    if metavar in _ARTIFACTS:
        more.setdefault("type", lambda value: str(cached_snapshot(value) or value))
    parser.add_argument(name, metavar=metavar, help=what.replace("%", "%%"), **more)


def sentence(parser: Any, name: str, what: str, **more: Any) -> None:
    """A flag for text that people wrote, in UTF-8 whatever the locale."""
    text(parser, name, "TEXT", what, type=lambda said: os.fsencode(said).decode("utf-8", "surrogateescape"), **more)


def several(parser: Any, name: str, metavar: str | None, what: str, **more: Any) -> None:
    """A flag that may be given again for more."""
    text(parser, name, metavar, f"{what}; again for more", action="append", default=[], **more)


def whole(parser: Any, name: str, what: str, *, most: int = MOST, default: int | None = None, **more: Any) -> None:
    """A flag for a whole number from 1 to `most`."""
    text(parser, name, "N", _help(what, default), type=whole_number(most), default=default, **more)


def whole_number(most: int = MOST) -> Callable[[str], int]:
    """What reads a whole number from 1 to `most`."""

    def convert(value: str) -> int:
        number = int(value) if value.isascii() and value.isdigit() and len(value) < 20 else 0
        if not 1 <= number <= most:
            bound = f"at most {most}" if value.strip("0").isdigit() else "at least 1"
            raise argparse.ArgumentTypeError(f"must be a whole number of {bound}, not {value!r}")
        return number

    return convert


def add_lora(parser: Any, flag: str = "--lora", into: str = "the model") -> None:
    """A flag for LoRA files; the namespace gets a list of `Lora`. What is no file is refused at once."""
    what = _help(LoraSettings.model_fields["lora"].description or "", ())
    what = what.replace("the weights", f"{into}'s weights")
    several(parser, flag, "FILE[:SCALE]", what, type=_lora)


def _lora(text: str) -> Lora:
    try:
        found = Lora.model_validate(text)
        check_lora(Path(found.file))
    except (ValidationError, InputError) as error:
        number = f", not {text!r}" if isinstance(error, ValidationError) else ""
        raise argparse.ArgumentTypeError(f"{_reason(error)}{number}") from error
    return found


def add_steering(parser: Any) -> None:
    """What steers the model beside its prompt; `read(args, SteeringSettings)` takes it."""
    add(parser, SteeringSettings, "controlnet", action="append", metavar="DIR")
    add(parser, SteeringSettings, "adapter", metavar="DIR")
    add(parser, SteeringSettings, "ip_adapter", metavar="FILE[:SCALE]")


def add_ip_adapter_image(parser: Any) -> None:
    """What an IP-Adapter is shown."""
    text(parser, "--ip-adapter-image", "FILE", "a picture as a prompt, of a model with an IP-Adapter")


def find_ip_adapter_image(args: argparse.Namespace) -> Path | None:
    """The file of `add_ip_adapter_image`, which can be read."""
    shown = args.ip_adapter_image
    return None if shown is None else find_pictures(shown, "IP-Adapter images")[0]


def add_schedule(parser: Any) -> None:
    """A schedule in the place of the artifact's own, for `find_schedule`."""
    text(parser, "--schedule", "FILE", "which steps are guided and whole (default: the artifact's own); none: all are")


def add_variant(parser: Any) -> None:
    """Which weights are read, for `read_variants`."""
    add(parser, WeightSettings, "variant")


def read_variants(args: argparse.Namespace, *models: str | None) -> dict[str | None, str | None]:
    """The variant to read of each of the models that the command opens (`choose_variants`)."""
    return choose_variants(read(args, WeightSettings).variant, *models)


def add_pipeline(parser: Any) -> None:
    """The model that completes a component folder, for commands whose MODEL may be one."""
    text(parser, "--pipeline", "MODEL", "whose other components go with a denoiser alone (default: its own pipeline's)")


def add_usage(parser: Any, *names: str, **otherwise: Any) -> None:
    """Flags of `steps` and `guidance` that an artifact may know itself, for `read_usage`.

    Args:
        otherwise: their values where it does not, if they are not those of `Sampling`.
    """
    for name in names:
        default = otherwise.get(name, Sampling.model_fields[name].default)
        what = _help(Sampling.model_fields[name].description or "", None)
        add(parser, Sampling, name, help=f"{what} (default: what it was calibrated with, else {default:g})")


def read_usage(args: argparse.Namespace, *artifacts: str | None, **otherwise: Any) -> Sampling:
    """How the artifacts are used: by the flags that were given, else as the first that knows was calibrated.

    Args:
        otherwise: in the place of the defaults of `Sampling`, where neither says so.
    """
    said = use(read_sampling(args), usage_of(*artifacts))
    return said.model_copy(update={k: v for k, v in otherwise.items() if k not in said.model_fields_set})


def add_calibration(parser: Any, pictures: str = "") -> None:
    """What the denoiser is watched doing, for `read_calibration`, and making from what, for `read_material`.

    Args:
        pictures: see `add_material`.
    """
    by_default = "'general', the 500 built-in ones; for demo its own"
    text(parser, "--prompts", "FILE", f"calibration prompts, one a line (default: {by_default})")
    add_material(parser, pictures)
    add(parser, CalibrationSettings, "samples")
    add(parser, Sampling, "steps", "guidance", "batch", "seed", "height", "width", "scheduler", "whole_prompts")
    add_arguments(parser)


def add_material(parser: Any, pictures: str = "") -> None:
    """What images are made from, besides prompts.

    Args:
        pictures: goes before the names of the flags for folders, where `--images` is a number of images.
    """
    made = "images that images are made from (image to image, inpainting, InstructPix2Pix, upscaling), by name in order"
    text(parser, f"--{pictures}images", "DIR", made, dest="input_images")
    painted = "masks of these images, of their names or in their order; white is painted"
    text(parser, f"--{pictures}masks", "DIR", painted, dest="input_masks")
    steer = "pictures that steer a model with a ControlNet or a T2I-Adapter, by name in order"
    text(parser, "--control-images", "DIR", steer)
    text(parser, "--classes", "LIST", "of a class-conditional model, such as 207,360 or 0-999", type=classes)


def add_arguments(parser: Any) -> None:
    """More arguments of the pipeline's call, for `read_sampling`."""
    changed = "how much of an image is made anew, of image to image and inpainting: above 0, 1 for all of it"
    text(parser, "--strength", "X", f"{changed} (default: the pipeline's own)", type=_strength)
    add_argument(parser)


def add_argument(parser: Any, what: str = "of the pipeline's call, such as image_guidance_scale=2") -> None:
    """`--argument`, for `read_sampling`."""
    several(parser, "--argument", "NAME=VALUE", what, type=_argument)


def read_sampling(args: argparse.Namespace, **more: Any) -> Sampling:
    """The flags of `Sampling`, with the `--argument`s and `--strength`."""
    arguments = dict(getattr(args, "argument", []))
    if (strength := getattr(args, "strength", None)) is not None:
        if "strength" in arguments:
            raise InputError("--strength and --argument strength=... say the same: give one of them")
        arguments["strength"] = strength
    return read(args, Sampling, **({"arguments": arguments} if arguments else {}), **more)


def _strength(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"is a number above 0 and up to 1, such as 0.8, not {text!r}")
    return number


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not equals:
        raise argparse.ArgumentTypeError(f"is like image_guidance_scale=2, not {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def classes(text: str) -> str:
    """What checks a flag of classes."""
    try:
        parse_classes(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def read_calibration(args: argparse.Namespace) -> CalibrationSettings:
    """What `add_calibration` takes, and every other flag of `CalibrationSettings`."""
    return read(args, CalibrationSettings, sampling=read_sampling(args))


def read_material(
    args: argparse.Namespace, samples: int, more: int = 0, model: str | None = None
) -> tuple[str, Material]:
    """Where the prompts of `add_calibration` come from, and what up to `samples + more` images are made from.

    It also refuses what is no model, and a denoiser alone without its pipeline.

    Args:
        model: whose prompts they are by default; the command's MODEL, perhaps with a `--pipeline`, if not given.
    """
    find_model(model or args.model, None if model else getattr(args, "pipeline", None))
    model = model or args.model
    source = args.prompts or default_source(model)
    named = named_material(args)
    return source, calibration_material(source, samples, more, **named, default=args.prompts is None)


def named_material(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_material` takes: folders and classes, by the names that a recipe has for them."""
    return {
        "images": args.input_images,
        "masks": args.input_masks,
        "control_images": args.control_images,
        "classes": args.classes,
    }


def read_planning(args: argparse.Namespace) -> PlanSettings:
    """The flags of `PLANNING`; may load torch where groups are named, so it comes after what is cheap to check."""
    planning = read(args, PlanSettings)
    check_groups(planning, "--groups")
    return planning


def add_budget(parser: Any) -> None:
    """A flag for every kind of budget, for `read_budget`."""
    for kind in BUDGETS.values():
        text(parser, kind.flag, "AMOUNT", kind.help, dest=f"Budget.{kind.name}", type=_budget(kind))


def read_budget(args: argparse.Namespace) -> Budget | None:
    """The budget; None if there is no flag of one."""
    return next((b for kind in BUDGETS if (b := getattr(args, f"Budget.{kind}")) is not None), None)


def _budget(kind: BudgetKind) -> Callable[[str], Budget]:
    def convert(text: str) -> Budget:
        try:
            return parse_budget(kind.name, text)
        except InputError as error:
            raise argparse.ArgumentTypeError(_reason(error)) from error

    return convert


def _checked(field: FieldInfo, listed: bool) -> Callable[[str], Any]:
    """The type of a flag whose value is a field's; `listed`: several, with commas between them."""
    annotation: Any = Annotated[field.annotation, field]

    def convert(text: str) -> Any:
        value = [part.strip() for part in text.split(",") if part.strip()] if listed else text
        if listed and not value:
            raise argparse.ArgumentTypeError("is empty")
        try:
            return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False)).validate_python(value)
        except ValidationError as error:
            raise argparse.ArgumentTypeError(f"{_reason(error)}, not {text!r}") from error

    return convert


def _reason(error: Exception) -> str:
    message = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _help(text: str, default: Any) -> str:
    """A docstring as argparse takes it: a phrase, with the default where there is one."""
    text = " ".join(text.replace("`", "").split()).rstrip(".")
    if re.match(r"[A-Z][a-z]*\b", text):
        text = text[0].lower() + text[1:]
    if isinstance(default, tuple) and default:
        default = ",".join(default)
    if isinstance(default, float):
        default = f"{default:g}"
    if default not in (None, (), [], {}) and default is not False:
        text += f" (default: {default})"
    return text
