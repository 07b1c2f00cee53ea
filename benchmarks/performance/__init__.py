"""How fast, against what is physically possible and against the tools people use: `make bench`."""
