"""Typed records: what they refuse, in which words, and the schemas that are published."""

import json
import sys
from typing import Literal

import jsonschema
import pytest
from support import ROOT

from phi_runtime.contract import Contract, Count, StrictContract, decode, encode

sys.path.insert(0, str(ROOT / "tools"))
import schemas

sys.path.pop(0)


class Wheel(StrictContract, frozen=True):
    spokes: Count
    kind: Literal["round", "square"] = "round"


class Cart(StrictContract, frozen=True):
    wheels: tuple[Wheel, ...]
    kind: Literal["hand", "horse"] | None = None
    extra: dict[str, Wheel] | None = None


class Open(Contract, frozen=True):
    name: str


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ('{"wheels": [{"spoke": 4}]}', "wheels[0].spoke: unknown field (did you mean spokes?)"),
        ('{"wheel": []}', "wheel: unknown field (did you mean wheels?)"),
        ("{}", "wheels: is missing"),
        ('{"wheels": [{"spokes": 0}]}', "wheels[0].spokes: expected `int` >= 1"),
        ('{"wheels": [{"spokes": "4"}]}', "wheels[0].spokes: expected `int`, got `str`"),
        ('{"wheels": [{"spokes": 4, "kind": "squar"}]}', "'squar' is none of round, square (did you mean square?)"),
        ('{"wheels": [], "kind": "hors"}', "kind: 'hors' is none of hand, horse (did you mean horse?)"),
        ('{"wheels": [], "extra": {"a": {"spoks": 1}}}', "spoks: unknown field (did you mean spokes?)"),
        ("[]", "expected `object`, got `array`"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "expected `object`, got `array`"),
        (b"\xff\xfe", "is not valid JSON"),
    ],
)
def test_a_mistake_is_named_in_one_line(raw, says):
    with pytest.raises(ValueError) as told:
        decode(raw, Cart)
    assert says in str(told.value) and "\n" not in str(told.value)


def test_newer_files_may_have_more_fields():
    assert decode('{"name": "a", "colour": "red"}', Open) == Open("a")
    assert decode(encode(Open("a")), Open) == Open("a")


@pytest.mark.parametrize("name", schemas.RECORDS)
def test_the_published_schemas_are_current(name):
    """`python tools/schemas.py` writes them."""
    assert (schemas.FOLDER / f"{name}.schema.json").read_text() == schemas.schema_text(name)
    jsonschema.Draft202012Validator.check_schema(json.loads(schemas.schema_text(name)))


def test_real_files_match_their_schemas(bundles, checkpoint):
    for name, path in (
        ("phi-bundle", bundles / "gguf" / "phi-bundle.json"),
        ("phi-bundle", bundles / "coreml" / "phi-bundle.json"),
        ("summary", checkpoint / "training" / "summary.json"),
        ("recipe", checkpoint / "training" / "recipe.json"),
        ("benchmark", ROOT / "docs" / "demo.json"),
    ):
        jsonschema.validate(json.loads(path.read_text()), json.loads(schemas.schema_text(name)))
