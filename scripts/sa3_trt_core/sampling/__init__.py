"""The ping-pong sampler: schedule, inputs, guidance, ring."""
