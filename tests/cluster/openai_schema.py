"""OpenAI's published schemas as validators, for every kind of object that a client gets from us."""

import gzip
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

_DEFAULT_FOLDER = Path(__file__).parents[2].parent / "shared"


@cache
def _schemas() -> dict[str, Any]:
    folder = Path(os.environ.get("NANOSERVE_TEST_DATA", _DEFAULT_FOLDER))
    path = folder / "suites" / "openai-openapi.json.gz"
    if not path.is_file():
        pytest.skip(f"OpenAI's specification is not at {path}; NANOSERVE_TEST_DATA names the folder")
    specification = json.loads(gzip.decompress(path.read_bytes()))
    schemas: dict[str, Any] = _with_nulls(specification["components"]["schemas"])
    return schemas


def _with_nulls(node: Any) -> Any:
    """OpenAPI 3.0's `nullable`, which the document still uses, in the words of JSON Schema."""
    if isinstance(node, list):
        return [_with_nulls(item) for item in node]
    if not isinstance(node, dict):
        return node
    rest = {key: _with_nulls(value) for key, value in node.items() if key != "nullable"}
    return {"anyOf": [rest, {"type": "null"}]} if node.get("nullable") is True else rest


@cache
def _validator(name: str) -> Draft202012Validator:
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": {"schemas": _schemas()}})


def check(name: str, instance: Any) -> None:
    """Fail unless `instance` is a valid `name`."""
    _validator(name).validate(instance)


def check_completion_chunk(chunk: dict[str, Any]) -> None:
    """The schema of text completions is shared by streams, in which OpenAI itself sends finish_reason null."""
    choices = [
        choice | ({"finish_reason": "stop"} if choice["finish_reason"] is None else {}) for choice in chunk["choices"]
    ]
    check("CreateCompletionResponse", chunk | {"choices": choices})
