"""What everyone stands on; imports torch only."""
