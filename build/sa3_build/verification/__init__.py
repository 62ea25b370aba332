"""Compare a result with its source: parity, rollouts, proofs on the graph."""
