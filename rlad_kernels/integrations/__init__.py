"""The trainers people already use. Nothing is imported here: each module imports its framework."""
