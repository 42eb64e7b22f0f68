"""Everything Ray: the serving cluster around `engine`."""
