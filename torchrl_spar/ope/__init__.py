"""Off-policy evaluation: what a policy is worth, and which one to choose, from logs alone."""
