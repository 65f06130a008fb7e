"""What follows the offline phase in recipes/spar_offline_to_online.py."""
