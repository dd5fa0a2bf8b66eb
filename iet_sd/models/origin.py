"""What the configs of a pipeline say of where it was loaded from: perhaps a folder here.

diffusers and transformers write that into all that they save, and no loader reads it again.
Nothing heavy is imported: a push asks too.
"""

import json
from pathlib import Path
from typing import Any

_KEYS = ("_name_or_path", "name_or_path", "special_tokens_map_file")


def without_origin(file: Path) -> bytes:
    """The content of a JSON file without it; as it is, byte for byte, if the file says nothing.

    Errors: `OSError`, and `ValueError` if it is no JSON.
    """
    content = file.read_bytes()
    if not any(f'"{key}"'.encode() in content for key in _KEYS):
        return content
    kept = _without(json.loads(content))
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def _without(value: Any) -> Any:
    if isinstance(value, list):
        return [_without(item) for item in value]
    if not isinstance(value, dict):
        return value
    # A vocabulary has numbers by its words, and any word.
    return {
        key: _without(item)
        for key, item in value.items()
        if not (key in _KEYS and isinstance(item, str))
    }
