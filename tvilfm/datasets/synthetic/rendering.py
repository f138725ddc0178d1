"""Render a person as seen by a visible or an infrared camera."""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from tvilfm.datasets.synthetic.people import ATTRIBUTES, RGB, Person, luminance

IMAGE_HEIGHT, IMAGE_WIDTH = 96, 48
SUPERSAMPLING = 3
VISIBLE_CAMERAS = (1, 2, 4, 5)
INFRARED_CAMERAS = (3, 6)

Colour = tuple[int, int, int]  # red, green, blue


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

    def paint(part: str) -> Colour:
        if infrared:
            value = int(255 * (0.9 if part == "skin" else person.reflectance[part]))
            return value, value, value
        return (214, 170, 140) if part == "skin" else RGB[person.attributes[f"{part}_colour"]]

    _Figure(draw, person.attributes, paint, rng, width, height).draw()
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

    def shade(factor: float) -> Colour:
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


class _Figure:
    """A person in a pose, drawn from back to front. Lengths are in pixels of the canvas.

    Args:
        canvas: where to draw.
        attributes: of the person.
        paint: the colour of a part.
        rng: draws the pose.
        width, height: of the canvas.
    """

    def __init__(
        self,
        canvas: ImageDraw.ImageDraw,
        attributes: Mapping[str, str],
        paint: Callable[[str], Colour],
        rng: np.random.Generator,
        width: int,
        height: int,
    ) -> None:
        self._canvas, self._attributes, self._paint = canvas, attributes, paint
        woman = attributes["sex"] == "woman"
        size = rng.uniform(0.92, 1.04)
        self._centre = width * (0.5 + rng.uniform(-0.06, 0.06))
        self._head_y = height * (0.115 + rng.uniform(-0.015, 0.02))
        self._unit = height * 0.01 * size  # about one hundredth of the person's height
        self._shoulder = (8.2 if woman else 10.2) * self._unit
        self._hip = (7.6 if woman else 6.8) * self._unit
        self._neck_y = self._head_y + 7.5 * self._unit
        self._waist_y = self._neck_y + 28 * self._unit
        self._foot_y = min(height * 0.985, self._waist_y + 43 * self._unit)
        self._stride = rng.uniform(0.6, 3.6) * self._unit
        self._swing = rng.uniform(-2.5, 2.5) * self._unit

    def draw(self) -> None:
        """Draw all parts."""
        if self._attributes["bag"] == "backpack":
            self._backpack()
        self._legs()
        if self._attributes["bottom"] == "skirt":
            self._skirt()
        self._arms()
        self._torso()
        if self._attributes["bag"] == "backpack":
            self._straps()
        self._head()
        if self._attributes["hat"] == "cap":
            self._cap()
        if self._attributes["bag"] == "handbag":
            self._handbag()

    def _backpack(self) -> None:
        half, unit = self._shoulder + 3.2 * self._unit, self._unit
        box = (self._centre - half, self._neck_y + 2 * unit, self._centre + half, self._neck_y + 19 * unit)
        self._canvas.rounded_rectangle(box, radius=4 * unit, fill=self._paint("bag"))

    def _straps(self) -> None:
        unit = self._unit
        for side in (-1, 1):
            x = self._centre + side * self._shoulder * 0.62
            line = (x, self._neck_y + 0.5 * unit, x, self._neck_y + 15 * unit)
            self._canvas.line(line, fill=self._paint("bag"), width=int(1.8 * unit))

    def _handbag(self) -> None:
        unit, fill = self._unit, self._paint("bag")
        x, y = self._centre + self._shoulder * 1.3 + self._swing, self._waist_y + 4 * unit
        handle = (x - 3 * unit, y - 5 * unit, x + 3 * unit, y + 5 * unit)
        self._canvas.arc(handle, 180, 360, fill=fill, width=SUPERSAMPLING)
        self._canvas.rounded_rectangle((x - 4.6 * unit, y, x + 4.6 * unit, y + 9 * unit), radius=unit, fill=fill)

    @property
    def _bare_from(self) -> float:
        """The share of a leg that the clothes cover."""
        return {"trousers": 1.0, "shorts": 0.42, "skirt": 0.55}[self._attributes["bottom"]]

    def _legs(self) -> None:
        unit, waist_y, foot_y = self._unit, self._waist_y, self._foot_y
        leg_width = 2.9 * unit
        for side in (-1, 1):
            top_x = self._centre + side * self._hip * 0.5
            foot_x = self._centre + side * (self._hip * 0.5 + self._stride)
            skin = (top_x, waist_y, foot_x, foot_y)
            self._canvas.line(skin, fill=self._paint("skin"), width=int(leg_width * 1.6))
            if self._attributes["bottom"] != "skirt":
                knee = (top_x + (foot_x - top_x) * self._bare_from, waist_y + (foot_y - waist_y) * self._bare_from)
                trousers = (top_x, waist_y - unit, *knee)
                self._canvas.line(trousers, fill=self._paint("bottom"), width=int(leg_width * 2.3))
            shoe = (foot_x - 3.6 * unit, foot_y - 3.4 * unit, foot_x + 3.6 * unit, foot_y + 1.2 * unit)
            self._canvas.ellipse(shoe, fill=self._paint("shoe"))

    def _skirt(self) -> None:
        centre, hip, top_y = self._centre, self._hip, self._waist_y - self._unit
        hem_y = self._waist_y + (self._foot_y - self._waist_y) * self._bare_from
        corners = [(centre - hip, top_y), (centre + hip, top_y), (centre + hip * 1.75, hem_y)]
        self._canvas.polygon([*corners, (centre - hip * 1.75, hem_y)], fill=self._paint("bottom"))

    def _arms(self) -> None:
        unit = self._unit
        reach = 0.42 if self._attributes["top"] == "t-shirt" else 0.93
        for side in (-1, 1):
            start = (self._centre + side * self._shoulder * 0.92, self._neck_y + 3 * unit)
            end = (self._centre + side * (self._shoulder * 1.25) + self._swing, self._waist_y + 4 * unit)
            self._canvas.line((*start, *end), fill=self._paint("skin"), width=int(3.2 * unit))
            sleeve = (start[0] + (end[0] - start[0]) * reach, start[1] + (end[1] - start[1]) * reach)
            self._canvas.line((*start, *sleeve), fill=_darker(self._paint("top"), 0.9), width=int(4.6 * unit))

    def _torso(self) -> None:
        unit, centre, neck_y, top = self._unit, self._centre, self._neck_y, self._attributes["top"]
        end_y = {"t-shirt": 0.0, "shirt": 1.0, "jacket": 2.0, "coat": 19.0}[top] * unit + self._waist_y
        flare = 1.45 if top == "coat" else 1.0
        corners = [
            (centre - self._shoulder, neck_y + 1.2 * unit),
            (centre - 3 * unit, neck_y - 0.8 * unit),
            (centre + 3 * unit, neck_y - 0.8 * unit),
            (centre + self._shoulder, neck_y + 1.2 * unit),
            (centre + self._hip * flare, end_y),
            (centre - self._hip * flare, end_y),
        ]
        self._canvas.polygon(corners, fill=self._paint("top"))
        self._pattern(neck_y + 2.5 * unit, end_y - unit)
        if top in ("jacket", "coat"):
            zip_line = (centre, neck_y, centre, end_y)
            self._canvas.line(zip_line, fill=_darker(self._paint("top"), 0.45), width=int(1.5 * unit))
            left, right = centre - 3 * unit, centre + 3 * unit
            collar = [(left, neck_y - unit), (right, neck_y - unit), (centre, neck_y + 8 * unit)]
            self._canvas.polygon(collar, fill=_contrast(self._paint("top")))

    def _pattern(self, start_y: float, end_y: float) -> None:
        """Draw the stripes of the torso between two heights."""
        unit, centre, hip, stripe = self._unit, self._centre, self._hip, _contrast(self._paint("top"))
        if self._attributes["pattern"] in ("striped", "checked"):
            for y in np.arange(start_y, end_y, 4.6 * unit):
                above = max(0.0, (self._waist_y - y) / (self._waist_y - self._neck_y))
                half = hip + (self._shoulder - hip) * above
                line = (centre - half * 0.97, y, centre + half * 0.97, y)
                self._canvas.line(line, fill=stripe, width=max(1, int(1.5 * unit)))
        if self._attributes["pattern"] == "checked":
            for x in np.arange(-hip * 0.9, hip * 0.95, 3.8 * unit):
                self._canvas.line((centre + x, start_y, centre + x, end_y), fill=stripe, width=max(1, int(1.2 * unit)))

    @property
    def _radius(self) -> float:
        """Half the width of the head."""
        return 5.6 * self._unit

    def _head(self) -> None:
        unit, centre, head_y, radius = self._unit, self._centre, self._head_y, self._radius
        skin, hair = self._paint("skin"), self._paint("hair")
        if self._attributes["hair"] == "long":
            for side in (-1, 1):
                near, far = sorted((centre + side * radius * 0.72, centre + side * radius * 1.5))
                strand = (near, head_y - radius, far, self._neck_y + 9 * unit)
                self._canvas.rounded_rectangle(strand, radius=2 * unit, fill=hair)
        if self._attributes["hair"] == "ponytail":
            tail = (centre + radius * 0.7, head_y - radius * 0.6, centre + radius * 2.1, head_y + radius * 2.4)
            self._canvas.ellipse(tail, fill=hair)
        self._canvas.rectangle((centre - 2 * unit, head_y, centre + 2 * unit, self._neck_y + unit), fill=skin)
        face = (centre - radius, head_y - radius * 1.2, centre + radius, head_y + radius * 1.2)
        self._canvas.ellipse(face, fill=skin)
        top = (centre - radius * 1.12, head_y - radius * 1.35, centre + radius * 1.12, head_y + radius * 0.9)
        self._canvas.pieslice(top, 180, 360, fill=hair)

    def _cap(self) -> None:
        centre, head_y, radius, fill = self._centre, self._head_y, self._radius, _darker(self._paint("top"), 0.6)
        crown = (centre - radius * 1.25, head_y - radius * 1.75, centre + radius * 1.25, head_y + radius * 0.7)
        self._canvas.pieslice(crown, 180, 360, fill=fill)
        peak = (centre - radius * 1.25, head_y - radius * 0.62, centre + radius * 1.9, head_y - radius * 0.3)
        self._canvas.rectangle(peak, fill=fill)


def _darker(rgb: Colour, factor: float) -> Colour:
    return int(rgb[0] * factor), int(rgb[1] * factor), int(rgb[2] * factor)


def _contrast(rgb: Colour) -> Colour:
    """Return a stripe colour with contrast: darker on bright cloth, brighter on dark cloth."""
    if luminance(rgb) > 0.4:
        return _darker(rgb, 0.45)
    return min(255, rgb[0] + 110), min(255, rgb[1] + 110), min(255, rgb[2] + 110)
