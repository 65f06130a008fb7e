"""The claims of the paper, one module each; run by recipes/claim.py."""
