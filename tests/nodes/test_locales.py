"""The nodes speak other languages, and say there what they say in English."""

from __future__ import annotations

import re
import warnings

import pytest
from locale_files import LANGUAGES, compare, english_of, flat, read
from stand_in_host import nodes_of_the_pack

# Input names, sizes, solver names and the like stay as they are in every language.
SCRIPTS = {"zh": r"[\u4e00-\u9fff]", "ja": r"[\u3040-\u30ff\u4e00-\u9fff]", "he": r"[\u0590-\u05ff]"}


@pytest.fixture(scope="module")
def english():
    with nodes_of_the_pack() as nodes:
        return english_of({schema.node_id: schema for schema in (node.define_schema() for node in nodes)})


def test_the_english_file_says_what_the_nodes_say(english):
    assert read("en") == english, "run `python tools/declarations.py`"


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_are_of_todays_english(english, language):
    missing, stale = compare(language, english)
    assert not stale, f"translate anew, and run `python tools/declarations.py`: {stale}"
    strange = set(dict(flat(read(language)))) - set(dict(flat(english)))
    assert not strange, f"texts of nothing that there is: {strange}"
    if missing:  # a host shows English there: a new node need not wait for its translators
        warnings.warn(f"{language} lacks {len(missing)} texts: {', '.join(missing[:5])} ...", stacklevel=1)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translation_is_in_its_own_script_and_keeps_numbers_and_names(english, language):
    there = dict(flat(english))
    for key, text in flat(read(language)):
        if key.endswith(("tooltip", "description")):
            assert re.search(SCRIPTS[language], text), f"{key} is not in {language}: {text}"
            numbers = [sorted(re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w])", t)) for t in (there[key], text)]
            assert set(numbers[0]) <= set(re.findall(r"\d+(?:\.\d+)?", text)), f"{key}: {numbers[0]} in {text}"
