"""A report of a few pairs, with all that is awkward in captions."""

import json

from PIL import Image

from iet_sd.evaluation import report as report_module

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<!-- <b onmouseover='window.hacked = 1'>\"quoted\" & 'single'</b>",
    "a fox 🦊 and an astronaut 👩‍🚀",
    "\u202eمرحبا بالعالم shalom שלום\u202c",
    "x" * 1000 + " word" * 200,  # 2,000 characters, half of them with nowhere to break
    "\u2028 {{ 7 * 7 }} ${7 * 7} \\u003c &lt;",
]
PROMPTS = [*HOSTILE, *(f"a cat {number}" for number in range(6))]


class Pictures:
    """Images of one colour each, of several shapes."""

    def __init__(self, prefix, count, green):
        self.ids = [f"{prefix}-{number}" for number in range(count)]
        self.green = green

    def __getitem__(self, index):
        if not 0 <= index < len(self.ids):
            raise IndexError(index)
        size = [(16, 16), (300, 200), (20, 40)][index % 3]
        return Image.new("RGB", size, (20 * index, self.green, 255 - 20 * index))


GENERATED = Pictures("generation", len(PROMPTS), green=100)
TRAIN = Pictures("train", 5, green=200)


def pair(number, **changes):
    """A row of the pairs; later ones are less similar, and some things are unknown."""
    similarity = 0.95 - 0.05 * number
    own = None if number % 4 == 3 else similarity if number % 2 else similarity - 0.013 * number
    return {
        "generation": GENERATED.ids[number],
        "prompt": PROMPTS[number],
        "prompt_id": f"p{number}",
        "image": 0,
        "path": f"generations/p{number}-0.png",
        "similarity": similarity,
        "own_similarity": own,
        "nearest_id": TRAIN.ids[number % 5],
        "nearest_caption": f"a dog {number % 5}",
        "nearest_index": number % 5,
        "flipped": number % 3 == 0,
        "ratio": None if number == 5 else (number * 7 % 12) / 10,
        "authentic": number > 4,
        **changes,
    }


PAIRS_GIVEN = [pair(number) for number in range(len(PROMPTS))]


def measure(value=0.5, low=None, high=None, **changes):
    return {
        "section": "Copying",
        "name": "memorization_score",
        "label": "Memorization score <s>",
        "embedder": "pixels",
        "value": value,
        "low": low,
        "high": high,
        "level": None if low is None else 0.95,
        "better": "lower",
        "meaning": "95th percentile of similarity.",
        "headline": True,
        "warning": None,
        **changes,
    }


HISTOGRAM = {
    "embedder": "pixels",
    "edges": [0.0, 0.25, 0.5, 0.75, 1.0],
    "generated": [0, 1, 3, 4],
    "heldout": [2, 6, 2, 0],
    "train": [0, 10, 10, 0],
}
REPORT = {
    "created": "2026-03-01T08:05:00+00:00",
    "command": "python evaluate.py --prompt '</pre><script>window.hacked = 1</script>'",
    "settings": {"embedders": ["pixels"], "negative_prompt": "</dl><b>", "lora_weights": None},
    "seed": 0,
    "versions": {"torch": "2.13.0"},
    "model": {"name": "output/<i>demo", "fingerprint": "9f" * 32},
    "data": {
        "train": {"name": "emoji", "count": 1662, "fingerprint": "ab" * 32},
        "heldout": {"name": "emoji, test", "count": 482, "fingerprint": "cd" * 32},
        "prompts": 12,
        "images_per_prompt": 1,
    },
    "measures": [
        measure(0.61, 0.58, 0.64),
        measure(-4.3, -5.2, -3.3, name="c_t", better="zero", warning="small sample: <b>12</b>"),
        measure(0.4, name="heldout_p95", headline=False),
        measure(31.2, 30, 33, section="Quality", name="fid", headline=False, warning="few"),
    ],
    "verdict": "The model copies <b>much</b>. By 0.1 of <i>it</i>.",
    "histograms": [HISTOGRAM],
}


ROWS = [
    {"set": name, "id": f"{name}-1", "group": "g", "similarity": 0.5, "ratio": None, "loss": 0.25}
    for name in ("train", "heldout")
]


def write(folder, report=REPORT, pairs=PAIRS_GIVEN, images=ROWS, train=TRAIN, **changes):
    report_module.write_report(folder, report, pairs, images, GENERATED, train, **changes)
    return folder


def read_json(path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text("utf-8"), parse_constant=refuse)
