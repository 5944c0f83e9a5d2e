"""The quickstart's material: a synthetic task that programs can check, and a tiny base model that is still bad at it."""
