"""Memory and operations of a training, from a simulation without weights."""
