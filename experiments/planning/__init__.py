"""Plans: a train step compiled for machines that you do not have, and what it tells."""
