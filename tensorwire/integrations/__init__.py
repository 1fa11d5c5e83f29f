"""Hand-over to other libraries, one file each."""
