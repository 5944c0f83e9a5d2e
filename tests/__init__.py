"""Tests. A package, so that tests/protocol cannot hide protocol."""
