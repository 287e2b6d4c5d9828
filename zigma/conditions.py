"""What a file says of its conditions: which of them is the null of classifier-free guidance, and the labels' names.

Guidance (Ho and Salimans 2022, arXiv 2207.12598) leads away from a null condition that training has to have seen in
place of the true one. No tensor tells whether it was: the file states it, under "zigma.condition".
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from numbers import Integral

from .config import ZigMaConfig

__all__ = ["ConditionFacts"]

KEY = "zigma.condition"
SHOWN = 8  # names that an error lists


@dataclasses.dataclass(frozen=True)
class ConditionFacts:
    """The conditions of one model.

    Attributes:
        null: of a class model the label that training put in place of the others, or None; of a text model whether the
            empty text was trained so (True or False); None for a model without conditions.
        label_names: of a class model, one for each label, the null's included, or None.
    """

    null: int | bool | None = None
    label_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.null is not None and not isinstance(self.null, int):
            raise ValueError(f"got the null condition {self.null!r}, expected a label, true, false or none")
        if self.label_names is not None:
            names = tuple(self.label_names)
            if isinstance(self.label_names, str) or not all(isinstance(name, str) and name.strip() for name in names):
                raise ValueError("the names of the labels have to be a list of texts, none of them empty")
            object.__setattr__(self, "label_names", names)

    def check(self, config: ZigMaConfig) -> None:
        """That a model of this architecture can have these conditions.

        Raises:
            ValueError: it cannot.
        """
        kind, count = config.conditioning, config.num_classes
        if self.label_names is not None and (kind != "class" or len(self.label_names) != count):
            has = f"{count} labels" if kind == "class" else "no labels"
            raise ValueError(f"got {len(self.label_names)} names of labels, but the model has {has}: name each of them")
        if self.null is None:
            return
        if kind == "class" and (isinstance(self.null, bool) or not 0 <= self.null < count):
            raise ValueError(
                f"got the null label {self.null!r}, but expected one of this model's labels, 0 to {count - 1}, or none"
            )
        if kind == "text" and not isinstance(self.null, bool):
            raise ValueError(
                f"got the null condition {self.null!r} of a text model, but expected true or false: whether the empty "
                "text was trained as it"
            )
        if kind == "none" and self.null is not False:
            raise ValueError(f"got the null condition {self.null!r}, but the model takes no condition: leave it out")

    @property
    def has_null(self) -> bool:
        """Whether guidance has something trained to lead away from; the label 0 is as good as others."""
        return self.null is not None and self.null is not False

    def label(self, which: int | str, num_classes: int) -> int:
        """The label of a number or a name; a name counts as written, or else in any case of letters.

        Raises:
            ValueError: there is no such label, or several are called so.
        """
        names = self.label_names or ()
        if isinstance(which, str):
            text = which.strip()
            found = [i for i, name in enumerate(names) if name == text]
            found = found or [i for i, name in enumerate(names) if name.strip().casefold() == text.casefold()]
            if len(found) > 1:
                raise ValueError(
                    f"choose the label by its number: {text!r} is the name of {', '.join(map(str, found))}"
                )
            if found:
                return found[0]
            if not text.isdecimal():
                raise ValueError(f"choose another label: none is called {text!r}; {self._offered(num_classes)}")
            which = int(text)
        if isinstance(which, bool) or not isinstance(which, Integral) or not 0 <= which < num_classes:
            raise ValueError(f"choose another label: got {which!r}, but {self._offered(num_classes)}")
        return int(which)

    def labels(self, text: str, num_classes: int) -> list[int]:
        """The labels of "fox", "3" or "3, owl, 7": numbers and names, separated by commas or lines.

        A name may itself have commas in it: the whole text, or a line of it, is looked for first.

        Raises:
            ValueError: as `label`; for a text without any.
        """
        lines = [line.strip(" ,") for line in text.splitlines() if line.strip(" ,")]
        if not lines:
            raise ValueError(f"give a label: the text is empty, but {self._offered(num_classes)}")
        known = {name.strip().casefold() for name in self.label_names or ()}
        parts = [
            part
            for line in lines
            for part in ([line] if line.casefold() in known else [p.strip() for p in line.split(",") if p.strip()])
        ]
        return [self.label(part, num_classes) for part in parts]

    def _offered(self, num_classes: int) -> str:
        """What a user may choose from, in few words."""
        text = f"expected numbers from 0 to {num_classes - 1}"
        if not self.label_names:
            return f"{text}; this model's file has no names for them"
        some = ", ".join(self.label_names[:SHOWN]) + (", ..." if len(self.label_names) > SHOWN else "")
        return f"{text}, or names such as {some}"

    def describe(self, config: ZigMaConfig) -> str:
        """One line of what guidance and prompts may use."""
        if config.conditioning == "none":
            return "none"
        if config.conditioning == "text":
            null = "the empty text, trained" if self.has_null else "not trained as far as the file says"
            return f"text, features of width {config.d_context}; null condition: {null}"
        null = f"label {self.null}" if self.has_null else "none (no guidance: cfg 1)"
        named = "" if not self.label_names else f", named {', '.join(self.label_names[:SHOWN])}"
        named += ", ..." if len(self.label_names or ()) > SHOWN else ""
        return f"class, {config.num_classes} labels{named}; null condition: {null}"

    def to_json(self) -> str:
        """One JSON object, as a file's metadata keeps it."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def read(cls, metadata: Mapping[str, str], config: ZigMaConfig, own_text_encoder: bool) -> ConditionFacts:
        """What a file's metadata says, checked. One that says nothing was written before the key existed, when the
        text models that carry their own encoder were all trained with the empty text as null, and no others.

        Raises:
            ValueError: it is no such object, has a fact that this version does not know, or contradicts the model.
        """
        if KEY not in metadata:
            return cls.of_a_silent_file(config, own_text_encoder)
        stated = json.loads(metadata[KEY])
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(stated, dict) or stated.keys() - known:
            raise ValueError(f"{KEY} is {str(stated)[:60]}, expected an object with {', '.join(sorted(known))}")
        facts = cls(**stated)
        facts.check(config)
        return facts

    @classmethod
    def of_a_silent_file(cls, config: ZigMaConfig, own_text_encoder: bool) -> ConditionFacts:
        """What holds where nothing is stated."""
        return cls(null=own_text_encoder if config.conditioning == "text" else None)
