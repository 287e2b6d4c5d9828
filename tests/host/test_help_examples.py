"""Each help page's example runs in a real host as it is stored, but for the length of a training."""

from __future__ import annotations

import io
import json

import pytest
from found_hosts import NEEDS_HOST, ROOT
from PIL import Image
from ui_format import as_api

from zigma.assets import available_models

pytestmark = [
    pytest.mark.host,
    NEEDS_HOST,
    pytest.mark.skipif(not available_models(), reason="NOT TESTED: the demo model is not in place"),
]
EXAMPLES = sorted((ROOT / "web/docs/examples").glob("*.json"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_of_a_help_page_runs(server, path):
    sent = as_api(json.loads(path.read_text(encoding="utf-8")))
    for node in sent.values():
        if node["class_type"] == "ZigMaTrain":
            node["inputs"]["steps"] = 2
    pictures = [Image.open(io.BytesIO(data)) for data in server.run(sent).values()]
    previews = [node for node in sent.values() if node["class_type"] == "PreviewImage"]
    assert len(pictures) >= len(previews)
    for picture in pictures:
        assert len(picture.convert("L").getcolors()) > 16, "an empty picture"
