"""What mix_objectives.py trains beside SPAR."""
