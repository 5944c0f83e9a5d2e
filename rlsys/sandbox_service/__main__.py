"""Prints the OpenAPI document: `python -m rlsys.sandbox_service > docs/sandbox_service.openapi.json`."""

import json

from rlsys.sandbox_service.api import openapi

if __name__ == "__main__":
    print(json.dumps(openapi(), indent=1))
