"""Drawings of a `Timeline`: lanes x time in the terminal, as a picture, and as a trace for Perfetto."""
