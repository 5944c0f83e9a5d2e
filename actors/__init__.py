"""Everything that produces or scores text. Never imports `learner`."""
