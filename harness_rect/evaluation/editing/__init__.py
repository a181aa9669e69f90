"""Tasks about the applied edits: one file each, :mod:`.task` with what they share, :mod:`.documents`."""
