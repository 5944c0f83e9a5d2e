"""The configurations in docs/learner.md are ones that the learner takes."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from learner.settings import LearnerSettings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "learner.md"


def test_every_snippet_is_a_valid_configuration() -> None:
    snippets = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    assert len(snippets) >= 5
    for snippet in snippets:
        content = yaml.safe_load(snippet)
        assert list(content) == ["learner"]
        LearnerSettings.model_validate(content["learner"])


def test_every_memory_option_of_the_table_is_a_key() -> None:
    rows = re.findall(r"^\| `([a-z_.]+)[:` ]", PAGE.read_text(encoding="utf-8"), flags=re.M)
    assert len(rows) >= 7
    for row in rows:
        fields: object = LearnerSettings
        for part in row.split("."):
            model = getattr(fields, "model_fields", {})
            assert part in model, row
            fields = model[part].annotation
