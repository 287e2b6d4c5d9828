"""Does a picture show what its caption says? `python benchmarks/retrieval.py --data emoji.safetensors`.

The choice is fixed by a rule, not by hand: every k-th of the sorted captions, so that there are 40, one picture each
with seed 0 and the demo's own settings. A caption is retrieved when the training picture nearest to its picture (all
of them compete; cosine of features of EfficientNet-Lite0) carries that caption. Beside it

    ceiling   the same for the training pictures themselves, passed through the autoencoder: what no sampler can exceed
    unseen    20 pairs "word noun" that stand in no caption, by a rule too: is the noun, is the word, in the caption of
              the nearest picture?

Writes the sheets and figures to output/retrieval*. Data: see `python -m zigma.training.emoji --help`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zigma.assets import model_path
from zigma.checkpoint import Bundle, load_bundle
from zigma.sampling import sample
from zigma.sheet import enlarge, labelled_sheet, save_picture, to_pictures
from zigma.training.emoji import PackedPictures, read_packed
from zigma.training.features import EfficientNetFeatures, features_of
from zigma.training.metrics import retrieval_ranks

OUTPUT = Path(__file__).resolve().parents[1] / "output"
COUNT, UNSEEN = 40, 20
# Words that change how a noun looks; those that a vocabulary lacks are left out of the rule.
MODIFIERS = ("angry", "black", "blue", "brown", "crying", "green", "grinning", "orange", "purple", "red", "smiling",
             "sleeping", "white", "yellow")  # fmt: skip


def features_with_bar(extractor: EfficientNetFeatures, images: torch.Tensor, what: str) -> torch.Tensor:
    """Features (n, 1280) of images (n, 3, h, w) in [-1, 1]."""
    with tqdm(desc=what, total=len(images), leave=False) as bar:
        return features_of(extractor, images.__getitem__, len(images), lambda done, _: bar.update(done - bar.n))


def chosen_captions(pictures: PackedPictures, count: int) -> list[str]:
    """Every k-th of the sorted first captions, so that there are `count` (all of them, if there are fewer)."""
    captions = sorted(set(pictures.captions))
    step = max(1.0, len(captions) / count)
    return [captions[int(i * step)] for i in range(min(count, len(captions)))]


def unseen_captions(pictures: PackedPictures, vocabulary: set[str]) -> list[tuple[str, str]]:
    """Every k-th of the sorted pairs (modifier, one-word caption) that no caption contains together, 20 of them."""
    captions = [set(caption.split()) for item in pictures.items for caption in item["captions"]]
    nouns = sorted({c for c in pictures.captions if " " not in c})
    modifiers = [word for word in MODIFIERS if word in vocabulary]
    pairs = [(m, n) for m in modifiers for n in nouns if m != n and not any({m, n} <= words for words in captions)]
    step = len(pairs) / UNSEEN
    return [pairs[int(i * step)] for i in range(UNSEEN)]


def carries(captions: list[str], pictures: PackedPictures) -> torch.Tensor:
    """(m, n) bool: whether picture n has caption m."""
    return torch.tensor([[caption in item["captions"] for item in pictures.items] for caption in captions])


def summary(ranks: list[int]) -> str:
    """Two cells of the table."""
    return f"{sum(r == 0 for r in ranks)} of {len(ranks)} | {sum(r < 5 for r in ranks)} of {len(ranks)}"


def write_sheet(images: torch.Tensor, captions: list[str], name: str) -> None:
    pictures = [enlarge(picture, 2) for picture in to_pictures(images)]
    print(save_picture(labelled_sheet(pictures, captions, columns=8), OUTPUT / f"{name}.png"))


def main() -> None:
    """Print a table; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("emoji.safetensors"), help="packed training pictures")
    parser.add_argument("--model", type=Path, help="default: the shipped model")
    parser.add_argument("--count", type=int, default=COUNT, help="captions; more of them tell good models apart")
    parser.add_argument("--categories", nargs="+", help="of pictures; default: those that the model was trained on")
    options = parser.parse_args()
    if not options.data.is_file():
        print(f"retrieval: SKIPPED, no training pictures at {options.data}; `python -m zigma.training.emoji --help` "
              "says how the file is made")  # fmt: skip
        return
    bundle = load_bundle(options.model or model_path("demo"))
    categories = options.categories or json.loads(bundle.metadata.get("zigma.data", "{}")).get("categories")
    pictures = read_packed(options.data)
    pictures = pictures.select(categories) if categories else pictures
    extractor = EfficientNetFeatures()
    library = features_with_bar(extractor, pictures.images.float() / 127.5 - 1, "training pictures")
    report = measure(bundle, pictures, extractor, library, options.count)
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "retrieval.json").write_text(json.dumps(report, indent=1))


@torch.no_grad()
def measure(
    bundle: Bundle, pictures: PackedPictures, extractor: EfficientNetFeatures, library: torch.Tensor, count: int = COUNT
) -> dict:
    """Draw, compare, print."""
    captions = chosen_captions(pictures, count)
    print(f"{len(pictures.items)} training pictures, {len(set(pictures.captions))} captions\n")
    first = torch.stack([pictures.images[pictures.captions.index(caption)] for caption in captions])
    first = first.float() / 127.5 - 1
    through = bundle.autoencoder.decode(bundle.autoencoder.encode(first)) if bundle.autoencoder else first
    drawn = sample(bundle, captions, seed=0)
    report = {}
    print(f"| {len(captions)} captions | the nearest picture carries it | one of the five nearest does |")
    print("| --- | --- | --- |")
    for name, images in (("ceiling", through), ("drawn", drawn)):
        ranks = retrieval_ranks(features_with_bar(extractor, images, name), library, carries(captions, pictures))
        report[name] = dict(zip(captions, ranks, strict=True))
        print(f"| {name} | {summary(ranks)} |")
    pairs = unseen_captions(pictures, set(bundle.text_encoder.ids))
    unseen = sample(bundle, [" ".join(pair) for pair in pairs], seed=0)
    drawn_features = F.normalize(features_with_bar(extractor, unseen, "unseen"), dim=1)
    nearest = (drawn_features @ F.normalize(library, dim=1).t()).argmax(1).tolist()
    words = [{word for caption in pictures.items[i]["captions"] for word in caption.split()} for i in nearest]
    nouns = sum(noun in near for (_, noun), near in zip(pairs, words, strict=True))
    modifiers = sum(modifier in near for (modifier, _), near in zip(pairs, words, strict=True))
    print(f"\nunseen pairs: the nearest picture carries the noun of {nouns} of {UNSEEN}, the modifier of {modifiers}")
    report["unseen"] = {" ".join(pair): pictures.captions[i] for pair, i in zip(pairs, nearest, strict=True)}
    write_sheet(drawn, [c if report["drawn"][c] == 0 else f"{c} ({report['drawn'][c]})" for c in captions], "retrieval")
    write_sheet(unseen, [" ".join(pair) for pair in pairs], "retrieval-unseen")
    return report


if __name__ == "__main__":
    main()
