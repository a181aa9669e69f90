"""Reading rows, writing files whole, and resuming long work."""
