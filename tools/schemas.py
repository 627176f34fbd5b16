"""Write the JSON Schemas of our files and requests to docs/schemas/: `python tools/schemas.py`.

Each follows from its typed record; a test holds the written ones to them.
"""

import json
from pathlib import Path

from phi_bench.records import Benchmark
from phi_runtime.contract import json_schema
from phi_runtime.package.manifest import Manifest
from phi_runtime.server.requests import ChatRequest, ResponsesRequest, TextRequest
from phi_train.curate.config import DataConfig
from phi_train.data.mixture import Mixture
from phi_train.recipes.config import RecipeFile
from phi_train.trainer.summary import Summary

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "schemas"
RECORDS = {
    "phi-bundle": Manifest,
    "benchmark": Benchmark,
    "summary": Summary,
    "recipe": RecipeFile,
    "chat-completions-request": ChatRequest,
    "completions-request": TextRequest,
    "responses-request": ResponsesRequest,
    "pipeline": DataConfig,
    "mixture": Mixture,
}


def schema_text(name: str) -> str:
    """The JSON Schema of a record, as its file holds it."""
    return json.dumps({"title": name} | json_schema(RECORDS[name]), indent=1, sort_keys=True) + "\n"


def main() -> None:
    """Write all of them."""
    FOLDER.mkdir(exist_ok=True)
    for name in RECORDS:
        (FOLDER / f"{name}.schema.json").write_text(schema_text(name))


if __name__ == "__main__":
    main()
