"""Reading data sets: files and Minari sets to a checked replay buffer."""
