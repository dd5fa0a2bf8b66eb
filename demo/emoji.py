"""Emoji pictures and their names, fetched from the npm registry with the npm client.

Two styles: ``fluent`` (Microsoft's Fluent emoji, MIT) is what the demo fine-tunes on, ``noto``
(Google's Noto emoji, Apache-2.0) is what the demo model was pre-trained on. Names come from
``emoji-datasource`` (MIT) for both, so the two styles share one vocabulary of captions.
"""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

PACKAGES = {
    "names": "emoji-datasource@16.0.0",
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
    "noto": "emoji-datasource-google@16.0.0",
}
_PICTURES = {
    "fluent": ("@lobehub/fluent-emoji-3d/assets", ".webp"),
    "noto": ("emoji-datasource-google/img/google/64", ".png"),
}
_TONES = {
    "1f3fb": "light skin tone",
    "1f3fc": "medium-light skin tone",
    "1f3fd": "medium skin tone",
    "1f3fe": "medium-dark skin tone",
    "1f3ff": "dark skin tone",
}
# Points that tell variants apart, not things: joiners and gender signs.
_SILENT = {"fe0f", "200d", "2640", "2642"}
# Gendered people and the neutral one that stands for them in `Emoji.family`.
_NEUTRAL = {
    "1f468": "1f9d1",
    "1f469": "1f9d1",
    "1f466": "1f9d2",
    "1f467": "1f9d2",
    "1f474": "1f9d3",
    "1f475": "1f9d3",
    "1f934": "1fac5",
    "1f478": "1fac5",
    "1f930": "1fac4",
    "1fac3": "1fac4",
    "1f936": "1f385",
}


@dataclass(frozen=True)
class Emoji:
    """One emoji in one style. ``code`` is its code-point sequence, lower-case hex with dashes."""

    code: str
    text: str
    category: str
    subcategory: str
    path: Path

    @property
    def tones(self) -> list[str]:
        """Names of the skin tones in the sequence, in order; empty for the plain emoji."""
        return [_TONES[p] for p in self.code.split("-") if p in _TONES]

    @property
    def family(self) -> str:
        """Code points without skin tones and genders: equal for variants of one emoji."""
        points = [_NEUTRAL.get(p, p) for p in self.code.split("-") if p not in _TONES]
        return "-".join([p for p in points if p not in _SILENT] or points)

    def picture(self, size: int) -> Image.Image:
        """The emoji on white as an RGB image of ``size`` x ``size`` pixels."""
        picture = Image.open(self.path).convert("RGBA")
        side = max(picture.size)
        page = Image.new("RGBA", (side, side), "white")
        page.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return page.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def fetch(cache: Path, *names: str) -> None:
    """Install the npm packages of ``names`` (keys of `PACKAGES`) under ``cache``; needs npm."""
    cache.mkdir(parents=True, exist_ok=True)
    packages = [PACKAGES[name] for name in names]
    subprocess.run(
        ["npm", "install", "--ignore-scripts", "--no-audit", "--prefix", str(cache), *packages],
        check=True,
    )


def load(cache: Path, style: str) -> list[Emoji]:
    """All emoji of ``style``, with skin-tone variants, ordered by code."""
    modules = cache / "node_modules"
    folder, suffix = _PICTURES[style]
    found = []
    for entry in json.loads((modules / "emoji-datasource/emoji.json").read_text()):
        name = (entry["name"] or entry["short_name"]).lower()
        subcategory = entry["subcategory"].replace("-", " ")
        variants = [entry, *entry.get("skin_variations", {}).values()]
        for variant in variants:
            code = variant["unified"].lower()
            tones = [_TONES[p] for p in code.split("-") if p in _TONES]
            text = ", ".join([name, *dict.fromkeys(tones), subcategory])
            path = modules / folder / f"{code}{suffix}"
            if path.exists():
                found.append(Emoji(code, text, entry["category"], subcategory, path))
    return sorted(found, key=lambda emoji: emoji.code)
