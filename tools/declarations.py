"""Write down what the nodes declare: `python tools/declarations.py`, after a node was added or changed on purpose.

- tests/data/contracts/current.json: ids, inputs, outputs, by which saved workflows live
- locales/en/nodeDefs.json: names and texts, from which the other languages are translated

and say which translations are missing or older than their English. Whoever has translated locales/zh/nodeDefs.json, all
of it from today's English, says so with `python tools/declarations.py --translated zh`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/nodes"))

import contract  # noqa: E402
import locale_files  # noqa: E402
from stand_in_host import nodes_of_the_pack  # noqa: E402


def main() -> None:
    """Write both, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--translated", nargs="*", default=[], choices=locale_files.LANGUAGES, help="languages that are up to date now"
    )
    translated = parser.parse_args().translated
    with nodes_of_the_pack() as nodes:
        schemas = {schema.node_id: schema for schema in (node.define_schema() for node in nodes)}
    facts = {name: contract.contract_of(schema) for name, schema in schemas.items()}
    contract.CURRENT.write_text(contract.as_text(facts), encoding="utf-8")
    english = locale_files.english_of(schemas)
    locale_files.write("en", english)
    for language in translated:
        locale_files.mark_translated(language, english)
    for language in locale_files.LANGUAGES:
        missing, stale = locale_files.compare(language, english)
        print(f"{language}: {len(missing)} texts are missing, {len(stale)} are older than the English")
        for key in [*missing, *stale] if len(missing) < len(list(locale_files.flat(english))) else []:
            print(f"    {key}")


if __name__ == "__main__":
    main()
