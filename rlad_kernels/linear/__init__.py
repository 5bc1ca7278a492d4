"""The public calls from hidden states and a head."""
