"""A linear use of a kernel, as data, and the thin products that it needs."""
