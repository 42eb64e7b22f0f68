"""What requests look like: lengths and arrivals from distributions, named services and recorded traces; no tokens."""
