"""Lab zoos: populations of small models over a grid of settings, with checkpoints and what each of them reaches."""
