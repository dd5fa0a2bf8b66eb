"""What an evaluation has written."""

import json


def report_of(folder):
    return json.loads((folder / "report.json").read_text("utf-8"))
