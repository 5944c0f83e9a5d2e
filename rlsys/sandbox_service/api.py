"""What the sandbox service takes and answers, and the OpenAPI document made of it (`docs/sandbox_service.openapi.json`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from actors.rewards.unit_tests import JudgingOptions
from rlsys import __version__

PROBLEM = (
    "A line of a problem set, in any of the layouts that rlsys reads: `tests` of {input, output}; TACO, APPS, PRIME `input_output`; LiveCodeBench; "
    "HumanEval; MBPP; MultiPL-E; interactive; IOI `subtasks`; LeetCode. `language` is python unless it says otherwise."
)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("expected text")
    return value


Text = Annotated[str, PlainValidator(_text), WithJsonSchema({"type": "string"})]
"""Any text that JSON can hold: a model may write half of a surrogate pair, which pydantic's own `str` refuses."""


class ExecuteRequest(BaseModel):
    """A program and the problem whose tests it shall pass."""

    model_config = ConfigDict(extra="forbid")

    program: Text = Field(description="source text, as it stands")
    problem: dict[str, Any] = Field(description=PROBLEM)
    options: JudgingOptions = Field(default=JudgingOptions(), description="how it is judged; `fence` means nothing here")
    deadline_s: float | None = Field(None, gt=0, description="an answer later than this is of no use; default: the server's own deadline")


class GradeRequest(BaseModel):
    """What a model wrote, with its program in a fenced block, and the problem whose tests it shall pass."""

    model_config = ConfigDict(extra="forbid")

    completion: Text = Field(description="the whole text; its last fenced block of the problem's language is the program")
    problem: dict[str, Any] = Field(description=PROBLEM)
    options: JudgingOptions = Field(default=JudgingOptions(), description="how it is judged")
    deadline_s: float | None = Field(None, gt=0, description="an answer later than this is of no use; default: the server's own deadline")


class Verdict(BaseModel):
    """The score. A fault of the server is never one: it has a status code of 5xx."""

    model_config = ConfigDict(extra="forbid")

    value: float = Field(description="1 or 0 with score sparse, the share of tests or points with soft")
    passed: bool = Field(description="whether every test passed")
    status: str = Field(
        description="accepted, wrong_answer, runtime_error, time_limit, memory_limit, output_limit, compile_error or unparseable; that of the "
        "first test that failed"
    )
    detail: str = Field(description="the first failure, one line")
    metrics: dict[str, float] = Field(description="tests/VERDICT: how many; tests/cpu_s: mean of a test; tests/peak_bytes")
    queued_s: float = Field(description="how long it waited for a cell")
    judged_s: float = Field(description="how long it was judged")


class Fault(BaseModel):
    """Why there is no verdict."""

    model_config = ConfigDict(extra="forbid")

    code: Literal[
        "bad_request",
        "bad_problem",
        "unauthorized",
        "not_found",
        "too_large",
        "too_slow",
        "busy",
        "ending",
        "deadline",
        "infrastructure_fault",
    ]
    message: str = Field(description="what was found, and what was expected")
    where: str = Field(description="the field, or the part of the request")


class Refusal(BaseModel):
    """The body of every answer that is not 200."""

    model_config = ConfigDict(extra="forbid")

    error: Fault


class Health(BaseModel):
    """How the server is doing."""

    model_config = ConfigDict(extra="forbid")

    status: Literal["ok", "ending"]
    version: str
    cells: int = Field(description="programs that run at once")
    queue: int = Field(description="requests that may wait besides")
    running: int
    waiting: int
    judged: int = Field(description="verdicts since the start")
    cells_replaced: int = Field(description="cells that broke and were replaced, since the start")


REFUSALS = {
    400: "The request or its problem cannot be understood; `where` names the field.",
    401: "The token is missing or wrong.",
    408: "The body did not arrive in time.",
    413: "The body is larger than the server takes.",
    500: "The sandbox broke: nothing is known about the program. Ask again.",
    503: "The queue is full, or the server is about to end. Ask again after `Retry-After` seconds.",
    504: "There was no verdict before the deadline. Nothing is known about the program.",
}


def openapi() -> dict[str, Any]:
    """The OpenAPI 3.1 document of the service."""
    schemas: dict[str, Any] = {}
    for model in (ExecuteRequest, GradeRequest, Verdict, Refusal, Health):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema

    def body(name: str) -> dict[str, Any]:
        return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}

    def judging(model: type[BaseModel], summary: str) -> dict[str, Any]:
        refusals: dict[str, Any] = {str(code): {"description": text, "content": body("Refusal")} for code, text in REFUSALS.items()}
        refusals["503"]["headers"] = {"Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}}
        return {
            "post": {
                "operationId": summary.split()[0].lower(),
                "summary": summary,
                "requestBody": {"required": True, "content": body(model.__name__)},
                "responses": {"200": {"description": "A verdict.", "content": body("Verdict")}, **refusals},
            }
        }

    return {
        "openapi": "3.1.0",
        "info": {
            "title": "rlsys sandbox service",
            "version": __version__,
            "description": "Runs programs that models wrote, isolated, on the tests of problems. One request is one program; send many at once.",
        },
        "security": [{"token": []}],
        "paths": {
            "/v1/execute": judging(ExecuteRequest, "Execute a program on a problem's tests"),
            "/v1/grade": judging(GradeRequest, "Grade a completion: take the program out of it, then execute that"),
            "/healthz": {
                "get": {
                    "operationId": "health",
                    "summary": "How the server is doing",
                    "security": [],
                    "responses": {"200": {"description": "It takes requests, or is about to end.", "content": body("Health")}},
                }
            },
            "/openapi.json": {
                "get": {
                    "operationId": "openapi",
                    "summary": "This document",
                    "security": [],
                    "responses": {"200": {"description": "OpenAPI 3.1.", "content": {"application/json": {"schema": {"type": "object"}}}}},
                }
            },
        },
        "components": {"schemas": schemas, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }
