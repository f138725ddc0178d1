"""Render a person as seen by a visible or an infrared camera."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from tvilfm.datasets.synthetic.people import ATTRIBUTES, RGB, Person, luminance

IMAGE_HEIGHT, IMAGE_WIDTH = 96, 48
SUPERSAMPLING = 3
VISIBLE_CAMERAS = (1, 2, 4, 5)
INFRARED_CAMERAS = (3, 6)


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """An image and the attributes that can be seen in it."""

    pixels: npt.NDArray[np.uint8]  # H x W x 3
    seen: frozenset[str]


def render(person: Person, camid: int, index: int, *, seed: int) -> Rendering:
    """Render one crop: the person's fixed look under the camera's light, pose, background, noise and occlusion.

    Args:
        person: person to render.
        camid: 1, 2, 4, 5 visible; 3, 6 infrared (as in SYSU-MM01).
        index: number of the image of this person in this camera.
        seed: seed of the benchmark; the same four arguments return the same bytes.

    Returns:
        96 x 48 x 3 uint8 (infrared: three equal channels) and the attributes that are visible in it.
    """
    rng = np.random.default_rng([seed, 2, person.pid, camid, index])
    camera = np.random.default_rng([seed, 3, camid])
    infrared = camid in INFRARED_CAMERAS
    scale = SUPERSAMPLING
    width, height = IMAGE_WIDTH * scale, IMAGE_HEIGHT * scale
    canvas = _background(camera, rng, width, height, infrared)
    draw = ImageDraw.Draw(canvas)

    def paint(part: str) -> tuple[int, int, int]:
        if infrared:
            value = int(255 * (0.9 if part == "skin" else person.reflectance[part]))
            return value, value, value
        return (214, 170, 140) if part == "skin" else RGB[person.attributes[f"{part}_colour"]]

    _draw_person(draw, person.attributes, paint, rng, width, height, scale)
    hidden: frozenset[str] = frozenset()
    if rng.random() < 0.12:
        hidden = _occlude(draw, rng, width, height, infrared)
    if rng.random() < 0.5:
        canvas = canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    canvas = canvas.resize((IMAGE_WIDTH, IMAGE_HEIGHT), Image.Resampling.BOX)
    canvas = canvas.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.0, 0.5))))

    values = np.asarray(canvas, dtype=np.float32) / 255.0
    values = np.power(values, camera.uniform(0.85, 1.15) * rng.uniform(0.93, 1.07))
    values *= camera.uniform(0.85, 1.1) * rng.uniform(0.92, 1.08)
    if infrared:
        rows = np.linspace(-1, 1, IMAGE_HEIGHT)[:, None] ** 2
        columns = np.linspace(-1, 1, IMAGE_WIDTH)[None, :] ** 2
        values *= (1.0 - 0.15 * (rows + columns))[:, :, None]
        values += rng.normal(0.0, 0.025, values.shape[:2])[:, :, None]
    else:
        values *= camera.uniform(0.92, 1.08, 3)
        values += rng.normal(0.0, 0.02, values.shape)
    pixels = (np.clip(values, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return Rendering(pixels=pixels, seen=frozenset(ATTRIBUTES) - hidden)


def _background(
    camera: np.random.Generator, rng: np.random.Generator, width: int, height: int, infrared: bool
) -> Image.Image:
    hue, saturation = camera.random(), 0.0 if infrared else camera.uniform(0.05, 0.25)
    value = camera.uniform(0.25, 0.4) if infrared else camera.uniform(0.45, 0.75)

    def shade(factor: float) -> tuple[int, int, int]:
        red, green, blue = colorsys.hsv_to_rgb(hue, saturation, min(1.0, value * factor))
        return int(red * 255), int(green * 255), int(blue * 255)

    canvas = Image.new("RGB", (width, height), shade(rng.uniform(0.9, 1.1)))
    draw = ImageDraw.Draw(canvas)
    horizon = int(height * rng.uniform(0.55, 0.75))
    draw.rectangle((0, horizon, width, height), fill=shade(rng.uniform(0.65, 0.8)))
    for _ in range(int(rng.integers(0, 4))):
        x, y = int(rng.uniform(-0.1, 0.9) * width), int(rng.uniform(0, 0.6) * height)
        box = (x, y, x + int(rng.uniform(0.1, 0.4) * width), y + int(rng.uniform(0.1, 0.5) * height))
        draw.rectangle(box, fill=shade(rng.uniform(0.8, 1.25)))
    return canvas


def _occlude(
    draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int, infrared: bool
) -> frozenset[str]:
    """Draw a bench or a pillar in front of the person and return the attributes that it hides."""
    fill = (90, 90, 90) if infrared else tuple(int(v) for v in rng.integers(60, 140, 3))
    if rng.random() < 0.6:
        draw.rectangle((0, int(height * rng.uniform(0.72, 0.82)), width, height), fill=fill)
        return frozenset({"shoe_colour"})
    left = rng.random() < 0.5
    depth = int(width * rng.uniform(0.15, 0.3))
    draw.rectangle((0, 0, depth, height) if left else (width - depth, 0, width, height), fill=fill)
    return frozenset()


def _draw_person(draw, attributes, paint, rng, width, height, scale) -> None:  # type: ignore[no-untyped-def]
    """Draw back to front: rear bag, legs, shoes, arms, torso and its pattern, head, hair, hat, hand bag."""
    woman = attributes["sex"] == "woman"
    size = rng.uniform(0.92, 1.04)
    centre = width * (0.5 + rng.uniform(-0.06, 0.06))
    head_y = height * (0.115 + rng.uniform(-0.015, 0.02))
    unit = height * 0.01 * size

    shoulder = (8.2 if woman else 10.2) * unit
    hip = (7.6 if woman else 6.8) * unit
    neck_y = head_y + 7.5 * unit
    waist_y = neck_y + 28 * unit
    foot_y = min(height * 0.985, waist_y + 43 * unit)
    stride = rng.uniform(0.6, 3.6) * unit
    swing = rng.uniform(-2.5, 2.5) * unit

    if attributes["bag"] == "backpack":
        draw.rounded_rectangle(
            (
                centre - shoulder - 3.2 * unit,
                neck_y + 2 * unit,
                centre + shoulder + 3.2 * unit,
                neck_y + 19 * unit,
            ),
            radius=4 * unit,
            fill=paint("bag"),
        )

    leg_width = 2.9 * unit
    bare_from = {"trousers": 1.0, "shorts": 0.42, "skirt": 0.55}[attributes["bottom"]]
    for side in (-1, 1):
        top_x, foot_x = centre + side * hip * 0.5, centre + side * (hip * 0.5 + stride)
        draw.line((top_x, waist_y, foot_x, foot_y), fill=paint("skin"), width=int(leg_width * 1.6))
        if attributes["bottom"] != "skirt":
            knee = (top_x + (foot_x - top_x) * bare_from, waist_y + (foot_y - waist_y) * bare_from)
            draw.line((top_x, waist_y - unit, *knee), fill=paint("bottom"), width=int(leg_width * 2.3))
        draw.ellipse(
            (foot_x - 3.6 * unit, foot_y - 3.4 * unit, foot_x + 3.6 * unit, foot_y + 1.2 * unit),
            fill=paint("shoe"),
        )
    if attributes["bottom"] == "skirt":
        hem = waist_y + (foot_y - waist_y) * bare_from
        draw.polygon(
            [
                (centre - hip, waist_y - unit),
                (centre + hip, waist_y - unit),
                (centre + hip * 1.75, hem),
                (centre - hip * 1.75, hem),
            ],
            fill=paint("bottom"),
        )

    top_end = {"t-shirt": 0.0, "shirt": 1.0, "jacket": 2.0, "coat": 19.0}[attributes["top"]] * unit + waist_y
    for side in (-1, 1):
        start = (centre + side * shoulder * 0.92, neck_y + 3 * unit)
        end = (centre + side * (shoulder * 1.25) + swing, waist_y + 4 * unit)
        draw.line((*start, *end), fill=paint("skin"), width=int(3.2 * unit))
        reach = 0.42 if attributes["top"] == "t-shirt" else 0.93
        sleeve = (start[0] + (end[0] - start[0]) * reach, start[1] + (end[1] - start[1]) * reach)
        draw.line((*start, *sleeve), fill=_darker(paint("top"), 0.9), width=int(4.6 * unit))
    flare = 1.45 if attributes["top"] == "coat" else 1.0
    torso = [
        (centre - shoulder, neck_y + 1.2 * unit),
        (centre - 3 * unit, neck_y - 0.8 * unit),
        (centre + 3 * unit, neck_y - 0.8 * unit),
        (centre + shoulder, neck_y + 1.2 * unit),
        (centre + hip * flare, top_end),
        (centre - hip * flare, top_end),
    ]
    draw.polygon(torso, fill=paint("top"))
    stripe = _contrast(paint("top"))
    body = (neck_y + 2.5 * unit, top_end - unit)
    if attributes["pattern"] in ("striped", "checked"):
        for y in np.arange(body[0], body[1], 4.6 * unit):
            half = hip + (shoulder - hip) * max(0.0, (waist_y - y) / (waist_y - neck_y))
            draw.line((centre - half * 0.97, y, centre + half * 0.97, y), fill=stripe, width=max(1, int(1.5 * unit)))
    if attributes["pattern"] == "checked":
        for x in np.arange(-hip * 0.9, hip * 0.95, 3.8 * unit):
            draw.line((centre + x, body[0], centre + x, body[1]), fill=stripe, width=max(1, int(1.2 * unit)))
    if attributes["top"] in ("jacket", "coat"):
        draw.line((centre, neck_y, centre, top_end), fill=_darker(paint("top"), 0.45), width=int(1.5 * unit))
        draw.polygon(
            [
                (centre - 3 * unit, neck_y - unit),
                (centre + 3 * unit, neck_y - unit),
                (centre, neck_y + 8 * unit),
            ],
            fill=_contrast(paint("top")),
        )
    if attributes["bag"] == "backpack":
        for side in (-1, 1):
            x = centre + side * shoulder * 0.62
            draw.line((x, neck_y + 0.5 * unit, x, neck_y + 15 * unit), fill=paint("bag"), width=int(1.8 * unit))

    radius = 5.6 * unit
    hair = paint("hair")
    if attributes["hair"] == "long":
        for side in (-1, 1):
            near, far = sorted((centre + side * radius * 0.72, centre + side * radius * 1.5))
            draw.rounded_rectangle((near, head_y - radius, far, neck_y + 9 * unit), radius=2 * unit, fill=hair)
    if attributes["hair"] == "ponytail":
        draw.ellipse(
            (centre + radius * 0.7, head_y - radius * 0.6, centre + radius * 2.1, head_y + radius * 2.4),
            fill=hair,
        )
    draw.rectangle((centre - 2 * unit, head_y, centre + 2 * unit, neck_y + unit), fill=paint("skin"))
    draw.ellipse((centre - radius, head_y - radius * 1.2, centre + radius, head_y + radius * 1.2), fill=paint("skin"))
    draw.pieslice(
        (centre - radius * 1.12, head_y - radius * 1.35, centre + radius * 1.12, head_y + radius * 0.9),
        180,
        360,
        fill=hair,
    )
    if attributes["hat"] == "cap":
        cap = _darker(paint("top"), 0.6)
        draw.pieslice(
            (centre - radius * 1.25, head_y - radius * 1.75, centre + radius * 1.25, head_y + radius * 0.7),
            180,
            360,
            fill=cap,
        )
        draw.rectangle(
            (centre - radius * 1.25, head_y - radius * 0.62, centre + radius * 1.9, head_y - radius * 0.3),
            fill=cap,
        )
    if attributes["bag"] == "handbag":
        x, y = centre + shoulder * 1.3 + swing, waist_y + 4 * unit
        draw.arc((x - 3 * unit, y - 5 * unit, x + 3 * unit, y + 5 * unit), 180, 360, fill=paint("bag"), width=scale)
        draw.rounded_rectangle((x - 4.6 * unit, y, x + 4.6 * unit, y + 9 * unit), radius=unit, fill=paint("bag"))


def _darker(rgb: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    return int(rgb[0] * factor), int(rgb[1] * factor), int(rgb[2] * factor)


def _contrast(rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return a stripe colour with contrast: darker on bright cloth, brighter on dark cloth."""
    if luminance(rgb) > 0.4:
        return _darker(rgb, 0.45)
    return min(255, rgb[0] + 110), min(255, rgb[1] + 110), min(255, rgb[2] + 110)
