"""What actors and learner agree on: messages, channels, weights on disk, errors. Imports nothing else of ours."""
