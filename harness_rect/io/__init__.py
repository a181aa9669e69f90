"""Files: written whole or not at all, and what is said while that takes long."""
