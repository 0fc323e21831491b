"""What travels through a walk in place of a kernel: the frozen array and its terms."""
