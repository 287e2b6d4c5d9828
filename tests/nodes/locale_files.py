"""The nodes' names and texts in other languages, as the host reads them: locales/<language>/nodeDefs.json.

A translation remembers the English it was made from, in tests/data/translated_from.json, so that a changed tooltip
cannot keep an old meaning in another language.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("zh", "ja", "he")
SOURCES = ROOT / "tests/data/translated_from.json"


def english_of(schemas: Mapping) -> dict:
    """Node id -> its texts, in the host's format; outputs by their place."""
    return {name: _texts(schema) for name, schema in sorted(schemas.items())}


def _texts(schema) -> dict:
    inputs = {slot.id: {"name": slot.display_name or slot.id, "tooltip": slot.tooltip} for slot in schema.inputs}
    outputs = {
        str(place): {"name": slot.display_name or slot.io_type, "tooltip": slot.tooltip}
        for place, slot in enumerate(schema.outputs)
    }
    facts = {"display_name": schema.display_name, "description": schema.description}
    return facts | {"inputs": inputs, "outputs": outputs}


def path_of(language: str) -> Path:
    """Where a host looks."""
    return ROOT / "locales" / language / "nodeDefs.json"


def read(language: str) -> dict:
    """A language's texts; none where nobody has translated yet."""
    return json.loads(path_of(language).read_text(encoding="utf-8")) if path_of(language).is_file() else {}


def write(language: str, texts: dict) -> None:
    """Write a language's texts."""
    path_of(language).parent.mkdir(parents=True, exist_ok=True)
    path_of(language).write_text(json.dumps(texts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def flat(texts: Mapping, prefix: str = "") -> Iterator[tuple[str, str]]:
    """("ZigMaSampler.inputs.steps.tooltip", text) of every text."""
    for key, value in texts.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def fingerprint(text: str) -> str:
    """Short, and another one when the text changes."""
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def compare(language: str, english: dict) -> tuple[list[str], list[str]]:
    """(keys without a translation, keys translated from another English than today's)."""
    here, there = dict(flat(read(language))), dict(flat(english))
    known = _sources().get(language, {})
    missing = [key for key in there if key not in here]
    stale = [key for key in there if key in here and known.get(key) != fingerprint(there[key])]
    return missing, stale


def mark_translated(language: str, english: dict) -> None:
    """Remember that every text of a language says what today's English says; texts of nothing that there is go."""
    there, tidy = dict(flat(english)), _like(read(language), english)
    sources = _sources()
    sources[language] = {key: fingerprint(there[key]) for key, _ in flat(tidy)}
    write(language, tidy)
    SOURCES.write_text(json.dumps(sources, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _sources() -> dict[str, dict[str, str]]:
    return json.loads(SOURCES.read_text(encoding="utf-8")) if SOURCES.is_file() else {}


def _like(texts: Mapping, english: Mapping) -> dict:
    """Those texts that English has, in its order."""
    kept = {key: _like(texts[key], value) if isinstance(value, Mapping) else texts[key]
            for key, value in english.items() if key in texts}  # fmt: skip
    return {key: value for key, value in kept.items() if value != {}}
