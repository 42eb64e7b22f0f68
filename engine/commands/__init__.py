"""The engine's larger commands, a file each; `engine.cli` mounts them. Torch is imported inside a command."""
