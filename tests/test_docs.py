"""The pages beside the README: what they quote is there."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from iet_sd.config import CompareSettings, Config, EvaluateSettings, GenerateSettings, PushSettings

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
SETTINGS = (Config, EvaluateSettings, GenerateSettings, CompareSettings, PushSettings)
FLAGS = {
    f.name for s in SETTINGS for part in s.sections().values() for f in dataclasses.fields(part)
}


def without_docstrings(path):
    """Code whose texts are those that are said."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            texts = [
                n for n in body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
            ]
            node.body = [n for n in body if n not in texts] or [ast.Pass()]
    return ast.unparse(tree)


# Texts that Python puts together from pieces are one already.
CODE = "\n".join(without_docstrings(p) for p in sorted(ROOT.glob("iet_sd/**/*.py")))
# Of accelerate and ourselves.
OTHERS = {"quiet", "help", "config", "config_file"}
# Said by the system, not by us.
FOREIGN = {"No space left on device"}


def test_there_are_pages():
    assert len(PAGES) > 2


def quoted(page):
    """First column of the tables of messages."""
    return re.findall(r"^\| `(.+?)`", page.read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize("message", quoted(ROOT / "docs" / "troubleshooting.md"))
def test_messages_are_said(message):
    pieces = [piece.strip() for piece in message.split("…")]
    for piece in filter(None, pieces):
        assert piece in FOREIGN or piece in CODE, piece


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_flags_exist_and_links_lead_somewhere(page):
    text = page.read_text("utf-8")
    # Of the table of others' flags the columns after the first.
    ours = re.sub(
        r"<!-- theirs -->.*?<!-- ours -->",
        lambda table: re.sub(r"^\|[^|]*\|", "", table[0], flags=re.MULTILINE),
        text,
        flags=re.DOTALL,
    )
    for flag in re.findall(r"--([a-z][a-z_0-9-]+)", ours):
        assert flag.removeprefix("no-") in {*FLAGS, *OTHERS}, flag
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link
