"""What the scripts share: a run with its directory, phases, checkpoints and scores."""
